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
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model import build_policy, pack_rows, send
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

    def __init__(self, cfg, world, tokenizer=None, frozen: dict[str, str] | None = None):
        """`frozen`: column -> model that writes it in `score`, without being trained."""
        self.cfg, self.world, self.tokenizer, self.version = cfg, world, tokenizer, 0
        if not world.trains:
            return
        self.policy = build_policy(cfg, world)
        models = (frozen or {}).items()
        self.frozen = {column: build_policy(cfg, world, path) for column, path in models}
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=cfg.lr,
            betas=(cfg.beta1, cfg.beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def microbatches(self, rollouts: Rollouts, plan: list[list[int]]):
        """(row numbers, rows, their Pack) by the plan, on the device. Each rank yields equally
        often, for FSDP's collectives: where its plan is empty, a row that counts for nothing.
        """
        for numbers in plan:
            rows, device = rollouts.take(numbers) if numbers else nothing(), self.world.device
            pack = pack_rows(rows.tokens, rows.length, rows.mask, device)
            yield numbers, Rollouts(**{k: send(v, device) for k, v in rows.columns().items()}), pack

    def score(self, rollouts: Rollouts) -> Rollouts:
        """Add the log-probs that the frozen models give to the sampled tokens, and those of the
        policy before the updates where the loss asks for them. Collective over trainers.
        """
        cfg = self.cfg
        if self.world.trains:
            with self.world.span("score"):
                for column, model in self.frozen.items():
                    setattr(rollouts, column, self.logprobs(rollouts, model))
                several = cfg.minibatches * cfg.epochs_per_batch > 1
                if cfg.old_policy == "trainer" and several:
                    rollouts.old_logprobs = self.logprobs(rollouts, self.policy)
        return rollouts

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, policy) -> torch.Tensor | None:
        """(N, T) log-probs of this rank's sampled tokens, 0 elsewhere; None without rows."""
        out = None
        for numbers, _, pack in self.microbatches(rollouts, sum(rollouts.plan, [])):
            values = policy(pack)[0].cpu()
            if numbers:
                out = values.new_zeros(rollouts.tokens.shape) if out is None else out
                out[numbers, : values.shape[1]] = values
        reshard(policy)
        return out

    def step(self, rollouts: Rollouts, loss_fn, divisor=None) -> dict[str, float]:
        """The optimizer steps of a gathered batch: one for each of its mini-batches, times
        `epochs_per_batch`. Returns metrics, equal on every trainer.

        `loss_fn(logprobs, rows, cfg)` returns sums; `divisor(table, cfg)` is the number they are
        divided by, from the small columns of the whole mini-batch (default: its sampled tokens).
        Metrics take the same road and are means per sampled token.
        """
        if not self.world.trains:
            return {}
        with self.world.span("train"):
            cfg, sums, norms, divisor = self.cfg, {}, [], divisor or sampled_tokens
            epochs = getattr(cfg, "epochs_per_batch", 1)
            for mini, plan in list(enumerate(rollouts.plan)) * epochs:
                table = rollouts.all.take((rollouts.all.minibatch == mini).nonzero().flatten())
                count = divisor(table, cfg)
                for i, (_, rows, pack) in enumerate(self.microbatches(rollouts, plan)):
                    if self.world.num_trainers == 1:  # gradients add up where they are made
                        self.policy.set_requires_gradient_sync(i == len(plan) - 1)
                        self.policy.set_reshard_after_backward(i == len(plan) - 1)
                    logprobs, entropy = self.policy(pack)
                    loss, parts = loss_fn(logprobs, rows, cfg)
                    (loss / count).backward()
                    parts |= {"entropy": (entropy * rows.weight[:, None]).sum()}
                    parts |= {"tokens": (rows.mask * rows.weight[:, None]).sum()}
                    parts |= {"loss_sum": loss / count}
                    for name, value in parts.items():
                        value = value.detach().double()
                        add = torch.maximum if name.endswith("_max") else torch.add
                        sums[name] = add(sums[name], value) if name in sums else value
                # Without a token that counts nothing moves: not by momentum either.
                if sampled_tokens(table):
                    norms.append(self.update())
                self.optimizer.zero_grad(set_to_none=True)
            self.version += 1
            metrics = self.reduce(sums)
            metrics["tokens"] /= epochs
            metrics["loss"] = metrics.pop("loss_sum") / (epochs * len(rollouts.plan))
            metrics["grad_norm"] = sum(norms) / max(len(norms), 1)
            tokens = sampled_tokens(rollouts.all)
            assert metrics["tokens"] == tokens, (metrics["tokens"], tokens)  # each exactly once
            return metrics

    @torch.no_grad()
    def evaluate(self, rollouts: Rollouts, loss_fn) -> float:
        """Mean loss per sampled token of a gathered table. Collective over trainers."""
        total = torch.zeros((), device=self.world.device, dtype=torch.float64)
        for _, rows, pack in self.microbatches(rollouts, sum(rollouts.plan, [])):
            total += loss_fn(self.policy(pack)[0], rows, self.cfg)[0]
        reshard(self.policy)
        dist.all_reduce(total, group=self.world.trainers)
        return float(total) / sampled_tokens(rollouts.all)

    def reduce(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """This rank's sums -> means per sampled token over all trainers. Names in `_max` are
        maxima, in `_sum` and `_histogram` sums.
        """
        sums = dict(sorted(sums.items()))  # one order on every rank
        values = torch.cat([v.flatten() for v in sums.values()]).to(self.world.device)
        total, top = values.clone(), values.clone()
        dist.all_reduce(total, group=self.world.trainers)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.world.trainers)
        sizes = [v.numel() for v in sums.values()]
        out = {}
        for name, sum_, max_ in zip(sums, total.cpu().split(sizes), top.cpu().split(sizes)):
            value = (max_ if name.endswith("_max") else sum_).tolist()
            out[name] = value if name.endswith("_histogram") else value[0]
        tokens = max(out["tokens"], 1.0)
        whole = ("tokens", "_max", "_sum", "_histogram")
        return {k: v if k.endswith(whole) else v / tokens for k, v in out.items()}

    def update(self) -> float:
        """Clip to `max_grad_norm` and step. Returns the norm before the clip."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters], foreach=True)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.cfg.max_grad_norm > 0:
            clip_grads_with_norm_(parameters, self.cfg.max_grad_norm, norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.version, self.cfg)
        # Where this is 1 fused AdamW moves nothing: the host need not wait for the norm to go on.
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        if not norm.isfinite():  # the same on every trainer; the weights are still good
            raise FloatingPointError(f"the gradient's norm is {float(norm)}: see samples.jsonl")
        return float(norm)

    # ------------------------------------------------------------ checkpoints

    def state(self) -> dict:
        return {
            "policy": dict(self.policy.named_parameters()),
            "optimizer": get_optimizer_state_dict(self.policy, self.optimizer),
        }

    def save(self, folder: pathlib.Path):
        """Write folder/step-N, by a temporary name: it is complete or absent, and what stood there
        before goes last. Collective.
        """
        if not self.world.trains:
            return
        with self.world.span("save"):
            final = folder / f"step-{self.version}"
            partial = folder / f"partial-{self.version}"
            if self.world.writes:
                for left in folder.glob("partial-*"):  # by a save that failed
                    shutil.rmtree(left)
                partial.mkdir(parents=True)
            dist.barrier(group=self.world.trainers)
            dcp.save(self.state(), checkpoint_id=partial, process_group=self.world.trainers)
            if self.world.writes:
                (partial / "about.json").write_text(json.dumps({"step": self.version}))
                if final.exists():
                    final.rename(folder / f"partial-old-{self.version}")
                partial.rename(final)
                shutil.rmtree(folder / f"partial-old-{self.version}", ignore_errors=True)
            dist.barrier(group=self.world.trainers)

    def load(self, folder: pathlib.Path):
        """Weights, optimizer and step of a checkpoint of any number of trainers. Collective."""
        if not self.world.trains:
            return
        state = self.state()
        dcp.load(state, checkpoint_id=folder, process_group=self.world.trainers)
        set_optimizer_state_dict(self.policy, self.optimizer, state["optimizer"])
        for group in self.optimizer.param_groups:  # the settings of this run, not the saved ones
            group |= {"betas": (self.cfg.beta1, self.cfg.beta2)}
            group |= {"weight_decay": self.cfg.weight_decay}
        self.version = json.loads((folder / "about.json").read_text())["step"]


def reshard(policy):
    """What a forward without a backward leaves gathered would not see the next update."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sampled_tokens(table: Rollouts, cfg=None) -> float:
    """Tokens that count, from the small columns."""
    return float((table.sampled * table.weight).sum())


def nothing() -> Rollouts:
    """A row that counts for nothing: what a rank runs when its part of the plan is empty."""
    row = Rollouts.blank(1, 2)
    row.length, row.sampled, row.mask = row.length + 2, row.sampled + 2, ~row.mask
    row.ref_logprobs = row.logprobs
    return row
