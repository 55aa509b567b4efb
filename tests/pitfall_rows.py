"""Rows and gradients for test_pitfalls.py. Under torchrun: what only several trainers can show.

torchrun --nproc_per_node=2 tests/pitfall_rows.py OUT MODEL
"""

import os
import pathlib
import signal
import sys
import time

import torch
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import losses
import weights
from rollouts import Rollouts, Row, from_rows, gather
from runtime import World
from tasks import Episode
from trainer import Trainer

LENGTHS = [(3, 27), (2, 2), (5, 12), (2, 7), (4, 18), (2, 10)]  # tokens of prompt and reply


def settings(model: str = "", **values) -> grpo.Config:
    """A run's settings, in float64, with the loss's own values where they say auto."""
    cfg = grpo.Config(model=model, **{"dtype": "float64", **values})
    grpo.find_loss(cfg)
    return cfg


def row(reply: int, prompt: list[int], tokens: list[int], logprobs=None, slot=0, step=0) -> Row:
    """A finished row of one turn, as the generator writes it; its reward is its number."""
    made = Row(step, slot, 0, reply, Episode({"prompt": ""}), finished=True)
    made.rewards, made.paid = {"correct": float(reply)}, [float(reply)]
    made.append_given(prompt)
    made.prompt_length = len(prompt)
    made.append_sampled(tokens, logprobs or [-2.0] * len(tokens), now=step)
    return made


def random_row(i: int, prompt: int, reply: int, step: int = 0) -> Row:
    g = torch.Generator().manual_seed(i)
    tokens = torch.randint(3, 28, (prompt + reply,), generator=g).tolist()
    logprobs = (-3 + torch.randn(reply, generator=g)).tolist()
    return row(i % 2, tokens[:prompt], tokens[prompt:], logprobs, slot=i // 2, step=step)


def complete(table: Rollouts, cfg) -> Rollouts:
    """Add the columns that the loop of grpo.py writes before `gather`."""
    table.advantage = losses.group_advantages(table, cfg.advantage)
    table.weight = losses.row_weights(table, cfg)
    table.share = losses.shares(table, cfg)
    return table


def batch(cfg, lengths=LENGTHS, step: int = 0) -> Rollouts:
    """Random rows of unequal length, in groups of two."""
    rows = [random_row(i, *length, step=step) for i, length in enumerate(lengths)]
    return complete(from_rows(rows, ["correct"]), cfg)


def train(trainer, table: Rollouts, budget: int = 40) -> dict[str, float]:
    """`gather` and `step`, as in grpo.py -> metrics. Collective over the trainers."""
    rows = gather(table if trainer.world.leads else table.take([]), trainer.world, budget)
    return trainer.step(rows, losses.policy_loss(grpo.find_loss(trainer.cfg)), losses.divisor)


def gradient(trainer, table: Rollouts, budget: int = 40) -> tuple[torch.Tensor, dict]:
    """The flat gradient that the optimizer is given, and the metrics. Nothing is learned."""
    seen = []

    def look(optimizer, args, kwargs):
        seen.extend(p.grad.full_tensor().flatten() for p in trainer.policy.parameters())

    trainer.cfg.lr = 0.0
    handle = trainer.optimizer.register_step_pre_hook(look)
    metrics = train(trainer, table, budget)
    handle.remove()
    return torch.cat(seen), metrics


def travels(trainer, world) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(as FSDP2 gathers it, as it travels) of tensors that it cuts unevenly, some into fewer parts
    than there are trainers, in buckets of several sizes. Collective."""
    random, whole = torch.Generator().manual_seed(0), trainer.policy
    shapes = [(5, 3), (1, 4), (7,), (2, 2, 2), (1,), (9, 2)]
    odd = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]
    trainer.policy = torch.nn.ParameterList(odd)
    mesh, pairs = next(whole.parameters()).device_mesh, []
    fully_shard(trainer.policy, mesh=mesh)
    for limit in (1, 9, 20, 100):
        world.buckets = weights.plan_buckets(trainer, limit)
        mine = dict(trainer.policy.named_parameters())
        for views in weights.buckets_through(trainer, world, torch.bfloat16):
            pairs += [(mine[k].full_tensor().detach(), view.clone()) for k, view in views.items()]
    trainer.policy = whole
    return pairs


def main(out: str, model: str):
    world = World(None)
    world.connect()
    cfg = settings(model, max_grad_norm=0.0)
    trainer, found, start = Trainer(cfg, world), {}, time.monotonic()
    found["travels"] = travels(trainer, world)
    one_row = batch(cfg).take([1])  # for two trainers: the other has nothing to train
    for name, limit, table in (
        ("all", 0.0, batch(cfg)),
        ("clipped", 0.01, batch(cfg)),
        ("one", 0.0, one_row),
    ):
        cfg.max_grad_norm = limit
        found[name] = gradient(trainer, table)
        if world.writes:
            torch.save(found, out)
        # What comes next may be a deadlock, and the groups never time out by themselves.
        signal.alarm(20 + 10 * int(time.monotonic() - start))
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
