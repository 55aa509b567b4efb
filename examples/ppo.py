"""PPO: a value model says what to expect, and each token is pushed by how it turned out (GAE).

grpo.py with another baseline. The value model is a copy of the policy with one number as its head,
and a Trainer trains it as another trains the policy. Left out on purpose: a KL in the reward
(kl_coef is in the loss, as in grpo.py), layers that both models share.

    torchrun --nproc_per_node=3 examples/ppo.py                  # the embedded default: CPU, 90 s
    torchrun --nproc_per_node=3 examples/ppo.py --gae_lambda=1 --epochs_per_batch=2
"""

import dataclasses
import pathlib
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import heartbeat

heartbeat.start(__name__)

import grpo
import losses
import report
import weights
from generator import Generator
from model import build_policy
from rollouts import gather
from runtime import UserError, launch, limits
from tasks import load_task
from trainer import Trainer


@dataclass
class Config(grpo.Config):
    """PPO with a value model, on grpo.py's settings. --key=value overrides --config file.yaml."""

    run_dir: str = "runs/ppo"  # this run's own folder
    prompts_per_step: int = 128  # prompts in a batch; at least 1
    group_size: int = (
        1  # replies to each prompt; the baseline is the value model, not the group; at least 1
    )
    minibatches: int = 2  # optimizer steps that a batch is split into, by prompts; at least 1
    gamma: float = 1.0  # discount of a sampled token; at most 1
    gae_lambda: float = 0.95  # 1: reward less value; 0: the difference of two values; at most 1
    clip_low: float = 0.2  # the ratio's clip is [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # one number in PPO's paper
    clip_value: float = 0.2  # how far a batch may move a value; above 0
    value_lr: float = 1e-3  # peak learning rate of the value model


# What grpo.py compares in a group, or chooses from; PPO has one reply and one loss.
FIXED = {"loss": "grpo", "advantage": "auto", "teacher": "", "max_refills": 0}
FIXED |= {"equal_rewards": "train"}


def check(cfg: Config, world):
    """grpo.py's rules but for the group's, and PPO's own."""
    if other := [name for name, value in FIXED.items() if getattr(cfg, name) != value]:
        raise UserError(
            f"{other[0]}={getattr(cfg, other[0])}: PPO has one loss, no groups and no teacher"
        )
    as_grpo = dataclasses.replace(cfg, group_size=max(cfg.group_size, 2))
    grpo.check(as_grpo, world)
    cfg.model, cfg.aggregation = as_grpo.model, as_grpo.aggregation
    limits(cfg)


# ---------------------------------------------------------------- pure functions of tensors


def gae(reward, values, mask, gamma: float, lam: float) -> torch.Tensor:
    """Rewards (N,), values (N, T), mask (N, T) bool -> (N, T) advantages, 0 where mask is False.

    Generalised advantage estimation (arXiv 1506.02438, eq. 16): a sum of the differences r + gamma
    V(next) - V, each weighing gamma * lam times the one before. Next is the next *sampled* token:
    prompt and environment are not the policy's doing. The reward comes with the last sampled
    token, after which there is no state (its value is 0), also where the reply was cut off.
    """
    advantage, sampled = torch.zeros_like(values), mask.to(values.dtype)
    due, value, later = reward.to(values.dtype), values.new_zeros(len(values)), 0.0  # (N,) each
    for t in reversed(range(values.shape[1])):
        here = sampled[:, t]
        now = due + gamma * value - values[:, t] + gamma * lam * later
        advantage[:, t] = here * now
        due = (1 - here) * due
        value = torch.where(mask[:, t], values[:, t], value)
        later = torch.where(mask[:, t], now, later)
    return advantage


def value_loss(values, rows, cfg):
    """Half the squared error (B, T) to the returns, summed; the larger one of the value and of the
    value held within `clip_value` of what it was before the batch: PPO's clip for a critic, of its
    authors' code (openai/baselines, ppo2), not of its paper.
    """
    held = rows.values + (values - rows.values).clamp(-cfg.clip_value, cfg.clip_value)
    far, near = (values - rows.returns) ** 2, (held - rows.returns) ** 2
    clipped = ((near > far) & (rows.mask & (rows.weight[:, None] > 0))).sum()
    return (0.5 * torch.maximum(far, near) * rows.mask * rows.share[:, None]).sum(), {
        "clip_value": clipped
    }


# ---------------------------------------------------------------- the value model


