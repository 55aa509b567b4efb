"""Gradients of policy and value model for test_ppo.py. Under torchrun: on several trainers.

torchrun --nproc_per_node=2 tests/ppo_ranks.py OUT MODEL
"""

import os
import pathlib
import sys

import torch
from torch.distributed.tensor import distribute_tensor

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from pitfall_rows import batch

import grpo
import losses
from examples import ppo
from rollouts import gather
from runtime import World


def settings(model: str, **values) -> ppo.Config:
    cfg = ppo.Config(model=model, dtype="float64", minibatches=1, max_grad_norm=0.0, **values)
    grpo.find_loss(cfg)
    return cfg


def models(cfg, world):
    """(policy's trainer, value model's), whose heads are not at zero any more."""
    trainer, critic = ppo.Actor(cfg, world), ppo.Critic(cfg, world)
    trainer.critic = critic
    with torch.no_grad():
        for name, p in critic.policy.named_parameters():
            if "head" in name:  # each element by its place, whatever part of it is here
                whole = torch.linspace(-0.3, 0.5, p.numel(), dtype=p.dtype).view(p.shape)
                p.copy_(distribute_tensor(whole, p.device_mesh, p.placements))
    return trainer, critic


def gradients(cfg, world, budget: int = 40) -> dict[str, torch.Tensor]:
    """One step of the loop of ppo.py on random rows -> the flat gradients that the optimizers get,
    and the sum of squared advantages of this rank's rows. Nothing is learned.
    """
    (trainer, critic), found = models(cfg, world), {}
    for name, one in (("policy", trainer), ("value", critic)):

        def look(optimizer, args, kwargs, name=name, one=one):
            grads = [p.grad.full_tensor().flatten() for p in one.policy.parameters()]
            found[name] = torch.cat(grads)

        one.cfg.lr = 0.0
        one.optimizer.register_step_pre_hook(look)
    table = batch(cfg)
    rows = gather(table if world.leads else table.take([]), world, budget)
    rows = critic.judge(trainer.score(rows))
    metrics = trainer.step(rows, losses.policy_loss(losses.grpo), losses.divisor)
    found["metrics"] = {**metrics, **critic.learn(rows)}
    return found


def main(out: str, model: str):
    world = World(None)
    world.connect()
    found = gradients(settings(model), world)
    if world.writes:
        torch.save(found, out)
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
