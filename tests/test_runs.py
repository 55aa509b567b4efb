"""The command line, with real engines, real ranks and real files.

A run has few steps and serves many tests.
"""

import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, lines, logs, run, torchrun, trace
from transformers import AutoModelForCausalLM, AutoTokenizer

from report import load_rollouts, metrics

TIMES = ("_s", "per_second")  # endings of the metrics that are times
SMALL = ["--prompts_per_step=6", "--group_size=4", "--eval_size=12"]
SMALL += ["--save_rollouts=true", "--check_weights=true"]
TWICE = ["--steps=3", "--deterministic=true", "--eval_every=2", "--save_every=2", *SMALL]


def good(done, folder):
    assert done.returncode == 0, done.stderr[-2000:] + logs(folder)
    return folder


def learned(folder):
    """The metrics of each step that are not times."""
    steps = [x for x in lines(folder) if "loss" in x]
    return [{k: v for k, v in x.items() if not k.endswith(TIMES)} for x in steps]


def evaluations(folder):
    return [x for x in lines(folder) if "eval_reward" in x]


def said_by_the_failed(done):
    """The one line on the screen of a run that failed."""
    said = [line for line in done.stderr.splitlines() if line.startswith("nanoforge:")]
    assert done.returncode != 0 and len(said) == 1, done.stderr[-2000:]
    return said[0]


def assert_same_run(a, b):
    """Bitwise: metrics that are not times, evaluations, samples, tables, the exported model."""
    assert learned(a) == learned(b) and evaluations(a) == evaluations(b)
    assert lines(a, "samples.jsonl") == lines(b, "samples.jsonl")
    for step in range(len(learned(a))):
        one, two = (load_rollouts(f / "rollouts" / str(step)).columns() for f in (a, b))
        assert all(torch.equal(values, two[name]) for name, values in one.items())
    one, two = ((f / "model/model.safetensors").read_bytes() for f in (a, b))
    assert one == two


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The default topology, on-policy, deterministic: the same command two times."""
    base = tmp_path_factory.mktemp("twice")
    return [good(run(3, "grpo.py", f"--run_dir={base}/{k}", *TWICE), base / k) for k in "ab"]


def test_same_command_same_run_bitwise(twice):
    assert len(learned(twice[0])) == 3
    assert_same_run(*twice)


def test_a_resumed_run_is_the_uninterrupted_run_bitwise(twice, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(twice[0], folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "rollouts/2")
    good(run(3, "grpo.py", f"--run_dir={folder}", "--resume=auto", *TWICE), folder)
    both = [[x for x in trace(f) if x["name"] == "collect"] for f in (folder, twice[0])]
    assert [x["args"]["step"] for x in both[0]] == [0, 1, 2]  # what is done again is forgotten
    assert [x == y for x, y in zip(*both)] == [True, True, False]  # step 2 alone was done again
    assert_same_run(folder, twice[0])


def test_engine_and_trainer_agree(twice):
    worst = [x["mismatch_max"] for x in learned(twice[0])]
    assert 0 < max(worst) < 1e-4  # two programs, not one compared with itself
    checks = [x["name"] for x in trace(twice[0])].count("check")  # bit-equal, tied ones included
    assert checks == 3 * 4  # on each rank, after each sync


def texts(table):
    """Each row as its tokens' texts."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
    rows = zip(table.tokens, table.length, strict=True)
    return [tokenizer.convert_ids_to_tokens(tokens[:n]) for tokens, n in rows]


def test_only_sampled_tokens_are_trained(twice):
    """From the text alone: prompts and `=value` are given; brackets, answers, EOS are sampled."""
    turns = 0
    for step in range(3):
        table = load_rollouts(twice[0] / "rollouts" / str(step))
        for i, pieces in enumerate(texts(table)):
            given, inside = True, False  # the prompt is given
            for t, (piece, following) in enumerate(zip(pieces, [*pieces[1:], ""])):
                assert bool(table.mask[i, t]) != given, (step, i, t, pieces)
                if given and not inside and piece == "=":
                    given = False  # the prompt ends with its =
                elif piece == "]" and following == "=":
                    given, inside, turns = True, True, turns + 1
                elif inside and following and not following.isdigit() and following != "-":
                    given = inside = False
            assert pieces[-1] != "<eos>" or table.mask[i, len(pieces) - 1]
    assert turns > 10