class ValueModel(nn.Module):
    """The body of a language model with one number as its head: the reward to expect from there."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.body, self.head = lm.model, nn.Linear(lm.config.hidden_size, 1, dtype=lm.dtype)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, pack):
        """Values of the wanted tokens, and zeros where a policy has its entropy: (B, T) each.

        Column t has the value of the state in which token t was chosen: of all before it.
        """
        hidden = self.body(
            input_ids=pack.tokens,
            position_ids=pack.positions,
            attention_mask=pack.tokens.new_zeros(1, 1, 1, 1),  # see model.unsupported
            use_cache=False,
            pack=pack,
        ).last_hidden_state.flatten(0, 1)
        values = self.head(hidden.index_select(0, pack.wanted - 1))[:, 0]
        out = values.new_zeros((len(pack.starts) - 1) * pack.longest)
        out = out.index_copy(0, pack.slot[pack.wanted], values).view(-1, pack.longest)
        out = out[: pack.shape[0], : pack.shape[1]]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return out, torch.zeros_like(out)


class Critic(Trainer):
    """The value model and its optimizer; `step` is the Trainer's, with the loss above."""

    def __init__(self, cfg, world):
        self.cfg, self.world, self.version = dataclasses.replace(cfg, lr=cfg.value_lr), world, 0
        if world.trains:
            self.skipped, self.policy = 0, build_policy(cfg, world, head=ValueModel)
            how = {"betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay}
            self.trained = dict(self.policy.named_parameters())
            parameters = self.trained.values()
            self.optimizer = torch.optim.AdamW(parameters, lr=cfg.value_lr, fused=True, **how)

    def judge(self, rollouts):
        """Write the column `advantage`: GAE by the present values, whitened over the sampled tokens
        of the whole batch. Keeps what `learn` needs. Collective over trainers.
        """
        if not self.world.trains:
            return rollouts
        with self.world.span("score"):
            self.columns = {}
            mask, values = rollouts.mask, self.logprobs(rollouts, self.policy)
            if values is None:  # this trainer has no rows of the batch
                mask, values = torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, 1)
            advantage = gae(rollouts.reward, values, mask, self.cfg.gamma, self.cfg.gae_lambda)
            returns = (advantage + values) * mask
            self.columns = {"values": values, "returns": returns}
            count, mean, variance = self.moments(advantage, mask)
            rollouts.advantage = (advantage - mean) / (variance.sqrt() + 1e-8) * mask
            _, self.value, spread = self.moments(returns, mask)
            self.explained = 1 - float(variance / spread.clamp(min=1e-8))
        return rollouts

    def moments(self, column, mask):
        """Count, mean and variance of a column's sampled tokens, over all trainers."""
        x = column.double()[mask]
        sums = torch.stack([x.new_tensor(len(x)), x.sum(), (x**2).sum()]).to(self.world.device)
        dist.all_reduce(sums, group=self.world.trainers)
        count, mean, square = (sums / sums[0].clamp(min=1)).cpu()
        return count, mean, (square - mean**2).clamp(min=0)

    def microbatches(self, rollouts, plan):
        """With two columns that only this file knows: `values` before the batch, and `returns`."""
        for numbers, rows, pack in super().microbatches(rollouts, plan):
            for name, column in self.columns.items():
                cut = column[numbers, : rows.tokens.shape[1]] if numbers else torch.zeros(1, 2)
                setattr(rows, name, cut.to(self.world.device))
            yield numbers, rows, pack

    def learn(self, rollouts) -> dict[str, float]:
        """The batch's updates of the value model. Returns its metrics."""
        if not self.world.trains:
            return {}
        found = self.step(rollouts, value_loss, losses.divisor)
        out = {"value_loss": found["loss"], "value_grad_norm": found["grad_norm"]}
        out |= {"clip_value": found["clip_value"], "returns": float(self.value)}
        return {**out, "explained_variance": self.explained}


class Actor(Trainer):
    """The policy, whose checkpoints hold the value model too."""

    critic: Critic

    def state(self) -> dict[str, torch.Tensor]:
        other = self.critic.state().items()
        return super().state() | {f"value.{k}": v for k, v in other if "random." not in k}

    def load(self, folder: pathlib.Path):
        super().load(folder)
        if self.world.trains:
            self.critic.version, steps = self.version, self.optimizer.state.values()
            for p in self.critic.trained.values():  # both have made the same updates
                self.critic.optimizer.state[p]["step"].copy_(next(iter(steps))["step"])


def main(cfg: Config, world, run):
    """The loop. Every rank runs every line; one that has no part in a line passes through it."""
    task, loss = load_task(cfg), losses.policy_loss(losses.grpo)  # PPO's clip is GRPO's
    tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
    trainer = Actor(cfg, world, tokenizer, grpo.frozen_models(cfg))
    critic = Critic(cfg, world)
    trainer.critic = critic
    start = run.resume(trainer)
    generator = Generator(cfg, world, task, tokenizer, version=start)

    for step in range(start, cfg.steps):
        weights.sync(trainer, generator, world)  # version = step; rows in flight go on
        rollouts = generator.collect(step)  # until batch `step` is complete, rewards included
        rollouts.weight = losses.row_weights(rollouts, cfg)
        rollouts.share = losses.shares(rollouts, cfg)
        rollouts = gather(rollouts, world, cfg.tokens_per_microbatch, cfg.minibatches)
        if rollouts.stop:
            return run.stopped(trainer, step, rollouts)
        rollouts = trainer.score(rollouts)  # log-probs of the reference, where asked for
        rollouts = critic.judge(rollouts)  # values, and advantages from them
        metrics = report.derived(trainer.step(rollouts, loss, losses.divisor))
        metrics |= critic.learn(rollouts)
        run.log(step, {**report.table_metrics(rollouts), **metrics}, rollouts)
        run.save(trainer, step + 1)
    weights.sync(trainer, generator, world)  # the last evaluation and the export are one version
    run.log(cfg.steps, {}, gather(generator.finish(), world, cfg.tokens_per_microbatch))
    weights.export(trainer, run.folder / "model", world)


if __name__ == "__main__":
    launch(main, Config, check)
