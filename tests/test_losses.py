"""Advantages, losses and divisors: against numbers worked out by hand, finite differences, and a
slow, obvious reference (reference.py).
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import losses
import report
from examples import distill
from grpo import Config, find_loss
from rollouts import Rollouts, Row, from_rows, plan_batch
from trainer import nothing

log = math.log
KINDS = ("mean", "mean_std", "leave_one_out")


def configured(loss="grpo", **changes):
    """The settings of a run with this loss; clip at [0.8, 1.25] where nothing else is said."""
    cfg = Config(**{"loss": loss, "clip_low": 0.2, "clip_high": 0.25, **changes})
    find_loss(cfg)
    return cfg


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(values):
    return pytest.approx(values, rel=1e-6, abs=1e-7)


# ---------------------------------------------------------------- advantages


def rewarded(rewards, groups, sampled=None):
    """A table as the generator leaves it: a prompt of one token, then the sampled ones."""
    sampled = torch.tensor(sampled or [2] * len(rewards))
    place = torch.arange(1 + int(sampled.max()))
    return Rollouts(
        index=torch.tensor(groups),
        reward=torch.tensor(rewards),
        returns=torch.tensor(rewards)[:, None],
        turns=torch.zeros(len(rewards), len(place), dtype=torch.long),
        mask=(place > 0) & (place <= sampled[:, None]),
        weight=torch.ones(len(rewards)),
        finished=torch.ones(len(rewards), dtype=torch.bool),
        sampled=sampled,
    )


@pytest.mark.parametrize(
    "kind, expected",
    [
        # group 7 has rewards 1, 0 (mean 1/2); group 9 has 0, 3, 6 (mean 3)
        ("mean", [0.5, -0.5, -3, 0, 3]),
        # unbiased: sqrt((1/4 + 1/4) / 1) = 0.70711 and sqrt((9 + 0 + 9) / 2) = 3, plus 0.0001
        ("mean_std", [0.5 / 0.7072068, -0.5 / 0.7072068, -3 / 3.0001, 0, 3 / 3.0001]),
        # 1 - 0, 0 - 1; 0 - (3 + 6) / 2, 3 - (0 + 6) / 2, 6 - (0 + 3) / 2
        ("leave_one_out", [1, -1, -4.5, 0, 4.5]),
    ],
)
def test_advantages_by_hand(kind, expected):
    table = rewarded([1.0, 0.0, 0.0, 3.0, 6.0], [7, 7, 9, 9, 9], sampled=[1, 2, 2, 0, 1])
    a = losses.group_advantages(table, kind)
    for row, sampled, value in zip(a.tolist(), [1, 2, 2, 0, 1], expected):
        assert row == close([0] + [value] * sampled + [0] * (2 - sampled))  # sampled tokens alone


def played(slot, reply, *paid):
    """A row of a prompt of one token, turns of two tokens, and an observation between two."""
    made = Row(0, slot, 0, reply, None, paid=list(paid))
    made.append_given([9])
    for made.turn in range(len(paid)):
        made.append_given([8] if made.turn else [])
        made.append_sampled([5, 6], [-1.0, -1.0], 0)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_by_turns_and_episodes_of_unequal_length_by_hand(kind):
    """Discount 1/2. Row 0 earns 1, 0, 4: returns 2, 2, 4. Row 1 earns 3, and is over: 3, 3, 3."""
    table = from_rows([played(7, 0, 1.0, 0.0, 4.0), played(7, 1, 3.0)], [], discount=0.5)
    assert table.reward.tolist() == [5, 3]
    assert table.returns.tolist() == [[2, 2, 4], [3, 3, 3]]
    a = losses.group_advantages(table, kind)
    half = {"mean": 0.5, "mean_std": 0.5 / (0.5**0.5 + 1e-4), "leave_one_out": 1.0}[kind]
    one = [0, -half, -half, 0, -half, -half, 0, half, half]  # 2 - 2.5, 2 - 2.5, 4 - 3.5
    assert a[0].tolist() == close(one) and a[1].tolist() == close([0, half, half] + [0] * 6)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.floats(-3, 3, width=32))))
def test_a_reward_at_the_end_is_that_of_every_turn(episodes):
    """However many turns: the advantage is that of the episodes' rewards."""
    rows = [played(g, i, *[0.0] * (n - 1), r) for i, (g, n, r) in enumerate(episodes)]
    table = from_rows(rows, [])
    single = from_rows([played(r.slot, r.reply, r.paid[-1]) for r in rows], [])
    for kind in KINDS:
        a, b = (losses.group_advantages(t, kind) for t in (table, single))
        assert a.shape[0] == 0 or torch.equal(a[:, 1], b[:, 1])
        for row, mask in zip(a, table.mask):
            assert len(row[mask].unique()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_teach_nothing_are_exactly_zero(kind):
    seven = rewarded([0.1] * 7, [4] * 7)  # in float32 their mean is not 0.1
    equal = losses.group_advantages(seven, kind)
    single = losses.group_advantages(rewarded([5.0], [4]), kind)
    assert torch.equal(equal, torch.zeros(7, 3)) and torch.equal(single, torch.zeros(1, 3))
    assert report.equal_groups(seven).tolist() == [True]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "prompt", "fixed"])
