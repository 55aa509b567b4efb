"""Every topology trains the same groups, each once: a sample of {ranks} x {engines} x {ages}."""

import pytest
import torch
from conftest import lines, run, trace
from test_runs import SMALL, evaluations, good, learned

from rollouts import load_rollouts

TP, AGE = "--tensor_parallel_size=", "--max_policy_age="
TOPOLOGIES = {  # name -> ranks, engines, trainers, greatest age, settings
    "both on two ranks": (2, 2, 2, 0, ["--num_generators=0"]),
    "two engines": (3, 2, 1, 0, ["--num_generators=2"]),
    "age 1": (2, 1, 1, 1, [AGE + "1"]),
    "two trainers, age 3": (3, 1, 2, 3, [AGE + "3"]),
    "tensor parallel": (3, 1, 1, 0, ["--num_generators=2", TP + "2"]),
    "two tensor parallel, age 1": (5, 2, 1, 1, ["--num_generators=4", TP + "2", AGE + "1"]),
}
QUICK = ("both on two ranks", "two engines")
STEPS, EQUALS = 3, 16  # the token that ends a prompt


def start(folder, ranks, settings):
    args = [*SMALL, f"--steps={STEPS}", "--deterministic=true", f"--run_dir={folder}", *settings]
    return good(run(ranks, "grpo.py", *args, timeout=600), folder)


def rows(table):
    """The tokens of each row, without padding."""
    return [t[:n].tolist() for t, n in zip(table.tokens, table.length, strict=True)]


def prompts(table):
    return [row[: row.index(EQUALS)] for row in rows(table)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return start(tmp_path_factory.mktemp("one") / "r", 1, [])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in TOPOLOGIES]
)
def test_every_group_is_trained_once(one_rank, tmp_path, name):
    ranks, engines, trainers, limit, settings = TOPOLOGIES[name]
    folder = start(tmp_path / "r", ranks, settings)
    oldest, metrics = 0, learned(folder)
    for step in range(STEPS):
        table, expected = (load_rollouts(f / f"rollouts/{step}") for f in (folder, one_rank))
        assert table.index.tolist() == [step * 2**32 + s for s in range(6) for _ in range(4)]
        assert table.reply.tolist() == [0, 1, 2, 3] * 6
        assert prompts(table) == prompts(expected)
        assert metrics[step]["tokens"] == int(table.mask.sum())
        assert len(list((folder / f"rollouts/{step}").iterdir())) == trainers
        age = step - table.version[table.mask]
        oldest = max(oldest, int(age.max()))
        assert age.min() >= 0 and metrics[step]["policy_age_max"] == age.max()
        if step == 0:  # the same weights, so the same words
            assert rows(table) == rows(expected)
            assert torch.allclose(table.advantage, expected.advantage)
            assert torch.allclose(table.logprobs, expected.logprobs, atol=1e-4)
    assert oldest <= limit and (oldest > 0) == (limit > 0)
    by = [x["slot"] % engines for x in lines(folder, "samples.jsonl") if x["step"] == 0]
    assert by == [e for e in range(engines) for _ in range(2)]  # every engine had its share
    assert [x["name"] for x in trace(folder)].count("check") == ranks * (STEPS + 1)  # bit-equal
    assert [(x["step"], x["eval_rows"]) for x in evaluations(folder)] == [(0, 12), (STEPS, 12)]
