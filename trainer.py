"""The trainer: micro-batches through the policy, one division, one clip, one optimizer step."""

import json
import math
import pathlib
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model import build_policy
from rollouts import Rollouts


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then `lr_schedule` down to `lr_min_ratio` of the peak after the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    cosine = (1 - math.cos(math.pi * done)) / 2
    fall = {"constant": 0.0, "linear": done, "cosine": cosine}[cfg.lr_schedule]
    return cfg.lr * (1 - (1 - cfg.lr_min_ratio) * fall)


class Trainer:
    """Policy and optimizer, sharded over the trainer ranks; empty on ranks that only generate."""

    def __init__(self, cfg, world, tokenizer=None):
        self.cfg, self.world, self.tokenizer, self.version = cfg, world, tokenizer, 0
        if not world.trains:
            return
        self.policy = build_policy(cfg, world)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=cfg.lr,
            betas=(cfg.beta1, cfg.beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def forward(self, rows: Rollouts):
        """Log-probs and entropy (B, T) of the sampled tokens; 0 elsewhere."""
        return self.policy(rows.tokens, rows.length, rows.mask)

    def microbatches(self, rollouts: Rollouts):
        """This rank's rows by the plan. Each rank yields equally often, for FSDP's collectives:
        where the plan has nothing for it, a row that counts for nothing.
        """
        for rows in rollouts.microbatches:
            yield rollouts.take(rows, self.world.device) if rows else nothing(self.world.device)

    def step(self, rollouts: Rollouts, loss_fn, divisor: float | None = None) -> dict[str, float]:
        """One optimizer step on the gathered batch. Returns metrics, equal on every trainer.

        `loss_fn(logprobs, rows, cfg)` returns sums; `divisor` is the one number they are divided
        by, taken from the whole batch (default: its sampled tokens). Metrics take the same road and
        are means per sampled token.
        """
        if not self.world.trains:
            return {}
        with self.world.span("train"):
            tokens = float((rollouts.all.sampled * rollouts.all.weight).sum())
            cfg, sums, divisor = self.cfg, {}, divisor or tokens
            for rows in self.microbatches(rollouts):
                logprobs, entropy = self.forward(rows)
                loss, parts = loss_fn(logprobs, rows, cfg)
                (loss / divisor).backward()
                parts |= {"loss": loss, "entropy": (entropy * rows.weight[:, None]).sum()}
                parts["tokens"] = (rows.mask * rows.weight[:, None]).sum()
                for name, value in parts.items():
                    value = value.detach().double()
                    add = torch.maximum if name.endswith("_max") else torch.add
                    sums[name] = add(sums[name], value) if name in sums else value
            metrics = self.reduce(sums)
            metrics["loss"] *= metrics["tokens"] / divisor  # the loss has a divisor of its own
            metrics["grad_norm"] = self.update()
            assert metrics["tokens"] == tokens, (metrics["tokens"], tokens)  # each exactly once
            return metrics

    @torch.no_grad()
    def evaluate(self, rollouts: Rollouts, loss_fn) -> float:
        """Mean loss per sampled token of a gathered table. Collective over trainers."""
        total = torch.zeros((), device=self.world.device, dtype=torch.float64)
        for rows in self.microbatches(rollouts):
            total += loss_fn(self.forward(rows)[0], rows, self.cfg)[0]
        self.policy.reshard()  # after a forward FSDP2 leaves the root gathered for a backward
        dist.all_reduce(total, group=self.world.trainers)
        return float(total) / float((rollouts.all.sampled * rollouts.all.weight).sum())

    def reduce(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """This rank's sums -> means per sampled token (names in _max: maxima) of all trainers."""
        values = torch.stack(list(sums.values())).to(self.world.device)
        is_max = torch.tensor([name.endswith("_max") for name in sums], device=values.device)
        total, top = values.clone(), values.clone()
        dist.all_reduce(total, group=self.world.trainers)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.world.trainers)
        out = dict(zip(sums, torch.where(is_max, top, total).tolist()))
        tokens = max(out["tokens"], 1.0)
        return {k: v if k == "tokens" or k.endswith("_max") else v / tokens for k, v in out.items()}

    def update(self) -> float:
        """Clip to `max_grad_norm`, step, forget the gradient. Returns the norm before the clip."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters], foreach=True)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.cfg.max_grad_norm > 0:
            clip_grads_with_norm_(parameters, self.cfg.max_grad_norm, norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.version, self.cfg)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.version += 1
        return float(norm)

    # ------------------------------------------------------------ checkpoints

    def state(self) -> dict:
        return {
            "policy": dict(self.policy.named_parameters()),
            "optimizer": get_optimizer_state_dict(self.policy, self.optimizer),
        }

    def save(self, folder: pathlib.Path):
        """Write folder/step-N, by a temporary name: it is complete or absent. Collective."""
        if not self.world.trains:
            return
        with self.world.span("save"):
            final = folder / f"step-{self.version}"
            partial = folder / f"partial-{self.version}"
            if self.world.writes:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier(group=self.world.trainers)
            dcp.save(self.state(), checkpoint_id=partial, process_group=self.world.trainers)
            if self.world.writes:
                (partial / "about.json").write_text(json.dumps({"step": self.version}))
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
            dist.barrier(group=self.world.trainers)

    def load(self, folder: pathlib.Path):
        """Weights, optimizer and step of a checkpoint of any number of trainers. Collective."""
        if not self.world.trains:
            return
        state = self.state()
        dcp.load(state, checkpoint_id=folder, process_group=self.world.trainers)
        set_optimizer_state_dict(self.policy, self.optimizer, state["optimizer"])
        self.version = json.loads((folder / "about.json").read_text())["step"]


def nothing(device) -> Rollouts:
    """A row that counts for nothing: what a rank runs when its part of the plan is empty."""
    zero, one = torch.zeros(1, 2, device=device), torch.ones(1, 2, dtype=torch.bool, device=device)
    return Rollouts(
        index=zero[:, 0].long(),
        length=torch.full((1,), 2, device=device),
        weight=zero[:, 0],
        tokens=zero.long(),
        mask=one,
        logprobs=zero,
        version=zero.int(),
        advantage=zero,
    )