def test_versions_groups_and_ages_on_policy(twice):
    for step in range(3):
        table = load_rollouts(twice[0] / "rollouts" / str(step))
        assert (table.version[table.mask] == step).all()
        assert (table.version[~table.mask] == -1).all()
        assert ((table.index >> 32) == step).all()
        assert (table.index & 0xFFFFFFFF).tolist() == [s for s in range(6) for _ in range(4)]
        assert table.reply.tolist() == [0, 1, 2, 3] * 6
    assert all(x["policy_age_max"] == 0 for x in learned(twice[0]))


def test_advantages_are_the_groups(twice):
    table = load_rollouts(twice[0] / "rollouts/0")
    for g in range(6):
        rows = slice(4 * g, 4 * g + 4)
        reward, mask = table.reward[rows], table.mask[rows]
        expected = (reward - reward.mean()) / (reward.std() + 1e-4)
        assert torch.allclose(table.advantage[rows], expected[:, None] * mask, atol=1e-6)


def test_evaluations_name_their_version(twice):
    evals = evaluations(twice[0])
    assert [x["step"] for x in evals] == [0, 2, 3] and all(x["eval_rows"] == 12 for x in evals)
    assert all(0 <= x["eval_stderr"] < 0.2 for x in evals)


def undocumented(folder):
    """Names in metrics.jsonl that the table of metrics does not explain."""
    explained = {name.strip("`") for names, *_ in metrics()[0] for name in names.split(", ")}
    return {key for line in lines(folder) for key in line} - explained - {"step"}


def test_every_metric_of_a_run_is_documented(twice):
    assert not undocumented(twice[0])


def test_what_a_run_leaves_behind(twice):
    folder = twice[0]
    files = ["config.yaml", "metrics.jsonl", "samples.jsonl", "trace.json", "curves.png"]
    for name in [*files, "report.html", "checkpoints/step-2"]:
        assert (folder / name).exists(), name
    assert "vllm" in (folder / "config.yaml").read_text()
    sample = lines(folder, "samples.jsonl")[0]
    assert {"step", "problem", "turns", "rewards", "advantage"} <= sample.keys()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = AutoModelForCausalLM.from_pretrained(ROOT / "assets/calculator")
    moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), before.parameters())]
    assert all(0 < m < 0.1 for m in moved)
    assert AutoTokenizer.from_pretrained(folder / "model").encode("1+1=")


def test_an_earlier_run_is_kept(twice, tmp_path):
    """The name is taken: the old folder is set aside. (The run stops at its task's prompts.)"""
    folder = tmp_path / "r"
    shutil.copytree(twice[1], folder)
    done = run(3, "grpo.py", "--max_prompt_tokens=2", f"--run_dir={folder}")
    assert "left out all of 20000 train prompts" in said_by_the_failed(done)
    assert (tmp_path / "r.1/model/model.safetensors").exists()


LLAMA = pytest.param("llama", (2,), 4, marks=pytest.mark.long)  # `make test`: in test_docs.py


