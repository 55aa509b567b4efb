"""Advantages, losses and divisors a second time: slow and obvious. Plain numbers in plain loops.

The judge of losses.py in test_losses.py. No tensor, no vectorisation, and each gradient by its
formula. `rows` has the table's columns as (nested) lists of numbers; T varies from row to row only
in its mask.
"""

import math


def members(table, i: int) -> list[int]:
    """Rows of row i's group."""
    return [j for j in range(len(table.index)) if table.index[j] == table.index[i]]


def advantage(table, i: int, kind: str) -> float:
    """Of row i, from the rewards of its group."""
    rewards = [table.reward[j] for j in members(table, i)]
    if all(r == rewards[0] for r in rewards):
        return 0.0
    n, mean = len(rewards), math.fsum(rewards) / len(rewards)
    if kind == "mean":
        return table.reward[i] - mean
    if kind == "mean_std":
        variance = math.fsum((r - mean) ** 2 for r in rewards) / (n - 1)
        return (table.reward[i] - mean) / (math.sqrt(variance) + 1e-4)
    others = math.fsum(rewards) - table.reward[i]
    return table.reward[i] - others / (n - 1)


def share_over_divisor(table, i: int, cfg) -> float:
    """What one token of row i weighs in the mean that a mini-batch's loss is."""
    rows = [j for j in range(len(table.index)) if table.weight[j]]
    if i not in rows:
        return 0.0
    if cfg.aggregation == "token":  # mean over tokens
        return 1 / max(sum(table.sampled[j] for j in rows), 1)
    if cfg.aggregation == "sequence":  # mean over rows of the mean over the row's tokens
        return 1 / max(table.sampled[i], 1) / len(rows)
    if cfg.aggregation == "prompt":  # mean over groups of the mean over the group's tokens
        groups = {table.index[j] for j in rows}
        tokens = sum(table.sampled[j] for j in members(table, i) if table.weight[j])
        return 1 / max(tokens, 1) / len(groups)
    return 1 / (len(rows) * cfg.max_new_tokens)  # fixed


def clip(ratio: float, cfg) -> float:
    return min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)


def surrogate(ratio: float, a: float, cfg) -> tuple[float, float]:
    """-min(ratio A, clip(ratio) A), and its slope: by the log-prob, where ratio' = ratio."""
    if clip(ratio, cfg) * a < ratio * a:
        return -clip(ratio, cfg) * a, 0.0
    return -ratio * a, -ratio * a


def token_loss(name: str, logprob: float, ratio: float, a: float, cfg) -> tuple[float, float]:
    """Loss of one token with advantage `a`, and its slope by the token's log-prob."""
    if name == "cispo":
        return -clip(ratio, cfg) * a * logprob, -clip(ratio, cfg) * a
    if name == "reinforce":
        return -ratio * a * logprob, -ratio * a
    if name == "sapo":
        tau = cfg.sapo_tau_positive if a > 0 else cfg.sapo_tau_negative
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * ratio * a
    if name == "dapo" and a < 0 and ratio > cfg.dual_clip:
        return -cfg.dual_clip * a, 0.0
    return surrogate(ratio, a, cfg)  # grpo, dr_grpo, dapo, and gspo with the row's ratio


def penalty(logprob: float, other: float, kind: str) -> tuple[float, float]:
    """One token's estimate of KL(pi || other), and its slope by log pi."""
    d = other - logprob
    if kind == "k1":
        return -d, 1.0
    if kind == "k2":
        return d * d / 2, -d
    return math.exp(d) - 1 - d, 1 - math.exp(d)


def corrections(old: list[float], sampler: list[float], cfg) -> list[float]:
    """Weights of one row's tokens, from the log-probs of old policy and generator."""
    ratios = [math.exp(o - s) for o, s in zip(old, sampler)]
    if cfg.correction_level == "sequence":
        ratios = [math.exp(math.fsum(o - s for o, s in zip(old, sampler)))] * len(ratios)
    if cfg.correction == "truncate":
        return [min(r, cfg.correction_cap) for r in ratios]
    if cfg.correction == "mask":
        cap = cfg.correction_cap
        return [r if 1 / cap <= r <= cap else 0.0 for r in ratios]
    return [1.0] * len(ratios)


def loss(name: str, logprobs: list[list[float]], rows, cfg):
    """Sum over the rows, its gradient by `logprobs`, and how many tokens the clip holds (low,
    high, dual).
    """
    values, gradient, held = [], [[0.0] * len(row) for row in logprobs], [0, 0, 0]
    for i, row in enumerate(logprobs):
        at = [t for t in range(len(row)) if rows.mask[i][t]]
        sampler = [rows.logprobs[i][t] for t in at]
        old = sampler
        if cfg.old_policy == "trainer":
            old = [rows.old_logprobs[i][t] if rows.old_logprobs else row[t] for t in at]
        ratios = [math.exp(row[t] - o) for t, o in zip(at, old)]
        if name == "gspo" and at:
            log_ratios = [row[t] - o for t, o in zip(at, old)]
            ratios = [math.exp(math.fsum(log_ratios) / len(at))] * len(at)
        for t, ratio, weight in zip(at, ratios, corrections(old, sampler, cfg)):
            a = rows.advantage[i][t]
            value, slope = token_loss(name, row[t], ratio, a, cfg)
            value, slope = value * weight, slope * weight
            if cfg.kl_coef:
                estimate, its_slope = penalty(row[t], rows.ref_logprobs[i][t], cfg.kl)
                value, slope = value + cfg.kl_coef * estimate, slope + cfg.kl_coef * its_slope
            values.append(rows.share[i] * value)
            gradient[i][t] = rows.share[i] * slope
            if rows.weight[i]:
                whatever = name == "cispo"
                held[0] += ratio < 1 - cfg.clip_low and (a < 0 or whatever)
                held[1] += ratio > 1 + cfg.clip_high and (a > 0 or whatever)
                held[2] += ratio > cfg.dual_clip and a < 0
    return math.fsum(values), gradient, held
