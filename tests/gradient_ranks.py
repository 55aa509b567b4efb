"""Run by test_gradient.py under torchrun: the clipped-free gradient of one batch, under every way
to split it.

torchrun --nproc_per_node=N tests/gradient_ranks.py OUT MODEL
"""

import os
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import losses
from rollouts import Rollouts, gather
from runtime import World
from trainer import Trainer

LENGTHS = [30, 4, 17, 9, 22, 12, 5]


def batch() -> Rollouts:
    """Seven rows of unequal length, stale log-probs, one row of weight 0."""
    g = torch.Generator().manual_seed(3)
    n, t = len(LENGTHS), max(LENGTHS)
    length = torch.tensor(LENGTHS)
    real = torch.arange(t) < length[:, None]
    mask = (torch.rand(n, t, generator=g) < 0.7) & real
    mask[:, :2] = False
    weight = torch.ones(n)
    weight[3] = 0
    return Rollouts(
        index=torch.arange(n),
        reply=torch.zeros(n, dtype=torch.int64),
        length=length,
        sampled=mask.sum(1),
        weight=weight,
        finished=torch.ones(n, dtype=torch.bool),
        reward=torch.zeros(n),
        tokens=torch.randint(3, 28, (n, t), generator=g) * real,
        mask=mask,
        logprobs=(-2.5 + torch.randn(n, t, generator=g)) * mask,
        version=torch.zeros(n, t, dtype=torch.int32),
        advantage=torch.randn(n, t, generator=g) * mask,
    )


def main(out: str, model: str):
    world = World(None)
    world.connect()
    found = {}
    for dtype in ("float64", "float32"):
        for checkpointing in (False, True):
            cfg = grpo.Config(
                model=model, dtype=dtype, activation_checkpointing=checkpointing, clip_high=3.0
            )
            trainer = Trainer(cfg, world)

            def keep(trainer=trainer):  # instead of the optimizer's step
                grads = [
                    p.grad.full_tensor().flatten().double() for p in trainer.policy.parameters()
                ]
                trainer.policy.zero_grad()
                keep.grad = torch.cat(grads)
                return float(keep.grad.norm())

            trainer.update = keep
            for budget in (10_000, 40, 8):  # one pack a rank; several; one row at a time
                for chunk in (0, 5, 4096):
                    trainer.policy.chunk = chunk
                    rows = gather(batch() if world.leads else Rollouts(), world, budget)
                    metrics = trainer.step(
                        rows, losses.with_diagnostics(losses.grpo), losses.divisor(rows.all, cfg)
                    )
                    found[dtype, checkpointing, budget, chunk] = (keep.grad, metrics)
    if world.writes:
        torch.save(found, pathlib.Path(out) / f"{world.size}.pt")
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
