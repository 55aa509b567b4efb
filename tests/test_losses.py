"""Advantages, losses and divisors against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

import losses
from rollouts import Rollouts


def table(rewards, groups, sampled=(2, 2, 2, 2)):
    n, t = len(rewards), 3
    mask = torch.zeros(n, t, dtype=torch.bool)
    for i, k in enumerate(sampled[:n]):
        mask[i, 1 : 1 + k] = True
    return Rollouts(
        index=torch.tensor(groups),
        reward=torch.tensor(rewards),
        mask=mask,
        weight=torch.ones(n),
        sampled=mask.sum(1),
    )


def test_advantages_are_reward_minus_group_mean():
    a = losses.group_advantages(table([1.0, 0.0, 0.0, 3.0], [7, 7, 9, 9]), "mean")
    assert a.tolist() == [[0, 0.5, 0.5], [0, -0.5, -0.5], [0, -1.5, -1.5], [0, 1.5, 1.5]]


def test_advantages_over_unbiased_std():
    a = losses.group_advantages(table([1.0, 0.0, 0.0, 3.0], [7, 7, 9, 9]), "mean_std")
    std = math.sqrt(0.5)  # of (1, 0): sum of squares 0.5 over n - 1 = 1
    assert a[0, 1].item() == pytest.approx(0.5 / (std + 1e-4), rel=1e-6)
    assert a[3, 1].item() == pytest.approx(1.5 / (math.sqrt(4.5) + 1e-4), rel=1e-6)


@pytest.mark.parametrize("kind", ["mean", "mean_std"])
def test_groups_that_teach_nothing_are_exactly_zero(kind):
    seven = table([0.1] * 7, [4] * 7, sampled=(2,) * 7)  # in float32 their mean is not 0.1
    equal = losses.group_advantages(seven, kind)
    single = losses.group_advantages(table([5.0], [4]), kind)
    assert not equal.any() and not single.any()


def test_grpo_by_hand():
    """Four tokens, ratios 2, 1/2, 1.1 and one that is not sampled; advantages +1 and -1; clip at
    [0.8, 1.28].
    """
    old = torch.zeros(1, 4)
    new = torch.tensor([[math.log(2.0), math.log(0.5), math.log(1.1), 5.0]], requires_grad=True)
    rows = Rollouts(
        mask=torch.tensor([[True, True, True, False]]),
        weight=torch.ones(1),
        logprobs=old,
        advantage=torch.tensor([[1.0, -1.0, 1.0, 0.0]]),
    )
    loss, sums = losses.grpo(new, rows, SimpleNamespace(clip_low=0.2, clip_high=0.28))
    # min(2, 1.28) + min(-0.5, -0.8) + min(1.1, 1.1) = 1.28 - 0.8 + 1.1
    assert loss.item() == pytest.approx(-1.58, abs=1e-6)
    assert (sums["clip_high"].item(), sums["clip_low"].item()) == (1, 1)
    assert sums["ratio"].item() == pytest.approx(3.6, abs=1e-6)
    loss.backward()
    assert new.grad[0].tolist() == pytest.approx(
        [0, 0, -1.1, 0], abs=1e-6
    )  # clipped tokens have no gradient


def test_rows_of_weight_zero_are_in_no_sum_and_no_divisor():
    t = table([1.0, 0.0, 0.0, 3.0], [7, 7, 9, 9], sampled=(1, 2, 2, 2))
    cfg = SimpleNamespace(aggregation="token", max_new_tokens=10)
    assert losses.divisor(t, cfg) == 7
    t.weight[1] = 0
    assert losses.divisor(t, cfg) == 5
    cfg.aggregation = "fixed"
    assert losses.divisor(t, cfg) == 30


def test_mismatch_is_zero_for_equal_policies_and_the_k3_estimate_else():
    rows = Rollouts(
        mask=torch.tensor([[True, False]]),
        weight=torch.ones(1),
        logprobs=torch.tensor([[-1.0, 0.0]]),
    )
    assert losses.mismatch(torch.tensor([[-1.0, 9.0]]), rows)["mismatch_kl"] == 0
    out = losses.mismatch(torch.tensor([[-0.5, 9.0]]), rows)
    assert out["mismatch_kl"].item() == pytest.approx(math.exp(0.5) - 1 - 0.5)
    assert out["mismatch_max"].item() == pytest.approx(0.5)