def test_a_rank_without_rows_has_columns_without_rows(aggregation):
    settings = {"aggregation": aggregation, "equal_rewards": "mask"}
    empty, cfg = from_rows([], []), configured(**settings, overlong="mask")
    for kind in ("mean", "mean_std", "leave_one_out"):
        empty.advantage = losses.group_advantages(empty, kind)
        assert empty.advantage.shape == (0, 0)
    assert losses.row_weights(empty, cfg).shape == losses.shares(empty, cfg).shape == (0,)


def test_equal_groups_by_hand():
    table = rewarded([1.0, 0.0, 2.0, 2.0, 5.0], [9, 9, 4, 4, 11])
    assert report.equal_groups(table).tolist() == [True, False, True]  # of groups 4, 9, 11


def test_distilled_by_hand():
    """The gradient of examples/distill.py at a ratio of 1 is minus the advantage."""
    rows = Rollouts(
        index=torch.tensor([0]),
        mask=torch.tensor([[False, True, True]]),
        weight=torch.ones(1),
        share=torch.ones(1),
        advantage=tensor([[0, 3, 3]]),
        logprobs=tensor([[0, -1, -2]]),
        teacher_logprobs=tensor([[-9, -1.5, -0.5]]),  # the prompt's is nobody's business
    )
    for loss, expected in ((distill.alone, [0, -0.5, 1.5]), (distill.added, [0, 2.5, 4.5])):
        logprobs = rows.logprobs.clone().requires_grad_()
        value, sums = loss(logprobs, rows, configured())
        value.backward()
        assert (-logprobs.grad).tolist() == [expected]
        assert sums["teacher_gain"] == 1.0  # -0.5 + 1.5


# ---------------------------------------------------------------- what a row counts


def test_row_weights_by_hand():
    table = rewarded([1.0, 0.0, 2.0, 2.0], [4, 4, 9, 9])
    table.finished[1] = False
    table.advantage = losses.group_advantages(table)
    assert losses.row_weights(table, configured()).tolist() == [1, 1, 1, 1]
    assert losses.row_weights(table, configured(overlong="mask")).tolist() == [1, 0, 1, 1]
    assert losses.row_weights(table, configured(equal_rewards="mask")).tolist() == [1, 1, 0, 0]
    both = configured(overlong="mask", equal_rewards="mask")
    assert losses.row_weights(table, both).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "aggregation, shares, divisor",
    [
        # Sampled tokens 4, 2, 3, 0, 1 in groups A A B B B; the third row has weight 0.
        ("token", [1, 1, 0, 1, 1], 4 + 2 + 0 + 1),
        ("sequence", [1 / 4, 1 / 2, 0, 1, 1], 4),  # rows, the one without a token among them
        ("prompt", [1 / 6, 1 / 6, 0, 1, 1], 2),  # A has 6 tokens, B has 1
        ("fixed", [1, 1, 0, 1, 1], 4 * 10),
    ],
)
def test_shares_and_divisor_by_hand(aggregation, shares, divisor):
    table = rewarded([0.0] * 5, [1, 1, 2, 2, 2], sampled=[4, 2, 3, 0, 1])
    table.weight[2] = 0
    cfg = configured(aggregation=aggregation, max_new_tokens=10)
    assert losses.shares(table, cfg).tolist() == close(shares)
    assert losses.divisor(table, cfg) == divisor
    table.weight[:] = 0  # nothing counts: no division by zero
    assert losses.shares(table, cfg).tolist() == [0] * 5 and losses.divisor(table, cfg) == 1


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_a_row_that_is_skipped_would_have_added_nothing(loss):
    """Same value, same gradient, same divisor without the rows whose advantage is 0; where there is
    more to the loss than the advantage they stay."""
    g, cfg = torch.Generator().manual_seed(0), configured(loss, max_new_tokens=9)
    table = rewarded([1.0, 0.0, 2.0, 2.0], [4, 4, 9, 9], sampled=[3, 2, 1, 3])
    table.advantage, table.length = losses.group_advantages(table, cfg.advantage), table.sampled + 1
    table.logprobs = -torch.rand(table.mask.shape, generator=g) * table.mask
    logprobs = table.logprobs + 0.3 * torch.randn(table.mask.shape, generator=g)
    found = []
    for kind in ("train", "skip"):
        cfg.equal_rewards = kind
        table.share = losses.shares(table, cfg)
        x = logprobs.clone().requires_grad_()
        value = losses.LOSSES[loss](x, table, cfg)[0] / losses.divisor(table, cfg)
        value.backward()
        found.append((value.item(), x.grad.tolist()))
    assert (table.share > 0).tolist() == [True, True, False, False]
    assert sorted(sum(plan_batch(table, 1, 99, 1)[0], [])) == [[0, 1]]
    assert found[0] == found[1] and any(map(any, found[0][1]))
    cfg.kl_coef = 0.1
    assert all(losses.shares(table, cfg) > 0)


