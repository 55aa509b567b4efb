"""One batch, every way to split it: the clipped gradient of a step, and the weights after it.

    torchrun --nproc_per_node=N tests/gradient_ranks.py OUT MODEL NAME [--full] [KEY=VALUE ...]

The keys are of the ranks (num_generators, tensor_parallel_size, trainer_replicas): engines
bring the rows, whole groups each; without them the first trainer has all. Where there is none yet,
it leaves OUT/reference.pt (float64, one micro-batch, dense head), which later runs are compared
with. Writes OUT/NAME.json: one object per cell, with relative differences, and exports the model.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imports are quicker, and there are many

import itertools
import json
import os
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import losses
import weights
from rollouts import Rollouts, gather
from runtime import World
from trainer import Trainer

LENGTHS = [30, 4, 17, 9, 22, 12, 5, 11]
GROUPS = [0, 0, 0, 1, 1, 2, 2, 3]
WEIGHTLESS, UNSAMPLED = 3, 7  # a row of weight 0; a row without a sampled token
CORRECTED = {"old_policy": "trainer", "correction": "truncate", "correction_level": "sequence"}
VARIANTS = {
    **{name: {"loss": name} for name in losses.LOSSES},
    "grpo, by prompt, with KL": {"loss": "grpo", "aggregation": "prompt", "kl_coef": 0.1},
    "cispo, corrected": {"loss": "cispo", **CORRECTED},
    "grpo, 2 mini-batches": {"loss": "grpo", "minibatches": 2},
    "grpo, fewer rows than ranks": {"loss": "grpo"},
}
BUDGETS = {"one pack": 10_000, "several": 40, "row by row": 8}
CHUNKS = {"dense": 0, "5": 5, "7": 7, "4096": 4096}
SAMPLE = [  # dtype, checkpointing, budget, chunk: what `make test` has time for
    ("float64", "none", "one pack", "dense"),
    ("float64", "none", "several", "5"),
    ("float64", "full", "row by row", "7"),
    ("float64", "selective", "several", "4096"),
    ("float32", "none", "several", "4096"),
    ("float32", "selective", "row by row", "5"),
]


def batch() -> Rollouts:
    """Eight rows of unequal length, stale log-probs, two that train nothing."""
    g = torch.Generator().manual_seed(3)
    n, t = len(LENGTHS), max(LENGTHS)
    length = torch.tensor(LENGTHS)
    real = torch.arange(t) < length[:, None]
    mask = (torch.rand(n, t, generator=g) < 0.7) & real
    mask[:, :2] = False
    mask[UNSAMPLED] = False
    weight = torch.ones(n)
    weight[WEIGHTLESS] = 0
    return Rollouts(
        index=torch.tensor(GROUPS),
        reply=torch.arange(n),
        length=length,
        sampled=mask.sum(1),
        weight=weight,
        finished=torch.ones(n, dtype=torch.bool),
        reward=torch.zeros(n),
        tokens=torch.randint(3, 28, (n, t), generator=g) * real,
        mask=mask,
        logprobs=(-3.3 + 0.3 * torch.randn(n, t, generator=g)) * mask,
        version=torch.zeros(n, t, dtype=torch.int32),
        advantage=torch.randn(n, t, generator=g) * mask,
    )


def locally_divided(loss, cfg, whole: float):
    """The pitfall: each micro-batch divides by its own count."""

    def wrong(logprobs, rows, cfg):
        value, sums = loss(logprobs, rows, cfg)
        return value * whole / losses.divisor(rows, cfg), sums

    return wrong


class Bench:
    """A real trainer whose optimizer is SGD, put back to its first weights after each step."""

    def __init__(self, world, **settings):
        self.world, self.cfg = world, grpo.Config(**settings)
        self.trainer = Trainer(self.cfg, world)
        if not world.trains:
            return
        self.parameters = list(self.trainer.policy.parameters())
        self.first = [p.detach().clone() for p in self.parameters]
        self.trainer.optimizer = torch.optim.SGD(self.parameters, lr=self.cfg.lr)
        self.trainer.optimizer.register_step_pre_hook(lambda *_: self.keep_gradient())

    def keep_gradient(self):  # clipped, as the optimizer sees it; of the last mini-batch
        self.gradient = self.whole([p.grad for p in self.parameters])
        del self.trainer.optimizer.found_inf  # which only fused optimizers know

    def whole(self, tensors) -> torch.Tensor:
        return torch.cat([t.detach().full_tensor().flatten().double() for t in tensors])

    def step(self, variant: str, budget: int, chunk: int, planted: bool = False):
        """(clipped gradient, change of the weights, metrics)"""
        cfg = self.cfg
        defaults = {"aggregation": "auto", "advantage": "auto", "clip_low": -1.0, "clip_high": -1.0}
        defaults |= {"kl_coef": 0.0, "old_policy": "generator", "correction": "none"}
        for name, value in {**defaults, "minibatches": 1, **VARIANTS[variant]}.items():
            setattr(cfg, name, value)
        grpo.find_loss(cfg)
        rows, world = Rollouts(), self.world
        if world.leads:
            rows = batch().take([0, 2]) if "fewer rows" in variant else batch()
            mine = rows.index % max(len(world.engines), 1) == max(world.engine, 0)
            rows = rows.take(mine.nonzero().flatten())
            rows.share = losses.shares(rows, cfg)
        rows = gather(rows, world, budget, cfg.minibatches)
        if not world.trains:
            return None
        self.trainer.policy.chunk = chunk
        if len(rows):  # another policy's log-probs, for the KL
            rows.ref_logprobs = (rows.logprobs + 0.3 * rows.tokens.sin()) * rows.mask
        loss = losses.policy_loss(losses.LOSSES[cfg.loss])
        if planted:
            loss = locally_divided(loss, cfg, losses.divisor(rows.all, cfg))
        metrics = self.trainer.step(rows, loss, losses.divisor)
        moved = self.whole(self.parameters)
        with torch.no_grad():
            for p, first in zip(self.parameters, self.first):
                p.copy_(first)
        return self.gradient, moved, metrics


def cells(full: bool):
    """(dtype, checkpointing, budget's name, chunk's name)"""
    every = itertools.product(
        ("float64", "float32"), ("none", "selective", "full"), BUDGETS, CHUNKS
    )
    return list(every) if full else SAMPLE


def main(out: str, model: str, name: str, full: bool, **ranks: int):
    world, out = World(**ranks), pathlib.Path(out)
    world.connect()
    first = not (out / "reference.pt").exists()
    reference = {} if first else torch.load(out / "reference.pt")
    found, bench, built = [], None, None
    for dtype, checkpointing, budget, chunk in cells(full):
        if built != (dtype, checkpointing):
            built = dtype, checkpointing
            same = {"model": model, "lr": 0.1, "lr_schedule": "constant"}
            bench = Bench(world, **same, dtype=dtype, activation_checkpointing=checkpointing)
        for variant in VARIANTS:
            plants = (dtype, checkpointing, budget) == ("float64", "none", "several")
            for planted in (False, True) if plants else (False,):
                result = bench.step(variant, BUDGETS[budget], CHUNKS[chunk], planted)
                if result is None:  # this rank has no part in training
                    continue
                gradient, moved, metrics = result
                truth = reference.setdefault(variant, (gradient, moved, metrics))
                off = [float((a - b).norm() / b.norm()) for a, b in zip((gradient, moved), truth)]
                same = {
                    k: abs(metrics[k] - v) <= 1e-4 * abs(v) + 1e-5
                    for k, v in truth[2].items()
                    if not isinstance(v, list)
                }
                found.append(
                    {"ranks": name, "dtype": dtype, "checkpointing": checkpointing}
                    | {"budget": budget, "chunk": chunk, "variant": variant, "planted": planted}
                    | {"norm": float(gradient.norm()), "gradient": off[0], "weights": off[1]}
                    | {"metrics": [k for k, ok in same.items() if not ok]}
                )
    weights.export(bench.trainer, out / f"{name}-model", world)
    if world.writes:
        (out / f"{name}.json").write_text(json.dumps(found))
        if first:
            torch.save(reference, out / "reference.pt")
    world.close()


if __name__ == "__main__":
    settings = (argument.split("=") for argument in sys.argv[4:] if "=" in argument)
    main(*sys.argv[1:4], "--full" in sys.argv, **{k: int(v) for k, v in settings})
    sys.stdout.flush()
    os._exit(0)
