"""Advantages, policy losses and their divisors: pure functions of tensors. A loss is
`loss(logprobs (B, T), rows, cfg) -> (sum, {name: sum})`, over the tokens it was given; the trainer
divides once, by `divisor` of the whole mini-batch, so no split into micro-batches or ranks changes
the gradient. A token counts by its row's `share`: `shares` and `divisor` are the aggregation."""

import math

import torch


def group_advantages(rollouts, kind: str = "mean_std") -> torch.Tensor:
    """Rewards -> (N, T) advantages: a turn's number stands on each of its sampled tokens. It is the
    turn's return r against those of the group at the same turn, where an episode that is over
    stands with what its last turn earned; so with one reward, at discount 1, a row has one number.
    mean: r - mean of its group (Dr.GRPO, arXiv 2503.20783, section 3.2). mean_std: (r - mean) /
    (std + 1e-4), std unbiased (GRPO, arXiv 2402.03300, section 4.1.2). leave_one_out: r - mean of
    the others (RLOO, arXiv 2402.14740). A group of one, and one of equal rewards: exactly 0."""
    _, group = torch.unique(rollouts.index, return_inverse=True)  # (N,) number of the row's group
    # In float64 the sum of equal float32 numbers is exact, so their mean is, and the difference 0.
    reward = rollouts.returns.double()  # (N, K)
    size = torch.bincount(group).double()[:, None]  # (groups, 1)
    total = lambda x: x.new_zeros(len(size), x.shape[1]).index_add(0, group, x)  # noqa: E731
    centred = reward - (total(reward) / size)[group]
    if kind == "mean_std":
        variance = total(centred**2) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[group] + 1e-4)
    if kind == "leave_one_out":
        centred = centred * (size / (size - 1).clamp(min=1))[group]
    return centred.float().gather(1, rollouts.turns) * rollouts.mask  # (N, T)


def row_weights(rollouts, cfg) -> torch.Tensor:
    """(N,) 0 or 1: whether a row counts, in loss and divisors. overlong=mask: not if it was cut off
    (DAPO, arXiv 2503.14476, section 3.4); equal_rewards=mask: not in groups that teach nothing."""
    weight = torch.ones(len(rollouts))
    if cfg.overlong == "mask":
        weight[~rollouts.finished] = 0.0
    if cfg.equal_rewards == "mask":
        _, group = torch.unique(rollouts.index, return_inverse=True)
        weight[torch.bincount(group, rollouts.advantage.any(1).double())[group] == 0] = 0.0
    return weight


def shares(rollouts, cfg) -> torch.Tensor:
    """(N,) what each sampled token of a row counts in the loss's sum. token and fixed: 1. sequence:
    1 / tokens of the row. prompt: 1 / tokens of its group. 0: the row is not computed, for its
    weight is 0, or its advantage, where that is all there is to the loss (equal_rewards=skip)."""
    count = rollouts.sampled * rollouts.weight.double()  # (N,) tokens
    if cfg.aggregation == "prompt":
        _, group = torch.unique(rollouts.index, return_inverse=True)
        count = torch.bincount(group, count)[group]
    if cfg.aggregation in ("token", "fixed"):
        count = torch.ones_like(count)
    skip = cfg.equal_rewards == "skip" and not (cfg.kl_coef or cfg.teacher)
    taught = rollouts.advantage.any(1) if skip else 1
    return (rollouts.weight * taught / count.clamp(min=1)).float()


def divisor(table, cfg) -> float:
    """What the sum of a mini-batch's loss is divided by, from the small columns of all its rows.
    token: sampled tokens (DAPO, eq. 8). sequence: rows (GRPO, eq. 3), whose tokens weigh less in a
    long reply. prompt: groups. fixed: rows x max_new_tokens (Dr.GRPO, 3.2). Of weight 1 alone."""
    counts = {
        "token": (table.sampled * table.weight).sum(),
        "sequence": table.weight.sum(),
        "prompt": len(table.index[table.weight > 0].unique()),
        "fixed": table.weight.sum() * cfg.max_new_tokens,
    }
    return max(float(counts[cfg.aggregation]), 1.0)


def old_logprobs(logprobs, rows, cfg) -> torch.Tensor:
    """(B, T) log-probs of the old policy: the generator's, or the trainer's at the batch's start
    (decoupled PPO, arXiv 2110.00641, 2505.24298): the present ones in a batch's only update."""
    if cfg.old_policy == "generator":
        return rows.logprobs
    return logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs


def log_ratio(logprobs, rows, cfg) -> torch.Tensor:
    """(B, T) log(pi / pi_old), 0 where nothing was sampled."""
    return ((logprobs - old_logprobs(logprobs, rows, cfg)) * rows.mask).clamp(-20, 20)


def correction(logprobs, rows, cfg) -> torch.Tensor:
    """(B, T) weights pi_old / pi_generator, without gradient: what the sampler did otherwise.
    truncate: at most `correction_cap` (TIS, Yao et al. 2025). mask: 0 outside [1 / cap, cap] (MIS;
    IcePop, arXiv 2510.18855). Per sequence the ratio is the product over the row's tokens."""
    if cfg.correction == "none":
        return logprobs.new_ones(())
    difference = (old_logprobs(logprobs.detach(), rows, cfg) - rows.logprobs) * rows.mask
    if cfg.correction_level == "sequence":
        difference = difference.sum(1, keepdim=True).expand_as(difference)
    ratio, cap = difference.clamp(-20, 20).exp(), cfg.correction_cap
    kept = difference.abs() <= math.log(cap)
    return ratio.clamp(max=cap) if cfg.correction == "truncate" else ratio * kept


def total(values, logprobs, rows, cfg) -> torch.Tensor:
    """Sum of per-token losses (B, T), each by its row's share and its correction."""
    weight = rows.mask * rows.share[:, None] * correction(logprobs, rows, cfg)
    return (values * weight).sum()


def surrogate(ratio, rows, cfg) -> torch.Tensor:
    """(B, T) -min(ratio A, clip(ratio, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347, eq. 7)."""
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return -torch.minimum(ratio * rows.advantage, clipped * rows.advantage)


def grpo(logprobs: torch.Tensor, rows, cfg) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate of ratio = pi / pi_old (GRPO, arXiv 2402.03300, eq. 3). By default
    the generator is the old policy, so a token a version old has a true ratio."""
    ratio = log_ratio(logprobs, rows, cfg).exp()
    return total(surrogate(ratio, rows, cfg), logprobs, rows, cfg), clip_fractions(ratio, rows, cfg)


def dapo(logprobs, rows, cfg):
    """GRPO, where clip_high > clip_low gives rare tokens room (arXiv 2503.14476, eq. 8), and a
    negative advantage has a floor at `dual_clip` x A (dual-clip PPO, arXiv 1912.09729)."""
    ratio = log_ratio(logprobs, rows, cfg).exp()
    values = surrogate(ratio, rows, cfg)
    most = torch.minimum(values, -cfg.dual_clip * rows.advantage)
    values = torch.where(rows.advantage < 0, most, values)
    dual = ((ratio > cfg.dual_clip) & (rows.advantage < 0)) * rows.mask * rows.weight[:, None]
    sums = {**clip_fractions(ratio, rows, cfg), "clip_dual": dual.sum()}
    return total(values, logprobs, rows, cfg), sums


def cispo(logprobs, rows, cfg):
    """-sg(clip(ratio, 1 - low, 1 + high)) A log pi: the weight is clipped, so that no token loses
    its gradient (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5)."""
    ratio = log_ratio(logprobs, rows, cfg).exp().detach()
    values = -ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * rows.advantage * logprobs
    return total(values, logprobs, rows, cfg), clip_fractions(ratio, rows, cfg, both=True)


def gspo(logprobs, rows, cfg):
    """GRPO's clip on the ratio of the whole reply, s = exp(mean over its tokens of log ratio), in
    the form with a gradient per token (arXiv 2507.18071, eq. 5, 7 and 13). The clip is narrow: the
    rounding of two bf16 programs passes it on short replies, but with --old_policy=trainer."""
    tokens = rows.mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    mean = log_ratio(logprobs, rows, cfg).sum(1, keepdim=True) / tokens
    own = logprobs - logprobs.detach()  # (B, T) exact zeros, with the gradient of log pi
    ratio = (mean.detach() + own).exp()  # (B, T) s
    return total(surrogate(ratio, rows, cfg), logprobs, rows, cfg), clip_fractions(ratio, rows, cfg)


def sapo(logprobs, rows, cfg):
    """-(4 / tau) sigmoid(tau (ratio - 1)) A: a soft gate in place of the clip, whose gradient is
    GRPO's at ratio 1 and fades on both sides; tau is larger for A < 0 (arXiv 2511.20347)."""
    ratio = log_ratio(logprobs, rows, cfg).exp()
    tau = torch.where(rows.advantage > 0, cfg.sapo_tau_positive, cfg.sapo_tau_negative)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return total(-gate * rows.advantage, logprobs, rows, cfg), {}