@pytest.mark.parametrize(
    "aggregation, short, long",
    [
        # What a token pushes: A x share / divisor. Two replies to a prompt: right in 1 token
        # (A = 1), wrong in 4 (A = -1).
        ("token", -1 / 5, 1 / 5),  # each of the 5 tokens the same
        ("sequence", -1 / 2, 1 / 8),  # length bias: four times less for a token of the long one
        ("prompt", -1 / 5, 1 / 5),
        ("fixed", -1 / 20, 1 / 20),  # as `token`, and whatever the others' lengths: 2 x 10
    ],
)
def test_length_bias_by_hand(aggregation, short, long):
    cfg = configured(aggregation=aggregation, max_new_tokens=10)
    rows = rewarded([1.0, -1.0], [3, 3], sampled=[1, 4])
    rows.advantage = losses.group_advantages(rows, "mean")
    rows.logprobs = torch.full(rows.mask.shape, -1.0) * rows.mask
    rows.share = losses.shares(rows, cfg)
    logprobs = rows.logprobs.clone().requires_grad_()
    (losses.grpo(logprobs, rows, cfg)[0] / losses.divisor(rows, cfg)).backward()
    assert logprobs.grad[0].tolist() == close([0, short, 0, 0, 0])
    assert logprobs.grad[1].tolist() == close([0, long, long, long, long])


# ---------------------------------------------------------------- losses


def one_row(ratios, advantages, mask=None):
    """log pi = -1 for each token; the generator's log-prob makes the ratio."""
    t = len(ratios)
    rows = Rollouts(
        index=torch.tensor([0]),
        weight=torch.ones(1),
        share=torch.ones(1),
        mask=torch.tensor([mask or [True] * t]),
        version=torch.zeros(1, t, dtype=torch.int32),
        logprobs=tensor([[-1 - log(r) for r in ratios]]),
        advantage=tensor([advantages]),
    )
    return torch.full((1, t), -1.0, dtype=torch.float64, requires_grad=True), rows