@pytest.mark.parametrize(("name", "eos", "max_turns"), [LLAMA, ("qwen2", (2, 7), 1)])
def test_other_architectures(tiny, tmp_path, name, eos, max_turns):
    """Untied heads, biases, several EOS ids: parity, and bit-equal weights after each sync."""
    model = tiny(name, eos)
    args = [*SMALL, "--steps=2", "--lr=0.01", "--max_new_tokens=24", f"--max_turns={max_turns}"]
    done = run(2, "grpo.py", *args, f"--model={model}", f"--run_dir={tmp_path}/r")
    folder = good(done, tmp_path / "r")
    assert all(0 < x["mismatch_max"] < 1e-4 for x in learned(folder))
    table = load_rollouts(folder / "rollouts/1")
    last = table.tokens[torch.arange(len(table)), table.length - 1]
    ends, cut = (set(last[of].tolist()) for of in (table.finished, ~table.finished))
    bracket = 18  # a call that is none: the environment, asked after the last turn too, ends it
    assert ends == {*eos, bracket} and not cut & {*eos}
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert exported.generation_config.eos_token_id in (list(eos), *eos)


def test_the_default_learns(tmp_path):
    args = ["--steps=14", "--lr_schedule=constant", f"--run_dir={tmp_path}/r"]
    done = run(3, "grpo.py", *args, timeout=400)
    rewards = [x["reward"] for x in learned(good(done, tmp_path / "r"))]
    before, after = sum(rewards[:2]) / 2, sum(rewards[-3:]) / 3
    assert before < 0.45 and after > before + 0.25, rewards
    assert "held-out accuracy" in done.stderr and "tokens per second" in done.stderr
    noise = [line for line in done.stderr.splitlines() if "WARNING" in line or "INFO" in line]
    assert not noise


def leaves_nothing(group):
    return subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout == ""


SIGINT = pytest.param(signal.SIGINT, marks=pytest.mark.long)


@pytest.mark.parametrize("number", [SIGINT, signal.SIGTERM])
def test_told_to_stop_it_saves_and_resumes(tmp_path, number):
    folder = tmp_path / "r"
    args = [*SMALL, f"--run_dir={folder}", "--eval_size=0", "--check_weights=false"]
    command = torchrun(3, "grpo.py", *args, "--steps=200")
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.exists() and len(lines(folder)) >= 2):
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)  # as Slurm does
    start = time.monotonic()
    err = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 10 and leaves_nothing(process.pid)
    done = [x["step"] for x in lines(folder)]
    assert f"stopped before step {done[-1] + 1}" in err, err[-3000:]
    assert "reward" in err.split("stopped before")[1]  # the table of what was learned
    assert (folder / f"checkpoints/step-{done[-1] + 1}/about.json").exists()
    if number == signal.SIGTERM:
        more = done[-1] + 3
        good(run(3, "grpo.py", *args, f"--steps={more}", "--resume=auto"), folder)
        assert [x["step"] for x in lines(folder)] == list(range(more))


def test_a_reward_that_raises_is_named_with_its_row(tmp_path):
    (tmp_path / "bad.py").write_text(
        "from examples.calculator import Calculator\n"
        "class Bad(Calculator):\n"
        "    def correct(self, e):\n"
        "        return 1 / 0\n"
    )
    args = [f"--task={tmp_path}/bad.py:Bad", f"--run_dir={tmp_path}/r", "--eval_size=0"]
    said = said_by_the_failed(run(2, "grpo.py", *args))
    assert "correct raised ZeroDivisionError" in said and "rank 0 (generator)" in said
    assert "step 0, slot" in said


@pytest.mark.long  # `make test`: during a save, in test_checkpoints.py
def test_a_full_disk(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "samples.jsonl").symlink_to("/dev/full")
    done = run(2, "grpo.py", f"--run_dir={folder}", *SMALL, "--eval_size=0")
    assert "No space left on device" in said_by_the_failed(done)


def test_sft_learns_and_its_model_loads(tmp_path):
    args = ["--steps=40", "--eval_every=20", "--eval_size=64", f"--run_dir={tmp_path}/r"]
    folder = good(run(2, "sft.py", *args), tmp_path / "r")
    rows = lines(folder)
    assert rows[0]["loss"] > 3 > 1.9 > rows[-1]["loss"] and not undocumented(folder)
    assert [x["step"] for x in rows if "eval_loss" in x] == [19, 39]
    AutoModelForCausalLM.from_pretrained(folder / "model")
