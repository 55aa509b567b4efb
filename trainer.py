"""The trainer: micro-batches through the policy, one division, one clip, one optimizer step."""

import concurrent.futures
import json
import math
import os
import pathlib
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model import build_policy, pack_rows, send
from rollouts import Rollouts
from runtime import UserError


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up, then `lr_schedule` down to `lr_min_ratio` of the peak after the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    fall = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}
    return cfg.lr * (1 - (1 - cfg.lr_min_ratio) * fall[cfg.lr_schedule])


class Trainer:
    """Policy and optimizer, sharded over the trainer ranks; empty on ranks that only generate."""

    def __init__(self, cfg, world, tokenizer=None, frozen: dict[str, str] | None = None):
        """`frozen`: column -> model that writes it in `score`, without being trained."""
        self.cfg, self.world, self.tokenizer, self.version = cfg, world, tokenizer, 0
        if not world.trains:
            return
        self.skipped = 0  # updates in a row whose gradient was not finite
        self.background = concurrent.futures.ThreadPoolExecutor(1)
        self.policy = build_policy(cfg, world)
        self.frozen = {k: build_policy(cfg, world, path) for k, path in (frozen or {}).items()}
        how = {"betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay, "fused": True}
        self.trained = {k: p for k, p in self.policy.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), cfg.lr, **how)

    def microbatches(self, rollouts: Rollouts, plan: list[list[int]]):
        """(row numbers, rows, their Pack) by the plan, on the device. Each rank yields equally
        often, for FSDP's collectives: where its plan is empty, a row that counts for nothing."""
        for numbers in plan:
            self.world.lap()  # it moves
            rows, device = rollouts.take(numbers) if numbers else nothing(), self.world.device
            pack = pack_rows(rows.tokens, rows.length, rows.mask, device)
            yield numbers, Rollouts(**{k: send(v, device) for k, v in rows.columns().items()}), pack

    def score(self, rollouts: Rollouts) -> Rollouts:
        """Add the log-probs that the frozen models give to the sampled tokens, and those of the
        policy before the updates where the loss asks for them. Collective over trainers."""
        cfg = self.cfg
        if self.world.trains:
            with self.world.span("score"):
                for column, model in self.frozen.items():
                    setattr(rollouts, column, self.logprobs(rollouts, model))
                if cfg.old_policy == "trainer" and cfg.minibatches * cfg.epochs_per_batch > 1:
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

    def step(self, rollouts: Rollouts, loss_fn, divisor=None, meanwhile=None) -> dict:
        """The optimizer steps of a gathered batch: one for each of its mini-batches, times
        `epochs_per_batch`. `loss_fn(logprobs, rows, cfg)` returns sums; `divisor(table, cfg)` is
        what they are divided by, from a mini-batch's small columns (default: its sampled tokens).
        `meanwhile` is called once a GPU has its work. Returns means per token of all trainers."""
        if not self.world.trains:
            return {}
        with self.world.span("train"):
            cfg, sums, norms, divisor = self.cfg, {}, [], divisor or sampled_tokens
            # A loss may draw numbers: by a name, so that a resumed run draws the same.
            torch.manual_seed(hash((cfg.seed, self.version, self.world.trainer_index)))
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
                    weight = rows.weight[:, None]
                    parts |= {"entropy": (entropy * weight).sum(), "loss": loss / count}
                    parts |= {"tokens": (rows.mask * weight).sum()}
                    for k, value in parts.items():
                        value = value.detach().double()
                        add = {"_max": torch.maximum, "_min": torch.minimum}.get(k[-4:], torch.add)
                        sums[k] = add(sums[k], value) if k in sums else value
                # Without a token that counts nothing moves: not by momentum either.
                if sampled_tokens(table):
                    norms.append(self.update())
                self.optimizer.zero_grad(set_to_none=True)
            self.version += 1
            if meanwhile:
                meanwhile()
            metrics, moved = self.reduce(sums), self.finite(norms)
            metrics["skipped"] = len(norms) - len(moved)
            metrics["tokens"] /= epochs
            metrics["loss"] /= epochs * len(rollouts.plan)
            metrics["grad_norm"] = sum(moved) / max(len(moved), 1)
            assert metrics["tokens"] == sampled_tokens(rollouts.all), "each token exactly once"
            return metrics

    @torch.no_grad()
    def evaluate(self, tables: dict[str, Rollouts], loss_fn) -> dict[str, float]:
        """Mean loss per sampled token of gathered tables, and of each if several. Collective."""
        sums = torch.zeros(len(tables), device=self.world.device, dtype=torch.float64)
        with self.world.span("evaluate"):
            for i, rollouts in enumerate(tables.values()):
                for _, rows, pack in self.microbatches(rollouts, sum(rollouts.plan, [])):
                    sums[i] += loss_fn(self.policy(pack)[0], rows, self.cfg)[0]
            reshard(self.policy)
            dist.all_reduce(sums, group=self.world.trainers)
        sums, counts = sums.tolist(), [sampled_tokens(rollouts.all) for rollouts in tables.values()]
        each = {f"eval_loss/{k}": x / n for k, x, n in zip(tables, sums, counts) if len(sums) > 1}
        return {"eval_loss": sum(sums) / sum(counts), **each}

    def reduce(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums of a rank -> means per sampled token of all trainers; `_max`, `_min`: extremes."""
        sign = {k: -1 if k.endswith("_min") else 1 for k in sorted(sums)}  # ranks agree
        total = torch.stack([sums[k] * sign[k] for k in sign]).to(self.world.device)
        top = total.clone()
        dist.all_reduce(total, group=self.world.trainers)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.world.trainers)
        total, top = (dict(zip(sign, values.tolist())) for values in (total, top))
        ends, tokens = ("_max", "_min"), max(total["tokens"], 1.0)
        out = {k: top[k] * sign[k] if k.endswith(ends) else total[k] / tokens for k in sign}
        return {**out, **{k: total[k] for k in ("tokens", "loss") if k in total}}

    def update(self) -> torch.Tensor:
        """Clip, and step if the norm is finite. Returns the norm before the clip, as a tensor."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters], foreach=True).full_tensor()
        if self.cfg.max_grad_norm > 0:
            clip_grads_with_norm_(parameters, self.cfg.max_grad_norm, norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.version, self.cfg)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # fused AdamW asks the GPU for it
        self.optimizer.step()
        return norm

    def finite(self, norms: list[torch.Tensor]) -> list[float]:
        """Those that moved something. The run ends after `max_skipped` others in a row."""
        for norm in map(float, norms):  # the same on every trainer
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped > self.cfg.max_skipped:
                what = f"the gradient's norm is {norm}, {self.skipped} times in a row"
                raise FloatingPointError(f"{what}: see samples.jsonl")
        return [norm for norm in map(float, norms) if math.isfinite(norm)]

    def state(self) -> dict[str, torch.Tensor]:
        """All that training is, by name, but the counts of updates. Settings are no part."""
        state = {}
        for name, p in self.trained.items():
            own = self.optimizer.state[p]
            if not own:  # as AdamW itself begins
                zeros = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
                own |= {"step": torch.zeros((), device=p.device), **zeros}
            state[f"policy.{name}"] = p.detach()
            state |= {f"{k}.{name}": own[k].detach() for k in ("exp_avg", "exp_avg_sq")}
        return state

    def save(self, folder: pathlib.Path, finished=lambda: None):
        """Copy the state; a thread writes folder/step-N, then calls `finished`. Collective."""
        if not self.world.trains:
            return
        with self.world.span("save"):
            self.saved()  # the one before
            if self.world.writes:
                for left in folder.glob("partial-*"):  # by a save that failed
                    shutil.rmtree(left)
                (folder / f"partial-{self.version}").mkdir(parents=True)
            dist.barrier(group=self.world.trainers)
            i, n = self.world.trainer_index, len(self.world.shards[0])  # from n on: copies
            own, at, state = {}, {}, self.state()
            for name, x in state.items() if i < n else ():
                if len(part := x.to_local()):  # FSDP2 gives ceil(rows / n) to each, as they last
                    own[name] = part.to("cpu", copy=True)
                    at[name] = {"saved_offsets": [-len(x) // n * -i] + [0] * (x.dim() - 1)}
            updates = [int(self.optimizer.state[p]["step"]) for p in self.trained.values()]
            job = (own, at, {"step": self.version, "updates": updates}, folder, finished)
            self.world.write = self.background.submit(self.write, *job)

    def write(self, own: dict, at: dict, about: dict, folder: pathlib.Path, finished):
        """By a temporary name: complete or absent. In a thread, on a group of its own."""
        step, why, said = about["step"], "", [""] * self.world.num_trainers
        partial, old = folder / f"partial-{step}", folder / f"partial-old-{step}"
        file = partial / f"trainer{self.world.trainer_index}.safetensors"
        try:  # dcp.save would make the file in memory first, and hold up all other threads
            save_file(own, file, {"DCP_SHARDING_INFO": json.dumps(at)})
            with open(file, "rb") as written:
                os.fchmod(written.fileno(), 0o644), os.fsync(written.fileno())  # it makes 0o600
        except Exception as error:
            why = " ".join(str(error).split())
        dist.all_gather_object(said, why, group=self.world.savers)
        if any(said):
            shutil.rmtree(partial, ignore_errors=True)  # it may have filled the disk
            raise UserError(f"{folder}/step-{step} was not written: {max(said)}")
        if self.world.writes:
            files = {path.name: path.stat().st_size for path in partial.iterdir()}
            (partial / "about.json").write_text(json.dumps({**about, "files": files}))
            if (final := folder / f"step-{step}").exists():
                final.rename(old)
            partial.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            finished()

    def saved(self, wait: bool = True):
        """Raise what went wrong with the write in progress, when it has ended."""
        if self.world.write and (wait or not self.world.writing()):
            self.world.write.result()
            self.world.write = None

    def problem(self, folder: pathlib.Path) -> str:
        """Why a checkpoint cannot be loaded here; "" if it can. Sizes are compared, not bits."""
        try:
            sizes = json.loads((folder / "about.json").read_text())["files"]
            cut = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
            found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        except Exception as error:  # of many kinds: files are missing, empty, or not what they were
            return f"damaged ({type(error).__name__}: {str(error):.80})"
        if cut:
            return f"damaged ({cut[0]} is not {sizes[cut[0]]} bytes long)"
        ours = {(name, tuple(value.shape)) for name, value in self.state().items()}
        differ = sorted(ours ^ {(name, tuple(m.size)) for name, m in found.items()})
        return f"of another model (see {differ[0][0]})" if differ else ""

    def load(self, folder: pathlib.Path):
        """Weights, optimizer and step of a checkpoint of any number of trainers. Collective."""
        if not self.world.trains:
            return
        source, about = dcp.HuggingFaceStorageReader(str(folder)), folder / "about.json"
        dcp.load(self.state(), storage_reader=source, process_group=self.world.trainers)
        about = json.loads(about.read_text())
        for p, count in zip(self.trained.values(), about["updates"]):
            self.optimizer.state[p]["step"].fill_(count)
        self.version = about["step"]


def reshard(policy):
    """What a forward without a backward leaves gathered would not see the next update."""
    for module in (m for m in policy.modules() if isinstance(m, FSDPModule)):
        module.reshard()


def sampled_tokens(table: Rollouts, cfg=None) -> float:
    """Tokens of the rows that are computed, from the small columns."""
    return float((table.sampled * (table.share > 0)).sum())


def nothing() -> Rollouts:
    """A row that counts for nothing: what a rank runs when its part of the plan is empty."""
    row = Rollouts.blank(1, 2)
    row.length, row.sampled, row.mask = row.length + 2, row.sampled + 2, ~row.mask
    row.ref_logprobs = row.teacher_logprobs = row.logprobs
    return row