# Between the ends, above, below, above and below with A < 0, and a token that nobody sampled.
RATIOS = [1.1, 2, 0.5, 4, 0.5, 50]
ADVANTAGES = [2, 1, 1, -1, -1, 7]
SAMPLED = [True] * 5 + [False]
BY_HAND = {
    # min(r A, clip(r) A): 2.2 + 1.25 + 0.5 - 4 - 0.8 = -0.85
    "grpo": (0.85, [-2.2, 0, -0.5, 4, 0], {"clip_low": 1, "clip_high": 1}),
    "dr_grpo": (0.85, [-2.2, 0, -0.5, 4, 0], {"clip_low": 1, "clip_high": 1}),
    # the fourth has its floor at 1.5 x -1: 2.2 + 1.25 + 0.5 - 1.5 - 0.8 = 1.65
    "dapo": (-1.65, [-2.2, 0, -0.5, 0, 0], {"clip_low": 1, "clip_high": 1, "clip_dual": 1}),
    # weights 1.1, 1.25, 0.8, 1.25, 0.8, log pi = -1: 2.2 + 1.25 + 0.8 - 1.25 - 0.8 = 2.2
    "cispo": (2.2, [-2.2, -1.25, -0.8, 1.25, 0.8], {"clip_low": 2, "clip_high": 2}),
    # r A: 2.2 + 2 + 0.5 - 4 - 0.5 = 0.2
    "reinforce": (0.2, [-2.2, -2, -0.5, 4, 0.5], {}),
    # tau 1: sigmoid(0.1, 1, -0.5) = 0.524979, 0.731059, 0.377541, times 4 A;
    # tau 2 where A < 0: sigmoid(6, -1) = 0.997527, 0.268941, times 2 A:
    # 4.199833 + 2.924234 + 1.510163 - 1.995055 - 0.537883 = 6.101293.
    # Slopes -4 s (1 - s) r A: s (1 - s) = 0.249376, 0.196612, 0.235004, 0.002467, 0.196612
    "sapo": (-6.1012929, [-2.1945092, -1.5728955, -0.4700074, 0.0394641, 0.3932239], {}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_by_hand(name):
    value, slopes, held = BY_HAND[name]
    logprobs, rows = one_row(RATIOS, ADVANTAGES, SAMPLED)
    cfg = configured(name, dual_clip=1.5, sapo_tau_positive=1.0, sapo_tau_negative=2.0)
    loss, sums = losses.LOSSES[name](logprobs, rows, cfg)
    loss.backward()
    assert loss.item() == close(value)
    assert logprobs.grad[0].tolist() == close([*slopes, 0])
    assert {k: v.item() for k, v in sums.items()} == held


def test_gspo_by_hand():
    """The ratio of a reply is the geometric mean of its tokens' ratios."""
    # sqrt(2 x 2) = 2 is held at 1.25: value -1.25 for both tokens, no slope
    # sqrt(4 x 1/4) = 1 is not, though both tokens' own ratios would be: slope -s A = 1 each
    # cube root of 1.21 x 1.1 x 1 = 1.1 (the unsampled 50 is no part of it): -2.2 each
    examples = [
        ([2, 2], [1, 1], None, 2 * -1.25, [0, 0], 2),
        ([4, 0.25], [-1, -1], None, 2 * 1.0, [1, 1], 0),
        ([1.21, 1.1, 1, 50], [2, 2, 2, 7], [True] * 3 + [False], 3 * -2.2, [-2.2] * 3 + [0], 0),
    ]
    for ratios, advantages, mask, value, slopes, high in examples:
        logprobs, rows = one_row(ratios, advantages, mask)
        loss, sums = losses.gspo(logprobs, rows, configured("gspo"))
        loss.backward()
        assert loss.item() == close(value) and logprobs.grad[0].tolist() == close(slopes)
        assert (sums["clip_low"].item(), sums["clip_high"].item()) == (0, high)


def test_gspo_keeps_a_small_ratio_beside_large_logprobs():
    """Its clip is 3e-4 wide, and a float32 log-prob of -20 has steps of 1.9e-6."""
    _, rows = one_row([1] * 4, [1.0] * 4)
    rows.logprobs = torch.full((1, 4), -20 - 2**-12)  # exact in float32
    rows.advantage = rows.advantage.float()
    logprobs = torch.tensor([[-20 + 2**-19, -20, -20, -20]])  # one token one step higher
    mean = 2**-12 + 2**-21  # a quarter of a step: -20 + mean would be rounded to -20 + 2**-12
    loss, _ = losses.gspo(logprobs, rows, configured("gspo"))
    assert -loss.item() / 4 - 1 == pytest.approx(math.expm1(mean), abs=1.3e-7)


def test_own_settings_of_each_loss():
    own = {name: configured(name, clip_low=-1.0, clip_high=-1.0) for name in losses.LOSSES}
    assert {n: (c.aggregation, c.advantage) for n, c in own.items()} == {
        "grpo": ("token", "mean_std"),
        "dr_grpo": ("fixed", "mean"),  # its two points
        "dapo": ("token", "mean_std"),
        "cispo": ("token", "mean_std"),
        "gspo": ("sequence", "mean_std"),
        "sapo": ("sequence", "mean_std"),
        "reinforce": ("token", "leave_one_out"),
    }
    assert (own["dapo"].clip_low, own["dapo"].clip_high) == (0.2, 0.28)  # clip-higher
    assert (own["gspo"].clip_low, own["gspo"].clip_high) == (3e-4, 4e-4)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("far", [-500.0, 500.0])
def test_far_log_probs_stay_finite(name, far):
    _, rows = one_row([1, 1], [1.0, -1.0])
    logprobs = torch.full((1, 2), -1.0, requires_grad=True)  # float32, where exp(89) overflows
    rows.advantage, rows.logprobs = rows.advantage.float(), rows.logprobs.float() - far
    rows.ref_logprobs, cfg = rows.logprobs, configured(name, kl_coef=0.1)
    loss, sums = losses.policy_loss(losses.LOSSES[name])(logprobs, rows, cfg)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert all(value.isfinite().all() for value in sums.values())


# ---------------------------------------------------------------- KL


@pytest.mark.parametrize(
    "kind, value, slope",
    [  # log pi = -1, the reference log 2 above it: d = log 2 = 0.6931
        ("k1", -0.6931472, 1),
        ("k2", 0.2402265, -0.6931472),  # d^2 / 2
        ("k3", 0.3068528, -1),  # 2 - 1 - log 2; slope 1 - 2
    ],
)
def test_kl_by_hand_and_counted_once(kind, value, slope):
    logprobs, rows = one_row([1, 1, 1], [0, 0, 0], [True, True, False])
    rows.share = torch.tensor([0.5])
    rows.ref_logprobs = tensor([[-1 + log(2), -1, 5]])
    cfg = configured(kl_coef=0.1, kl=kind)
    loss, sums = losses.policy_loss(losses.grpo)(logprobs, rows, cfg)
    loss.backward()
    own = 1 if kind == "k1" else 0  # of the second token, where both agree
    assert loss.item() == close(0.1 * 0.5 * value)
    assert logprobs.grad[0].tolist() == close([0.1 * 0.5 * slope, 0.1 * 0.5 * own, 0])
    assert sums["kl_ref"].item() == close(0.3068528)  # the log's is k3, whatever the loss has


def test_estimators_of_the_kl_are_what_the_docstring_says():
    """Expectations over a vocabulary of 5, exactly: their values, and the slopes of k1 and k2."""
    g = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, generator=g, dtype=torch.float64)
    logits, log_q = logits.requires_grad_(), other.log_softmax(-1)

    def slope(of):
        return torch.autograd.grad(of(logits.log_softmax(-1)), logits)[0]

    def expected(kind):  # the tokens come from pi: their distribution has no gradient
        return lambda log_p: (log_p.detach().exp() * losses.kl(log_p, log_q, kind)).sum()

    def exact(log_p):
        return (log_p.exp() * (log_p - log_q)).sum()

    log_p = logits.log_softmax(-1)
    assert expected("k1")(log_p).item() == pytest.approx(exact(log_p).item(), rel=1e-12)
    assert expected("k3")(log_p).item() == pytest.approx(exact(log_p).item(), rel=1e-12)
    assert abs(expected("k2")(log_p).item() / exact(log_p).item() - 1) > 0.01  # biased
    torch.testing.assert_close(slope(expected("k1")), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(slope(expected("k2")), slope(exact), rtol=1e-10, atol=1e-12)
    assert (slope(expected("k3")) - slope(exact)).norm() > 0.01 * slope(exact).norm()


# ---------------------------------------------------------------- old policy and correction


@pytest.mark.parametrize(
    "correction, level, weights",
    [  # pi_old / pi_generator = 4, 1/4, 1.5, whose product is 1.5; an unsampled token has 50
        ("none", "token", [1, 1, 1]),
        ("truncate", "token", [2, 0.25, 1.5]),
        ("mask", "token", [0, 0, 1.5]),  # kept within [1/2, 2]
        ("none", "sequence", [1, 1, 1]),
        ("truncate", "sequence", [1.5, 1.5, 1.5]),
        ("mask", "sequence", [1.5, 1.5, 1.5]),
    ],
)
@pytest.mark.parametrize("several", [True, False])
def test_correction_by_hand(correction, level, weights, several):
    logprobs, rows = one_row([4, 0.25, 1.5, 50], [2, 2, 2, 0], [True] * 3 + [False])
    cfg = configured(old_policy="trainer", correction=correction, correction_level=level)
    if several:  # updates in a batch: the old policy is kept in a column
        rows.old_logprobs = logprobs.detach().clone()
    else:  # the only one: the old policy is the present one
        assert rows.old_logprobs is None
    loss, _ = losses.grpo(logprobs, rows, cfg)
    loss.backward()
    # pi / pi_old = 1, so the slope is -A x weight: no part of it comes through the weight
    assert loss.item() == close(-2 * sum(weights))
    assert logprobs.grad[0].tolist() == close([-2 * w for w in weights] + [0])


def test_correction_of_a_whole_row():
    """Ratios 4 and 2: their product 8 is cut to the cap, or the row is left out."""
    logprobs, rows = one_row([4, 2], [1, 1])
    for correction, weight in (("truncate", 3), ("mask", 0)):
        cfg = configured(
            old_policy="trainer",
            correction=correction,
            correction_level="sequence",
            correction_cap=3.0,
        )
        assert losses.grpo(logprobs, rows, cfg)[0].item() == close(-2 * weight)


def test_the_ratio_is_that_of_the_chosen_old_policy():
    """pi / generator = 1.2; pi / (the trainer before the updates) = 0.9."""
    logprobs, rows = one_row([1.2], [1])
    rows.old_logprobs = tensor([[-1 - log(0.9)]])
    for old_policy, ratio in (("generator", 1.2), ("trainer", 0.9)):
        cfg = configured(old_policy=old_policy)
        assert losses.grpo(logprobs, rows, cfg)[0].item() == close(-ratio)


# ---------------------------------------------------------------- figures


def test_figures_by_hand():
    """Three sampled tokens with pi / pi_generator = 1, 2, 1/4; one of the prompt; a row that
    counts for nothing.
    """
    rows = Rollouts(
        index=torch.tensor([5 * 2**32 + 3, 5 * 2**32 + 3]),  # trained at step 5
        weight=torch.tensor([1.0, 0.0]),
        share=torch.tensor([1.0, 0.0]),
        mask=torch.tensor([[False, True, True, True], [True, True, True, True]]),
        version=torch.tensor([[-1, 5, 4, 3], [0, 0, 0, 0]]),
        logprobs=tensor([[0, -1, -1 - log(2), -1 + log(4)], [-30, -30, -30, -30]]),
        advantage=tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        ref_logprobs=tensor([[9, -1, -1, -1 + log(2)], [9, 9, 9, 9]]),
    )
    logprobs = tensor([[0, -1, -1, -1], [-1, -1, -1, -1]])
    cfg = configured(kl_coef=0.1)
    sums = losses.figures(logprobs, rows, cfg)
    assert {k: v.item() for k, v in sums.items()} == {
        "policy_age": 0 + 1 + 2,
        "policy_age_max": 2,
        "ratio": close(1 + 2 + 0.25),
        "ratio_max": close(2),
        "mismatch_kl": close((2 - 1 - log(2)) + (0.25 - 1 + log(4))),  # exp(d) - 1 - d
        "mismatch_abs": close(log(2) + log(4)),
        "mismatch_max": close(log(4)),
        "ess": close(1 + 2 + 0.25),
        "ess_squares": close(1 + 4 + 0.0625),
        "kl_ref": close(2 - 1 - log(2)),  # of the third token
    }
    out = report.derived({"ess": 3.25 / 3, "ess_squares": 5.0625 / 3, "reward": 1.0})
    assert out == {"reward": 1.0, "ess": close(3.25**2 / (3 * 5.0625))}
    assert report.derived({"loss": 1.0}) == {"loss": 1.0}  # a user's loss without figures


def test_with_several_updates_the_mismatch_is_that_before_the_first():
    """pi has moved by log 2 since; then it was the generator's by log 1.1."""
    logprobs, rows = one_row([2.2], [1])
    rows.old_logprobs = tensor([[-1 - log(2)]])
    cfg = configured(old_policy="trainer", minibatches=2)
    sums = losses.figures(logprobs.detach(), rows, cfg)
    assert sums["mismatch_max"].item() == close(log(1.1)) and sums["ratio"].item() == close(2)
    assert sums["ess"].item() == close(1.1)
    assert sums["kl_old"].item() == close(0.5 - 1 + log(2))  # d = log old - log pi = -log 2


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("old_policy", ["generator", "trainer"])
def test_a_rank_without_rows_reports_the_same_names(name, kl_coef, old_policy):
    """Names and sizes are what the ranks add up, in one order: else the sum is of two things."""
    cfg = configured(name, kl_coef=kl_coef, old_policy=old_policy, minibatches=2)
    logprobs, rows = one_row([2, 1], [1, -1])
    rows.ref_logprobs = rows.logprobs if kl_coef else None
    rows.old_logprobs = rows.logprobs if old_policy == "trainer" else None
    empty, whole = nothing(), losses.policy_loss(losses.LOSSES[name])
    zero = torch.full((1, 2), -3.0, requires_grad=True)
    (loss, told), (_, of_rows) = whole(zero, empty, cfg), whole(logprobs, rows, cfg)
    assert {k: v.shape for k, v in told.items()} == {k: v.shape for k, v in of_rows.items()}
    assert list(told) == list(of_rows) and not any(v.any() for v in told.values())
    loss.backward()
    assert loss == 0 and not zero.grad.any()


# ---------------------------------------------------------------- finite differences


def random_rows(seed: int, old_policy: str):
    """4 rows of 6 tokens with holes, ratios between 1/3 and 3, one number A for each row."""
    g = torch.Generator().manual_seed(seed)
    shape = (4, 6)
    mask = torch.rand(shape, generator=g) < 0.8
    logprobs = -3 + torch.rand(shape, generator=g, dtype=torch.float64)
    change = (2 * torch.rand(shape, generator=g, dtype=torch.float64) - 1) * log(3)
    drift = 0.5 * torch.randn(shape, generator=g, dtype=torch.float64)
    advantage = torch.randn((4, 1), generator=g, dtype=torch.float64).expand(shape)
    rows = Rollouts(
        index=torch.arange(4),
        weight=torch.ones(4),
        share=tensor([1.0, 0.5, 0.25, 0.0]),
        mask=mask,
        logprobs=logprobs - change - drift * (old_policy == "trainer"),
        old_logprobs=logprobs - change if old_policy == "trainer" else None,
        advantage=advantage * mask,
        version=torch.zeros(shape, dtype=torch.int32),
        ref_logprobs=logprobs + 0.5 * torch.randn(shape, generator=g, dtype=torch.float64),
    )
    return logprobs, rows


def central_differences(value, at, step=1e-6):
    slopes = torch.zeros_like(at)
    for i in itertools.product(*map(range, at.shape)):
        up, down = at.clone(), at.clone()
        up[i], down[i] = at[i] + step, at[i] - step
        slopes[i] = (value(up) - value(down)) / (2 * step)
    return slopes


def gspo_sequence(logprobs, rows, cfg):
    """GSPO as its paper first writes it (eq. 5): a ratio per reply, with the gradient of all its
    tokens. Its value is counted once for each token, as ours is.
    """
    tokens = rows.mask.sum(1)
    ratio = (losses.log_ratio(logprobs, rows, cfg).sum(1) / tokens).exp()  # (B,)
    a = rows.advantage.sum(1) / tokens
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return -(torch.minimum(ratio * a, clipped * a) * tokens * rows.share).sum(), {}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("old_policy", ["generator", "trainer"])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "sapo"])
def test_gradient_against_finite_differences(name, old_policy, seed):
    at, rows = random_rows(seed, old_policy)
    changes = {"old_policy": old_policy, "kl_coef": 0.3, "dual_clip": 2.0}
    if name == "gspo":  # a mean over tokens is nearer to 1; with a weight per token it has no value
        changes |= {"clip_low": 0.05, "clip_high": 0.05}
    elif old_policy == "trainer":
        changes["correction"] = "truncate"
    cfg = configured(name, **changes)
    logprobs = at.clone().requires_grad_()
    loss, sums = losses.policy_loss(losses.LOSSES[name])(logprobs, rows, cfg)
    loss.backward()
    same = losses.policy_loss(gspo_sequence if name == "gspo" else losses.LOSSES[name])
    slopes = central_differences(lambda x: same(x, rows, cfg)[0].item(), at)
    assert loss.item() == pytest.approx(same(at, rows, cfg)[0].item(), rel=1e-12)
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-6, atol=1e-8)
    assert logprobs.grad.norm() > 0.1 and not logprobs.grad[~rows.mask].any()
    held = sum(int(v) for k, v in sums.items() if k.startswith("clip_"))
    assert held > 0 or name == "sapo"  # the clip is at work in what is compared


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["cispo", "reinforce"])
def test_gradient_of_the_losses_with_a_stopped_weight(name, seed):
    """-w A for each token, where w has no gradient: the slope of -w A log pi, and not of its w."""
    at, rows = random_rows(seed, "generator")
    cfg = configured(name)
    logprobs = at.clone().requires_grad_()
    losses.LOSSES[name](logprobs, rows, cfg)[0].backward()
    weight = (at - rows.logprobs).exp()
    weight = weight.clamp(0.8, 1.25) if name == "cispo" else weight
    expected = -weight * rows.advantage * rows.mask * rows.share[:, None]
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- random tables


