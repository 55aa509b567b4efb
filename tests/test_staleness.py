"""Stale data on purpose: tokens of one policy train another. The ratio leaves 1, and the loss's
correction turns the gradient back to the on-policy one.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, lines, run
from transformers import AutoModelForCausalLM

import grpo
import losses
import report
from model import Policy, pack_rows
from rollouts import Rollouts

ROWS, PROMPT = 6000, [1, 5, 9]


@pytest.fixture(scope="module")
def policies(tiny):
    """(the one that samples, the one that is trained): the same model, and after some updates."""
    old, new = (
        Policy(
            AutoModelForCausalLM.from_pretrained(tiny("llama"), attn_implementation="packed"), 1, 0
        )
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in new.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return old, new


def sample(policy, rows: int = ROWS) -> Rollouts:
    """One-token replies to one prompt, in groups of 8, with rewards that depend on the token."""
    n, t = rows, len(PROMPT) + 1
    mask = torch.zeros(n, t, dtype=torch.bool)
    mask[:, -1] = True
    with torch.no_grad():
        hidden = policy.lm(torch.tensor([PROMPT]), pack=one_row(t - 1)).logits[0, -1]
    logp = hidden.log_softmax(-1)
    token = torch.multinomial(logp.exp(), n, True, generator=torch.Generator().manual_seed(7))
    return Rollouts(
        index=torch.arange(n) // 8,
        reply=torch.arange(n) % 8,
        length=torch.full((n,), t),
        sampled=mask.sum(1),
        weight=torch.ones(n),
        share=torch.ones(n),
        reward=(token % 5).float(),
        returns=(token % 5).float()[:, None],
        turns=torch.zeros(n, t, dtype=torch.long),
        tokens=torch.cat([torch.tensor(PROMPT).expand(n, -1), token[:, None]], 1),
        mask=mask,
        logprobs=mask * logp[token][:, None],
        version=torch.where(mask, 0, -1).int(),
    )


def one_row(length):
    every = torch.ones(1, length, dtype=torch.bool)
    return pack_rows(every.long(), torch.tensor([length]), every)


def gradient(policy, table, **settings):
    """(gradient, figures) of a whole table under grpo.py's settings."""
    cfg = grpo.Config(advantage="mean", **settings)
    grpo.find_loss(cfg)
    table.advantage = losses.group_advantages(table, "mean")
    logprobs, _ = policy(pack_rows(table.tokens, table.length, table.mask))
    loss, sums = losses.policy_loss(losses.LOSSES[cfg.loss])(logprobs, table, cfg)
    grads = torch.autograd.grad(loss / losses.divisor(table, cfg), list(policy.parameters()))
    return torch.cat([g.flatten() for g in grads]), sums


def test_the_correction_turns_the_gradient_back(policies):
    old, new = policies
    on_policy, sums = gradient(new, sample(new), loss="reinforce")
    assert sums["ratio"] / ROWS == pytest.approx(1, abs=1e-3)
    stale = sample(old)
    trainer = {"loss": "reinforce", "old_policy": "trainer"}
    ways = {
        "ratio of 1": trainer,  # the pitfall: the data is taken for the policy's own
        "true ratio": {"loss": "reinforce"},
        "truncated": {**trainer, "correction": "truncate", "correction_cap": 2.0},
    }
    cosine = {}
    for name, settings in ways.items():
        found, sums = gradient(new, stale, **settings)
        cosine[name] = float(torch.cosine_similarity(found, on_policy, dim=0))
        assert sums["mismatch_kl"] / ROWS > 0.05, "not stale at all"
    _, sums = gradient(new, stale, loss="reinforce")
    assert sums["ratio_max"] > 2
    print(cosine)  # with --rP
    assert cosine["ratio of 1"] < 0.9 < 0.97 < min(cosine["true ratio"], cosine["truncated"]), (
        cosine
    )


def test_figures_say_how_stale(policies):
    old, new = policies
    table = sample(old)
    table.index += 3 * 2**32  # trained at step 3, sampled by version 0
    cfg = SimpleNamespace(**vars(grpo.Config(loss="grpo", clip_low=0.2, clip_high=0.28)))
    table.advantage = losses.group_advantages(table, "mean")
    sums = losses.figures(
        new(pack_rows(table.tokens, table.length, table.mask))[0].detach(), table, cfg
    )
    assert sums["policy_age_max"] == 3 and sums["policy_age"] == 3 * ROWS
    ess = report.derived({k: v if v.numel() > 1 else float(v) / ROWS for k, v in sums.items()})[
        "ess"
    ]
    assert 0.1 < ess < 0.9


@pytest.mark.long
def test_at_a_learning_rate_of_zero_nothing_moves(tmp_path):
    """200 steps, asynchronous: parity, mismatch and weights stay what they were."""
    args = ["--steps=200", "--lr=0", "--max_policy_age=1", "--check_weights=true", "--eval_size=0"]
    done = run(3, "grpo.py", *args, f"--run_dir={tmp_path}/r", "--prompts_per_step=8", timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = lines(tmp_path / "r")
    assert len(steps) == 200 and max(x["policy_age_max"] for x in steps) == 1
    assert max(x["mismatch_max"] for x in steps) < 1e-4
    first, last = (sum(x["mismatch_abs"] for x in part) / 50 for part in (steps[:50], steps[-50:]))
    assert last == pytest.approx(first, rel=0.2)
    assert all(abs(x["ratio"] - 1) < 1e-5 for x in steps)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (ROOT / "assets/calculator", tmp_path / "r/model")
    )
    assert all(torch.equal(v, after[k]) for k, v in before.items())
