"""Every topology trains the same groups, each once: {ranks} x {ages}, three steps each.

`make test` has a sample: ranks that do both, two engines, an engine of two ranks, every age.
`make test-all` has all, and runs benchmarks/topologies.py, where each learns the default task in 46
steps (three are too few for an age of 3).
"""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, lines, run, trace
from test_runs import SMALL, evaluations, good, learned
from topologies import AGES, TOPOLOGIES, flags

from report import load_rollouts

QUICK = [("2 colocated", 1), ("2 + 1", 0), ("TP 2 + 1", 3)]
CASES = [(name, age) for name in TOPOLOGIES for age in AGES if (name, age) != ("1 colocated", 0)]
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


def case(name, age):
    long = [] if (name, age) in QUICK else pytest.mark.long
    return pytest.param(name, age, marks=long, id=f"{name}, age {age}")


@pytest.mark.parametrize(("name", "limit"), [case(*c) for c in CASES])
def test_every_group_is_trained_once(one_rank, tmp_path, name, limit):
    ranks, settings = TOPOLOGIES[name]
    folder = start(tmp_path / "r", ranks, [*flags(settings), f"--max_policy_age={limit}"])
    generators = settings["num_generators"] or ranks
    engines = generators // settings.get("tensor_parallel_size", 1)
    trainers = ranks - settings["num_generators"]
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
        if limit == 0 or step == 0:  # the same weights, so the same words
            assert rows(table) == rows(expected)
            assert torch.equal(table.reward, expected.reward)
        if step == 0:  # later Adam has made more of the gradients' rounding
            assert torch.allclose(table.logprobs, expected.logprobs, atol=1e-4)
    assert oldest <= limit and (oldest > 0) == (limit > 0)
    by = [x["slot"] % engines for x in lines(folder, "samples.jsonl") if x["step"] == 0]
    assert by == [e for e in range(engines) for _ in range(3)]  # every engine had its share
    assert [x["name"] for x in trace(folder)].count("check") == ranks * (STEPS + 1)  # bit-equal
    assert [(x["step"], x["eval_rows"]) for x in evaluations(folder)] == [(0, 12), (STEPS, 12)]
    times_add_up(folder, trainer=settings["num_generators"])


def times_add_up(folder, trainer: int):
    """The parts of the steps after the first are the wall time by the spans of trace.json. A step
    of the first trainer ends when it is logged, behind `train` and before what follows; one of the
    first generator when it tells its clock, inside `gather`.
    """
    steps = [x for x in lines(folder) if "reward" in x][1:]
    parts = ["train_s", "sync_s", "idle_trainer_s", "other_trainer_s"]
    theirs = ["generate_s", "idle_generator_s", "other_generator_s"]
    parts += [] if trainer else ["generate_s"]
    for rank, name, of in ((trainer, "train", parts), (0, "gather", theirs)):
        if trainer or name == "train":
            spans = [x for x in trace(folder) if x["pid"] == rank and "dur" in x]
            own = [(x["ts"], x["ts"] + x["dur"]) for x in spans if x["name"] == name][:STEPS]
            if name == "train":
                starts = sorted(x["ts"] for x in spans)
                own = [(end, next(s for s in starts if s >= end - 1)) for _, end in own]
            assert all(x[part] >= 0 for part in of for x in steps)
            spent = sum(x[part] for part in of for x in steps) * 1e6
            least, most = own[-1][0] - own[0][1], own[-1][1] - own[0][0]
            assert least - 2000 <= spent <= most + 2000, (name, of, least, spent, most)


def test_the_times_of_one_rank_add_up(one_rank):
    times_add_up(one_rank, trainer=0)


@pytest.mark.long
def test_the_default_learns_on_every_topology(tmp_path):
    """{7 topologies} x {ages 0, 1, 3}; benchmarks/RESULTS.md keeps the table."""
    script = str(ROOT / "benchmarks/topologies.py")
    subprocess.run([sys.executable, script, str(tmp_path)], cwd=ROOT, check=True)