@st.composite
def tables(draw):
    """Groups of unequal size, rows of unequal length whose mask has holes (the environment's
    turns), rows of weight 0 and without a sampled token, stale log-probs, an advantage per token.
    """
    n, t = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    number = lambda low, high: st.floats(low, high, width=32)  # noqa: E731

    def cells(values):
        return [draw(st.lists(values, min_size=t, max_size=t)) for _ in range(n)]

    new, step, drift, ref = (cells(number(a, b)) for a, b in [(-6, 0), (-2, 2), (-2, 2), (-1, 1)])
    new = tensor(new)
    mask = torch.tensor(cells(st.booleans()))
    old = new - tensor(step)
    rows = Rollouts(
        index=torch.tensor(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))) + 2**32,
        reward=torch.tensor(
            draw(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=n, max_size=n))
        ),
        weight=torch.tensor(
            draw(st.lists(st.sampled_from([1.0, 1.0, 0.0]), min_size=n, max_size=n))
        ),
        mask=mask,
        sampled=mask.sum(1),
        version=torch.tensor(cells(st.integers(0, 1)), dtype=torch.int32),
        logprobs=old - tensor(drift) * draw(st.sampled_from([0.0, 0.1, 1.0])),
        advantage=tensor(cells(number(-3, 3))),  # also where nothing was sampled
        ref_logprobs=new + tensor(ref),
        turns=torch.zeros(n, t, dtype=torch.long),
    )
    rows.returns = rows.reward[:, None]
    return new, rows, old


