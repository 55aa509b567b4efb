"""Advantages, policy losses and their divisors: pure functions of tensors. No model, no rank, no
collective.

A loss is `loss(logprobs (B, T), rows, cfg) -> (sum, {name: sum})`. It returns sums over the tokens
it was given; the trainer divides once, by `divisor` of the whole batch. So no split into
micro-batches or ranks changes the gradient.
"""

import torch


def group_advantages(rollouts, kind: str = "mean_std") -> torch.Tensor | None:
    """(N,) rewards -> (N, T) advantages: a row's number stands on each token that the policy
    sampled.

    mean: r - mean of its group (Dr.GRPO, arXiv 2503.20783, section 3.2). mean_std: (r - mean) /
    (std + 1e-4), std unbiased (GRPO, arXiv 2402.03300, section 4.1.2). A group of one, and a group
    of equal rewards, have advantage exactly 0.
    """
    if not len(rollouts):  # a rank without an engine
        return None
    _, group = torch.unique(rollouts.index, return_inverse=True)  # (N,) number of the row's group
    # In float64 the sum of equal float32 numbers is exact, so their mean is, and the difference 0.
    reward = rollouts.reward.double()
    size = torch.bincount(group).double()  # (groups,)
    centred = reward - (torch.bincount(group, reward) / size)[group]
    if kind == "mean_std":
        variance = torch.bincount(group, centred**2) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[group] + 1e-4)
    return centred.float()[:, None] * rollouts.mask  # (N, T)


def equal_groups(table) -> torch.Tensor:
    """(groups,) bool, by ascending index: whether all rewards of the group are equal."""
    _, group = torch.unique(table.index, return_inverse=True)
    extreme = table.reward.new_zeros(int(group.max()) + 1)
    low, high = (
        extreme.scatter_reduce(0, group, table.reward, kind, include_self=False)
        for kind in ("amin", "amax")
    )
    return low == high


def divisor(table, cfg) -> float:
    """What the sum of a batch's loss is divided by, from the whole table's small columns (rows of
    weight 0 left out).

    token: sampled tokens (DAPO, arXiv 2503.14476, eq. 8). fixed: rows x max_new_tokens (Dr.GRPO,
    section 3.2).
    """
    rows = table.weight.sum()
    count = {"token": (table.sampled * table.weight).sum(), "fixed": rows * cfg.max_new_tokens}[
        cfg.aggregation
    ]
    return max(float(count), 1.0)


def grpo(logprobs: torch.Tensor, rows, cfg) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = pi / pi_generator (PPO, arXiv
    1707.06347, eq. 7).

    The generator's own log-probs are the old policy, so a token that is a version old has a true
    ratio.
    """
    keep = rows.mask * rows.weight[:, None]  # (B, T) 1 where a token counts
    log_ratio = (logprobs - rows.logprobs) * keep
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = -torch.minimum(ratio * rows.advantage, clipped * rows.advantage) * keep
    return loss.sum(), {
        "ratio": (ratio * keep).sum(),
        **clip_fractions(ratio, rows.advantage, keep, cfg),
    }


def clip_fractions(ratio, advantage, keep, cfg) -> dict[str, torch.Tensor]:
    """Tokens whose gradient the clip removed, below (A < 0) and above (A > 0)."""
    low = (ratio < 1 - cfg.clip_low) & (advantage < 0)
    high = (ratio > 1 + cfg.clip_high) & (advantage > 0)
    return {"clip_low": (low * keep).sum(), "clip_high": (high * keep).sum()}


def mismatch(logprobs: torch.Tensor, rows) -> dict[str, torch.Tensor]:
    """How far the trainer's policy is from the one that sampled: k3 estimate of KL(generator ||
    trainer), as a sum.

    k3 = exp(d) - 1 - d with d = log pi_trainer - log pi_generator (Schulman, "Approximating KL
    divergence", 2020).
    """
    keep = rows.mask * rows.weight[:, None]
    d = (logprobs - rows.logprobs).double() * keep
    return {
        "mismatch_kl": (d.clamp(-20, 20).expm1() - d).sum(),
        "mismatch_abs": d.abs().sum(),
        "mismatch_max": d.abs().max(),
    }


LOSSES = {"grpo": grpo}


def with_diagnostics(loss):
    """A policy loss that also reports what every policy loss should: age and mismatch."""

    def loss_and_figures(logprobs, rows, cfg):
        total, sums = loss(logprobs, rows, cfg)
        with torch.no_grad():
            keep = rows.mask * rows.weight[:, None]
            age = ((rows.index[:, None] >> 32) - rows.version) * keep  # in steps, sampling to now
            sums |= {"policy_age": age.sum(), "policy_age_max": age.max()}
            return total, {**sums, **mismatch(logprobs, rows)}

    return loss_and_figures
