"""What grpo.py's settings make of a batch, in real runs: reference, teacher, several updates,
refills, another loss; and the loss lab on what such a run left behind.
"""

import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, lines, run
from test_runs import good, learned
from transformers import AutoTokenizer

import grpo
import report
from report import load_rollouts
from tasks import load_task

FEW = ["--steps=2", "--prompts_per_step=6", "--group_size=4", "--eval_size=0"]


def start(folder, *args, ranks=3):
    keep = ["--save_rollouts=true", f"--run_dir={folder}"]
    return good(run(ranks, "grpo.py", *FEW, *keep, *args), folder)


def table(folder, step):
    return load_rollouts(folder / f"rollouts/{step}")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two updates a batch and two epochs, the trainer's own old policy, a reference, refills."""
    args = ["--minibatches=2", "--epochs_per_batch=2", "--old_policy=trainer"]
    args += ["--correction=truncate", "--kl_coef=0.1", "--max_refills=3"]
    return start(tmp_path_factory.mktemp("several") / "r", *args)


def test_reference_and_old_policy_are_the_first_and_the_latest_weights(several):
    zero, one = table(several, 0), table(several, 1)
    close = {"atol": 1e-4, "rtol": 0}
    assert torch.allclose(zero.ref_logprobs, zero.old_logprobs, **close)
    for rows in (zero, one):  # before the batch's first update the trainer is the generator
        assert rows.old_logprobs[rows.mask].min() < -0.01
        assert torch.allclose(rows.old_logprobs, rows.logprobs, **close)
    assert (one.ref_logprobs - one.old_logprobs).abs().max() > 0.05
    first, second = learned(several)
    assert min(x[k] for x in (first, second) for k in ("kl_old", "kl_ref")) > 1e-4
    assert abs(first["mismatch_kl"]) < 1e-8 and first["ratio_max"] > 1.01  # of the later updates


def test_mini_batches_are_whole_groups(several):
    rows = table(several, 0)
    assert rows.minibatch.tolist() == [0] * 12 + [1] * 12
    assert learned(several)[0]["tokens"] == int(rows.mask.sum())  # though trained twice


def test_groups_that_teach_nothing_are_drawn_again(several):
    settings = yaml.safe_load((several / "config.yaml").read_text())
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
    task, drawn = load_task(grpo.Config(**settings)), 0
    for step in range(2):
        rows, metrics = table(several, step), learned(several)[step]
        equal = report.equal_groups(rows)
        assert metrics["equal_groups"] == pytest.approx(float(equal.float().mean()))
        for slot, ids in enumerate(rows.tokens[::4]):
            words = "".join(tokenizer.convert_ids_to_tokens(ids))
            tries = [task.problem(step, slot, attempt)["prompt"] for attempt in range(4)]
            attempt = next(i for i, p in enumerate(tries) if p in words)
            assert attempt == 3 or not equal[slot]  # it gave up, or found a group that teaches
            drawn += attempt
    assert drawn == sum(x.get("refills", 0) for x in learned(several)) > 0


@pytest.mark.long
def test_a_teacher_alone(tiny, tmp_path):
    """Another architecture with the same tokens; one reply a prompt is enough."""
    args = ["--group_size=1", f"--teacher={tiny('llama')}", "--steps=1"]
    args += ["--loss=examples/distill.py:alone"]
    folder = start(tmp_path / "r", *args, ranks=2)
    rows = table(folder, 0)
    gain = ((rows.teacher_logprobs - rows.logprobs) * rows.mask).sum() / rows.mask.sum()
    assert learned(folder)[0]["teacher_gain"] == pytest.approx(gain.item(), rel=1e-4)
    assert gain.abs() > 0.1 and not rows.advantage.any()
    assert learned(folder)[0]["grad_norm"] > 1e-3


def test_loss_lab_finds_the_gradient_that_was_trained(tmp_path):
    """At step 1 with its checkpoint: the same norm as in the log, from another program."""
    folder = start(tmp_path / "r", "--loss=gspo", "--save_every=1", ranks=2)
    lab = [sys.executable, "examples/loss_lab.py", f"{folder}/rollouts/1", "--loss=gspo,reinforce"]
    done = subprocess.run(lab, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{folder}/checkpoints/step-1" in done.stdout
    gspo, reinforce = (line.split() for line in done.stdout.splitlines()[-2:])
    assert gspo[0] == "gspo" and reinforce[0] == "reinforce"
    assert float(gspo[1]) == pytest.approx(lines(folder)[1]["grad_norm"], abs=2e-4)
    assert float(gspo[-2]) == 1 and -1 <= float(gspo[-1]) < 1