def as_lists(rows):
    """The table for reference.py."""
    return SimpleNamespace(
        **{"old_logprobs": None, **{k: v.tolist() for k, v in rows.columns().items()}}
    )


@given(tables())
@settings(max_examples=60, deadline=None)
def test_advantages_and_shares_of_random_tables(drawn):
    _, rows, _ = drawn
    plain = as_lists(rows)
    for kind in KINDS:
        a = losses.group_advantages(rows, kind)
        expected = [reference.advantage(plain, i, kind) for i in range(len(rows))]
        for row, mask, value in zip(a.tolist(), plain.mask, expected):
            assert row == pytest.approx([value * m for m in mask], rel=1e-5)
            assert value or not any(row)  # exactly 0 stays exactly 0
    for aggregation in AGGREGATIONS:
        cfg = configured(aggregation=aggregation, max_new_tokens=7)
        found = losses.shares(rows, cfg).double() / losses.divisor(rows, cfg)
        expected = [reference.share_over_divisor(plain, i, cfg) for i in range(len(rows))]
        assert found.tolist() == pytest.approx(expected, rel=1e-6)


AGGREGATIONS = ("token", "sequence", "prompt", "fixed")
OLD = [  # (old_policy, several updates in the batch, correction, correction_level)
    ("generator", False, "none", "token"),  # the generator's own needs no correction
    *itertools.product(["trainer"], [False, True], ["none"], ["token"]),
    *itertools.product(["trainer"], [False, True], ["truncate", "mask"], ["token", "sequence"]),
]
KL = (None, "k1", "k2", "k3")


