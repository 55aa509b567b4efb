"""The command line, with real engines, real ranks and real files. Three steps at most; a run serves
many tests.
"""

import json
import os
import pathlib
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, lines, logs, run, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts import load_rollouts

TIMES = ("_s", "per_second")  # endings of the metrics that are times
SMALL = [
    "--prompts_per_step=6",
    "--group_size=4",
    "--eval_size=12",
    "--save_rollouts=true",
    "--check_weights=true",
]


def good(done, folder):
    assert done.returncode == 0, done.stderr[-2000:] + logs(folder)
    return folder


def learned(folder):
    return [
        {k: v for k, v in x.items() if not k.endswith(TIMES)}
        for x in lines(folder)
        if "reward" in x
    ]


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The default topology, on-policy, deterministic: the same command two times."""
    base = tmp_path_factory.mktemp("twice")
    args = ["--steps=3", "--deterministic=true", "--eval_every=2", "--save_every=2", *SMALL]
    return [good(run(3, "grpo.py", f"--run_dir={base}/{k}", *args), base / k) for k in "ab"]


def test_same_command_same_run_bitwise(twice):
    a, b = twice
    assert learned(a) == learned(b) and len(learned(a)) == 3
    assert [x for x in lines(a) if "eval_reward" in x] == [
        x for x in lines(b) if "eval_reward" in x
    ]
    assert lines(a, "samples.jsonl") == lines(b, "samples.jsonl")
    assert (a / "model/model.safetensors").read_bytes() == (
        b / "model/model.safetensors"
    ).read_bytes()
    for step in range(3):
        one, two = (load_rollouts(f / "rollouts" / str(step)) for f in (a, b))
        assert all(torch.equal(v, two.columns()[k]) for k, v in one.columns().items())


def test_engine_and_trainer_agree(twice):
    assert all(x["mismatch_max"] < 1e-4 for x in learned(twice[0]))
    assert (
        max(x["mismatch_max"] for x in learned(twice[0])) > 0
    )  # two programs, not one compared with itself
    spans = [
        s["name"]
        for s in json.loads((twice[0] / "trace.json").read_text().rstrip().rstrip(",") + "]")
    ]
    assert (
        spans.count("check") == 3 * 4
    )  # on each rank, after each sync: bit-equal (tied embeddings included)


def test_only_sampled_tokens_are_trained(twice):
    """From the text alone: brackets, answers and the EOS are the policy's; prompts and `=value` are
    not.
    """
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
    turns = 0
    for step in range(3):
        table = load_rollouts(twice[0] / "rollouts" / str(step))
        for i in range(len(table)):
            pieces = tokenizer.convert_ids_to_tokens(table.tokens[i, : table.length[i]])
            given, inside = True, False  # the prompt is given
            for t, piece in enumerate(pieces):
                assert bool(table.mask[i, t]) != given, (step, i, t, pieces)
                if t and given and not inside and piece == "=":
                    given = False  # the prompt ends with its =
                elif piece == "]" and t + 1 < len(pieces) and pieces[t + 1] == "=":
                    given, inside, turns = True, True, turns + 1
                elif (
                    inside
                    and t + 1 < len(pieces)
                    and not pieces[t + 1].isdigit()
                    and pieces[t + 1] != "-"
                ):
                    given = inside = False
            assert pieces[-1] != "<eos>" or table.mask[i, len(pieces) - 1]
            assert table.finished[i] == (pieces[-1] == "<eos>" or pieces[-1] == "]")
    assert turns > 10


def test_versions_groups_and_ages_on_policy(twice):
    for step in range(3):
        table = load_rollouts(twice[0] / "rollouts" / str(step))
        assert (table.version[table.mask] == step).all() and (
            table.version[~table.mask] == -1
        ).all()
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
    evals = [x for x in lines(twice[0]) if "eval_reward" in x]
    assert [x["step"] for x in evals] == [0, 2, 3] and all(x["eval_rows"] == 12 for x in evals)
    assert all(0 <= x["eval_stderr"] < 0.2 for x in evals)


def test_what_a_run_leaves_behind(twice):
    folder = twice[0]
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "trace.json",
        "curves.png",
        "checkpoints/step-2",
    ):
        assert (folder / name).exists(), name
    assert "vllm" in (folder / "config.yaml").read_text()
    sample = lines(folder, "samples.jsonl")[0]
    assert {"step", "problem", "turns", "rewards", "advantage"} <= sample.keys()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = AutoModelForCausalLM.from_pretrained(ROOT / "assets/calculator")
    moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), before.parameters())]
    assert all(0 < m < 0.1 for m in moved)
    assert AutoTokenizer.from_pretrained(folder / "model").encode("1+1=")


def test_an_earlier_run_is_kept(twice):
    """The name is taken: the old folder is set aside, never overwritten. (The run stops at its
    task's first prompt.)
    """
    folder = twice[1]
    args = ["--max_prompt_tokens=2", f"--run_dir={folder}"]
    done = run(3, "grpo.py", *args)
    assert done.returncode != 0 and "every train prompt is longer than" in done.stderr
    assert (folder.with_name(folder.name + ".1") / "model/model.safetensors").exists()


def policy_at(folder, step, path):
    """The exported architecture with the weights of a checkpoint."""
    import torch.distributed.checkpoint as dcp

    model = AutoModelForCausalLM.from_pretrained(path)
    if step:
        state = {"policy": {f"lm.{n}": p.data for n, p in model.named_parameters()}}
        dcp.load(state, checkpoint_id=folder / "checkpoints" / f"step-{step}", no_dist=True)
    return model


def test_inflight(tmp_path):
    """Age 1: weights land while rows run. No token is too old, and each is of the version that its
    column names.
    """
    slow = [
        "--max_num_seqs=16",
        "--prompts_per_step=24",
        "--group_size=8",
        "--max_policy_age=1",
        "--lr=0.01",
        "--save_every=1",
        "--steps=4",
        f"--run_dir={tmp_path}/r",
    ]
    folder = good(run(3, "grpo.py", *SMALL, *slow, "--eval_size=0"), tmp_path / "r")
    mixed, old_error, new_error = 0, 0.0, 0.0
    for step in range(4):
        table = load_rollouts(folder / "rollouts" / str(step))
        age = step - table.version[table.mask]
        assert age.min() >= 0 and age.max() <= 1
        assert table.version[table.mask].min() >= 0  # nothing is sampled before the first sync
        for i in range(len(table)):
            sampled = table.version[i][table.mask[i]]
            assert (sampled.diff() >= 0).all()
            if sampled[0] == sampled[-1]:
                continue
            mixed += 1
            model = policy_at(folder, int(sampled[0]), ROOT / "assets/calculator")
            n = int(table.length[i])
            with torch.no_grad():
                logp = model(input_ids=table.tokens[i : i + 1, :n]).logits[0].log_softmax(-1)
            at = table.mask[i, :n].nonzero().flatten()
            error = (logp[at - 1, table.tokens[i, at]] - table.logprobs[i, at]).abs()
            first_new = int((sampled == sampled[0]).sum())
            old_error = max(old_error, float(error[:first_new].max()))  # the old policy, exactly
            new_error = max(new_error, float(error[first_new]))  # behind the border: another one
    assert mixed >= 3, "no row was running when weights landed"
    assert old_error < 1e-4 < 1e-2 < new_error
    assert any(x["policy_age"] > 0 for x in learned(folder))


@pytest.mark.parametrize(("name", "eos"), [("llama", (2,)), ("qwen2", (2, 7))])
def test_other_architectures(tiny, tmp_path, name, eos):
    """Untied heads, biases, several EOS ids: parity and bit-equal weights after each sync."""
    model = tiny(name, eos)
    args = [
        "--steps=2",
        "--lr=0.01",
        f"--model={model}",
        f"--run_dir={tmp_path}/r",
        "--max_new_tokens=24",
    ]
    folder = good(run(2, "grpo.py", *SMALL, *args), tmp_path / "r")
    assert all(0 < x["mismatch_max"] < 1e-4 for x in learned(folder))
    table = load_rollouts(folder / "rollouts/1")
    last = table.tokens[torch.arange(len(table)), table.length - 1][table.finished]
    assert set(eos) <= set(last.tolist()) <= {*eos, 18}  # 18 is the calculator's "]"
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert exported.generation_config.eos_token_id in (list(eos), *eos)


def test_the_default_learns(tmp_path):
    done = run(
        3, "grpo.py", "--steps=14", "--lr_schedule=constant", f"--run_dir={tmp_path}/r", timeout=400
    )
    folder = good(done, tmp_path / "r")
    rewards = [x["reward"] for x in learned(folder)]
    assert sum(rewards[:2]) / 2 < 0.45 and sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.25, (
        rewards
    )
    assert "held-out accuracy" in done.stderr and "tokens per second" in done.stderr
    noise = [line for line in done.stderr.splitlines() if "WARNING" in line or "INFO" in line]
    assert not noise


def leaves_nothing(group):
    return subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_saves_and_resumes(tmp_path, number):
    folder = tmp_path / "r"
    args = [*SMALL, f"--run_dir={folder}", "--eval_size=0", "--check_weights=false"]
    process = subprocess.Popen(
        torchrun(3, "grpo.py", *args, "--steps=200"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (folder / "metrics.jsonl").exists() and len(lines(folder)) >= 2
    ):
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)  # as Slurm does
    start = time.monotonic()
    err = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 10 and leaves_nothing(process.pid)
    done = [x["step"] for x in lines(folder)]
    assert (
        f"stopped before step {done[-1] + 1}" in err and "reward" in err.split("stopped before")[1]
    ), err[-3000:]
    assert (folder / f"checkpoints/step-{done[-1] + 1}/about.json").exists()
    if number == signal.SIGTERM:
        more = done[-1] + 3
        good(run(3, "grpo.py", *args, f"--steps={more}", "--resume=auto"), folder)
        assert [x["step"] for x in lines(folder)] == list(range(more))


def test_a_reward_that_raises_is_named_with_its_row(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import tasks\n"
        "class Bad(tasks.Calculator):\n"
        "    def correct(self, e):\n"
        "        return 1 / 0\n"
    )
    args = [f"--task={tmp_path}/bad.py:Bad", f"--run_dir={tmp_path}/r", "--eval_size=0"]
    done = run(2, "grpo.py", *args)
    said = [line for line in done.stderr.splitlines() if line.startswith("nanoforge:")]
    assert done.returncode != 0 and len(said) == 1, done.stderr[-2000:]
    assert "correct raised ZeroDivisionError" in said[0] and "rank 0 (generator)" in said[0]
    assert "step 0, slot" in said[0]


def test_a_full_disk(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "samples.jsonl").symlink_to("/dev/full")
    done = run(2, "grpo.py", f"--run_dir={folder}", *SMALL, "--eval_size=0")
    said = [line for line in done.stderr.splitlines() if line.startswith("nanoforge:")]
    assert done.returncode != 0 and len(said) == 1 and "No space left on device" in said[0]


def test_sft_learns_and_its_model_loads(tmp_path):
    done = run(
        2, "sft.py", "--steps=40", f"--run_dir={tmp_path}/r", "--eval_every=20", "--eval_size=64"
    )
    folder = good(done, tmp_path / "r")
    metrics = lines(folder)
    assert metrics[0]["loss"] > 3 > 1.9 > metrics[-1]["loss"]
    assert [x["step"] for x in metrics if "eval_loss" in x] == [19, 39]
    assert pathlib.Path(folder / "model/model.safetensors").exists()
