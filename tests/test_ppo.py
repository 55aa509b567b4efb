"""examples/ppo.py: GAE and the value loss by hand, gradients for any split, checkpoints, a run."""

import pytest
import torch
from conftest import lines, logs, run
from pitfall_rows import batch
from ppo_ranks import gradients, models, settings

import losses
from examples import ppo
from rollouts import gather

# A prompt, two tokens, one of the tool, one more, padding.
MASK = torch.tensor([[0, 1, 1, 0, 1, 0]]).bool()
VALUES = torch.tensor([[9.0, 0.5, 0.25, 9.0, 0.75, 9.0]])


@pytest.mark.parametrize(
    ("gamma", "lam", "by_hand"),
    [
        # The differences are 0.25 - 0.5, 0.75 - 0.25 and 1 - 0.75: the tool's token is no state.
        (1.0, 0.0, [0, -0.25, 0.5, 0, 0.25, 0]),
        (1.0, 1.0, [0, 0.5, 0.75, 0, 0.25, 0]),  # reward less value
        (1.0, 0.5, [0, 0.0625, 0.625, 0, 0.25, 0]),
        (0.5, 0.5, [0, -0.328125, 0.1875, 0, 0.25, 0]),  # -0.375, 0.125, 0.25; a quarter each
    ],
)
def test_gae_by_hand(gamma, lam, by_hand):
    found = ppo.gae(torch.tensor([1.0]), VALUES, MASK, gamma, lam)
    assert found.tolist() == [by_hand]


def test_gae_of_rows_of_other_lengths():
    """Each row ends at its own last sampled token; one without any has no advantage."""
    mask = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    found = ppo.gae(torch.tensor([1.0, 2.0, 5.0]), torch.zeros(3, 4), mask, 0.5, 1.0)
    assert found.tolist() == [[0, 1, 0, 0], [0, 0.5, 1, 2], [0, 0, 0, 0]]


def test_value_loss_by_hand():
    cfg = settings("", clip_value=0.2)
    rows = batch(cfg, [(1, 3)])
    rows.values = torch.tensor([[0.0, 0.0, 0.0, 0.0]])  # before the batch
    rows.returns = torch.tensor([[7.0, 1.0, 1.0, 0.3]])
    values = torch.tensor([[3.0, 0.1, 0.9, 0.5]], requires_grad=True)
    value, sums = ppo.value_loss(values, rows, cfg)
    # 0.9 away; 0.1 away, but 0.8 where the clip holds it; 0.2 away, and 0.1 where it is held
    assert value.item() == pytest.approx((0.81 + 0.64 + 0.04) / 2)
    value.backward()
    assert values.grad[0].tolist() == pytest.approx([0, -0.9, 0, 0.2])
    assert int(sums["clip_value"]) == 1


def test_values_are_of_what_stands_before_the_token(tiny, world):
    """As a plain forward of the tokens before it; a later token changes nothing."""
    cfg = settings(tiny("qwen3"))
    _, critic = models(cfg, world)
    rows = gather(batch(cfg), world, 10_000)
    critic.columns = {}
    found = critic.logprobs(rows, critic.policy)
    whole = [p.full_tensor() for p in (critic.policy.head.weight, critic.policy.head.bias)]
    import transformers

    body = transformers.AutoModel.from_pretrained(tiny("qwen3"), dtype=torch.float64)
    for i, n in enumerate(rows.length.tolist()):
        for t in range(n):
            expected = 0.0
            if rows.mask[i, t]:
                hidden = body(rows.tokens[i : i + 1, :t]).last_hidden_state[0, -1]
                expected = float(hidden @ whole[0][0] + whole[1][0])
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-9), (i, t)


def test_advantages_are_white_and_returns_are_not(tiny, world):
    cfg = settings(tiny("qwen3"), gae_lambda=0.7)
    _, critic = models(cfg, world)
    rows = critic.judge(gather(batch(cfg), world, 40))
    kept = rows.advantage[rows.mask].double()
    assert abs(kept.mean()) < 1e-9 and kept.std(correction=0) == pytest.approx(1)
    assert not rows.advantage[~rows.mask].any()
    values, returns = critic.columns["values"], critic.columns["returns"]
    raw = ppo.gae(rows.reward, values, rows.mask, 1.0, 0.7)
    assert torch.allclose(returns, (values + raw) * rows.mask)


def test_gradients_do_not_depend_on_the_split(tiny, world, tmp_path):
    cfg = settings(tiny("qwen2"))
    whole = gradients(cfg, world, budget=10_000)
    parts = [gradients(cfg, world, budget) for budget in (8, 40)]
    done = run(2, "tests/ppo_ranks.py", str(tmp_path / "found.pt"), tiny("qwen2"))
    assert done.returncode == 0, done.stderr[-2000:]
    for other in [*parts, torch.load(tmp_path / "found.pt")]:
        for name in ("policy", "value"):
            assert whole[name].norm() > 1e-3
            assert (other[name] - whole[name]).norm() < 1e-12 * whole[name].norm(), name
        for name, value in whole["metrics"].items():
            if name != "policy_age":
                assert other["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def bits(trainer) -> dict[str, torch.Tensor]:
    return {
        name: v.full_tensor() if hasattr(v, "full_tensor") else v.clone()
        for name, v in trainer.state().items()
    }


def test_a_checkpoint_is_both_models(tiny, world, tmp_path):
    """Weights, moments and steps of the value model come back, bit for bit."""
    cfg = settings(tiny("qwen3"))
    trainer, critic = models(cfg, world)
    rows = critic.judge(gather(batch(cfg), world, 40))
    trainer.step(rows, losses.policy_loss(losses.grpo), losses.divisor)
    critic.learn(rows)
    trainer.save(tmp_path)
    trainer.saved()
    before = bits(trainer)
    other, its_critic = models(cfg, world)
    assert not torch.equal(
        bits(other)["value.policy.head.weight"], before["value.policy.head.weight"]
    )
    assert other.problem(tmp_path / "step-1") == ""
    other.load(tmp_path / "step-1")
    after = bits(other)
    counts = [float(own["step"]) for own in its_critic.optimizer.state.values()]
    assert after.keys() == before.keys() and {*counts} == {1.0}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert its_critic.version == 1


def test_it_runs_and_the_value_model_learns(tmp_path):
    args = ["--steps=3", "--prompts_per_step=64", "--eval_size=0", "--minibatches=1"]
    done = run(2, "examples/ppo.py", *args, f"--run_dir={tmp_path}/r", "--epochs_per_batch=2")
    assert done.returncode == 0, done.stderr[-2000:] + logs(tmp_path / "r")
    steps = lines(tmp_path / "r")
    assert steps[0]["explained_variance"] == pytest.approx(0, abs=0.1)  # the head is at zero
    assert all(0 < x["value_loss"] < 0.5 and x["value_grad_norm"] > 0 for x in steps)
    assert (tmp_path / "r/model/model.safetensors").exists()


def test_groups_are_refused(world):
    with pytest.raises(ppo.UserError, match="no groups"):
        ppo.check(settings("assets/calculator", equal_rewards="mask"), world)