@pytest.mark.parametrize("name", losses.LOSSES)
@given(tables(), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_losses_of_random_tables(name, drawn, first):
    """Value, gradient and clip counts, in every combination of the settings; the KL goes round."""
    at, rows, old = drawn
    combinations = itertools.product(AGGREGATIONS, OLD)
    for number, (aggregation, (old_policy, several, correction, level)) in enumerate(combinations):
        kl = KL[(first + number) % 4]
        cfg = configured(
            name,
            aggregation=aggregation,
            old_policy=old_policy,
            correction=correction,
            correction_level=level,
            correction_cap=1.7,
            kl_coef=0.3 if kl else 0.0,
            kl=kl or "k3",
            dual_clip=2.0,
            sapo_tau_negative=1.25,
        )
        rows.share = losses.shares(rows, cfg)
        rows.old_logprobs = old if several else None
        logprobs = at.clone().requires_grad_()
        loss, sums = losses.policy_loss(losses.LOSSES[name])(logprobs, rows, cfg)
        loss.backward()
        value, gradient, held = reference.loss(name, at.tolist(), as_lists(rows), cfg)
        # Absolute, because terms of up to 100 may cancel.
        assert loss.item() == pytest.approx(value, rel=1e-12, abs=1e-11)
        for found, expected in zip(logprobs.grad.tolist(), gradient):
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-11)
        counts = [int(sums[k]) for k in ("clip_low", "clip_high", "clip_dual") if k in sums]
        assert counts == held[: len(counts)]