def reinforce(logprobs, rows, cfg):
    """-sg(ratio) A log pi: REINFORCE (Williams 1992), weighted, unclipped; gradient of -ratio A."""
    ratio = log_ratio(logprobs, rows, cfg).exp().detach()
    return total(-ratio * rows.advantage * logprobs, logprobs, rows, cfg), {}


# dr_grpo: GRPO with a fixed divisor and no std, as `auto` says below (arXiv 2503.20783, 3.2).
LOSSES = {f.__name__: f for f in (grpo, dapo, cispo, gspo, sapo, reinforce)} | {"dr_grpo": grpo}
# What `auto` (of the clip: -1) means: GRPO's, with DAPO's `token`, but for what a loss names.
OWN = {
    "grpo": {"aggregation": "token", "advantage": "mean_std", "clip_low": 0.2, "clip_high": 0.28},
    "dr_grpo": {"aggregation": "fixed", "advantage": "mean", "clip_high": 0.2},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
    "gspo": {"aggregation": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "sapo": {"aggregation": "sequence"},
    "reinforce": {"advantage": "leave_one_out"},
}


def kl(logprobs: torch.Tensor, other: torch.Tensor, kind: str = "k3") -> torch.Tensor:
    """(B, T) estimates of KL(pi || other) from tokens that pi sampled (Schulman, "Approximating KL
    divergence", 2020), with d = log other - log pi. Tokens of an older policy are not reweighted.
    k1 = -d: unbiased, but as a loss of gradient 0 on average. k2 = d^2 / 2: biased, its gradient
    the KL's. k3 = exp(d) - 1 - d: never negative, unbiased, of the KL's gradient to first order."""
    d = (other - logprobs).clamp(-20, 20)
    return {"k1": -d, "k2": d * d / 2, "k3": d.expm1() - d}[kind]


def clip_fractions(ratio, rows, cfg, both: bool = False) -> dict[str, torch.Tensor]:
    """Tokens outside the clip whose gradient it removed: below with A < 0, above with A > 0. With
    `both` the sign does not matter (CISPO caps, whatever the advantage)."""
    low = (ratio < 1 - cfg.clip_low) & ((rows.advantage < 0) | both)
    high = (ratio > 1 + cfg.clip_high) & ((rows.advantage > 0) | both)
    keep = rows.mask * rows.weight[:, None]
    return {"clip_low": (low * keep).sum(), "clip_high": (high * keep).sum()}


def figures(logprobs: torch.Tensor, rows, cfg) -> dict[str, torch.Tensor]:
    """What every policy loss reports, as sums over tokens; `_max` are maxima. Mismatch:
    KL(generator || trainer) by k3, the trainer before the batch's updates where that was kept."""
    keep = rows.mask * rows.weight[:, None]  # (B, T) 1 where a token counts
    age = ((rows.index[:, None] >> 32) - rows.version) * keep  # in steps, sampling to training
    trainer = logprobs if rows.old_logprobs is None else rows.old_logprobs
    d = (trainer - rows.logprobs).double() * keep
    weight = d.clamp(-20, 20).exp() * keep  # pi_trainer / pi_generator
    ratio = log_ratio(logprobs, rows, cfg).exp() * keep
    out = {"policy_age": age.sum(), "policy_age_max": age.max()}
    out |= {"ratio": ratio.sum(), "ratio_max": ratio.max()}
    out |= {"mismatch_kl": (d.clamp(-20, 20).expm1() - d).sum(), "mismatch_abs": d.abs().sum()}
    out |= {"mismatch_max": d.abs().max(), "ess": weight.sum(), "ess_squares": (weight**2).sum()}
    # By the settings, not by the columns: every rank adds up the same names, rows or not.
    if cfg.kl_coef:
        out["kl_ref"] = (kl(logprobs, rows.ref_logprobs) * keep).sum()
    if cfg.old_policy == "trainer":
        out["kl_old"] = (kl(logprobs, old_logprobs(logprobs, rows, cfg)) * keep).sum()
    return out


def policy_loss(loss):
    """A loss with what goes with it: the KL to the reference (here, and in no reward), figures."""

    def whole(logprobs, rows, cfg):
        value, sums = loss(logprobs, rows, cfg)
        if cfg.kl_coef:
            penalty = kl(logprobs, rows.ref_logprobs, cfg.kl) * rows.mask * rows.share[:, None]
            value = value + cfg.kl_coef * penalty.sum()
        with torch.no_grad():
            return value, {**figures(logprobs.detach(), rows, cfg), **sums}

    return whole
