"""Checkpoints: what stays, what loads, and what a crash, a full disk or damage leaves of them."""

import json
import os
import shutil
import subprocess
import threading
import time

import psutil
import pytest
import torch
from conftest import ROOT, SFT, lines, logs, run, torchrun
from safetensors.torch import load_file
from test_record import checkpoint, start
from test_runs import good, said_by_the_failed
from transformers import AutoTokenizer

from data import Examples
from rollouts import Rollouts, gather
from sft import Config, sft_loss
from trainer import Trainer
from weights import stream

TIMES = ("_s", "per_second")  # endings of the metrics that are times


def learned(folder):
    return [{k: v for k, v in x.items() if not k.endswith(TIMES)} for x in lines(folder)]


def killed_in_a_save(folder, rank: int) -> bool:
    """A run whose rank is killed while its third checkpoint is being written; False if the write
    was over before the signal was there.
    """
    process = subprocess.Popen(
        torchrun(2, "sft.py", *SFT, f"--run_dir={folder}"), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    partial, deadline = folder / "checkpoints/partial-3", time.monotonic() + 120
    while not partial.exists():
        assert process.poll() is None and time.monotonic() < deadline, logs(folder)
        time.sleep(0.001)
    ranks = psutil.Process(process.pid).children()
    next(p for p in ranks if p.environ()["RANK"] == str(rank)).kill()
    assert process.wait(60) != 0
    assert not any(p.is_running() for p in ranks)
    return partial.exists()


@pytest.mark.long  # test_faults has the same by torchrun's restart
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_during_a_save_a_run_resumes_to_the_same_result_bitwise(sft, tmp_path, rank):
    for attempt in range(5):
        folder = tmp_path / f"r{attempt}"
        if killed_in_a_save(folder, rank):
            break
    assert not (folder / "checkpoints/step-3").exists()  # complete or absent
    done = run(2, "sft.py", *SFT, "--resume=auto", f"--run_dir={folder}")
    good(done, folder)
    assert "starting at step 0" not in done.stderr
    assert learned(folder) == learned(sft)
    one, two = ((f / "model/model.safetensors").read_bytes() for f in (folder, sft))
    assert one == two
    assert not list((folder / "checkpoints").glob("partial-*"))


def test_what_is_written_is_what_was_there(world, tmp_path):
    """Training goes on while the thread writes: the checkpoint must not see it."""
    trainer = Trainer(Config(model=str(ROOT / "assets/calculator")), world)
    before = {name: full.clone() for name, full in stream(trainer)}
    write, gate = trainer.write, threading.Event()
    trainer.write = lambda *job: gate.wait(60) and write(*job)
    trainer.save(tmp_path)
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p.fill_(7.0)
    assert not (tmp_path / "step-0").exists() and world.writing()
    gate.set()
    trainer.saved()
    assert not world.writing()
    trainer.load(tmp_path / "step-0")
    assert all(torch.equal(full, before[name]) for name, full in stream(trainer))


def test_a_full_disk_during_a_save(small_disk, tmp_path):
    """7 MiB do not fit: the run ends with the reason, and no half of a checkpoint is taken."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r/checkpoints").symlink_to(small_disk)
    said = said_by_the_failed(run(2, "sft.py", *SFT, f"--run_dir={tmp_path}/r"))
    assert "was not written: " in said and "No space left on device" in said
    assert not list(small_disk.glob("step-*")) and not list(small_disk.glob("partial-*"))


def test_the_newest_checkpoints_and_the_best_stay(sft):
    names = {p.name for p in (sft / "checkpoints").iterdir()}
    losses = {x["step"] + 1: x["eval_loss"] for x in lines(sft)}
    best = min(losses, key=losses.get)
    assert names == {"step-3", "step-4", f"step-{best}", "best"}
    assert os.readlink(sft / "checkpoints/best") == f"step-{best}"


def test_the_best_stays_among_newer_ones(world, tmp_path):
    run = start(world, tmp_path / "r", keep_checkpoints=1)
    for step in (1, 2, 3, 4):
        checkpoint(run.folder, step)
    run.rows = [
        {"step": step - 1, "eval_loss": loss} for step, loss in ((1, 0.9), (2, 0.3), (3, 0.5))
    ]
    run.prune()
    assert {p.name for p in (run.folder / "checkpoints").iterdir()} == {"best", "step-2", "step-4"}
    run.evals = {3: (0.9, 0.1)}  # a reward, which is better when it is larger
    checkpoint(run.folder, 3)
    run.prune()
    assert os.readlink(run.folder / "checkpoints/best") == "step-3"
    assert Config().keep_checkpoints == 2


def test_a_checkpoint_loads_onto_another_number_of_trainers(sft, world):
    """Two wrote it, one reads it: weights as exported; and both moments of AdamW."""
    trainer = Trainer(Config(model=str(ROOT / "assets/blank")), world)
    assert trainer.problem(sft / "checkpoints/step-4") == ""
    trainer.load(sft / "checkpoints/step-4")
    exported = load_file(sft / "model/model.safetensors")
    assert all(torch.equal(full, exported[name]) for name, full in stream(trainer))
    states = [trainer.optimizer.state[p] for p in trainer.policy.parameters()]
    assert all(s["step"] == 4 and s["exp_avg"].full_tensor().any() for s in states)
    assert all((s["exp_avg_sq"].full_tensor() >= 0).all() for s in states) and trainer.version == 4


def test_the_best_is_resumed_by_its_link(sft, world, tmp_path):
    folder = shutil.copytree(sft, tmp_path / "r", symlinks=True)
    run = start(world, folder, resume=f"{folder}/checkpoints/best")
    best = int(os.readlink(folder / "checkpoints/best").removeprefix("step-"))
    assert run.resume(Trainer(Config(model=str(ROOT / "assets/blank")), world)) == best
    assert len(lines(folder)) == best  # the run goes on in its folder


@pytest.mark.parametrize("damage", ["cut", "missing", "longer", "noise", "about", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    sft, world, tmp_path, capfd, damage
):
    shutil.copytree(sft, tmp_path / "r", symlinks=True)
    last = tmp_path / "r/checkpoints/step-4"
    file = sorted(last.glob("*.safetensors"))[1]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "missing":
        file.unlink()
    elif damage == "noise":
        file.write_bytes(os.urandom(file.stat().st_size))
    elif damage == "longer":  # a file beside the tensors
        (last / "about.json").write_text((last / "about.json").read_text().replace(": 3", ": 13"))
    elif damage == "about":
        (last / "about.json").write_text("{")
    model = ROOT / "assets/blank"
    if damage == "foreign":
        model = shutil.copytree(model, tmp_path / "blank")
        settings = json.loads((model / "config.json").read_text())
        settings["intermediate_size"] *= 2
        (model / "config.json").write_text(json.dumps(settings))
    run = start(world, tmp_path / "r", resume="auto")
    trainer = Trainer(Config(model=str(model)), world)
    if damage == "foreign":  # as the one before is: what the run has made stays
        with pytest.raises(ValueError, match="step-3: of another model .*--resume=no"):
            run.resume(trainer)
        assert len(lines(tmp_path / "r")) == len(lines(sft))
        return
    first, said = run.resume(trainer), capfd.readouterr().err
    assert f"{last}: damaged" in said
    assert first == 3 == trainer.version


def test_a_gradient_that_is_not_finite_moves_nothing(world):
    """Skipped; one that is finite begins the count anew; after max_skipped in a row it ends."""
    trainer = Trainer(Config(model=str(ROOT / "assets/calculator"), max_skipped=2), world)
    before = [p.full_tensor().clone() for p in trainer.policy.parameters()]

    def update(value):
        for p in trainer.policy.parameters():
            p.grad = torch.full_like(p, value)
        return trainer.finite([trainer.update()])

    assert update(float("nan")) == update(float("inf")) == []
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(trainer.policy.parameters(), before))
    assert update(0.1) != [] and update(float("nan")) == update(float("nan")) == []
    with pytest.raises(FloatingPointError, match="norm is nan, 3 times in a row"):
        update(float("nan"))


def test_a_checkpoint_by_the_clock(world, tmp_path):
    """The writer's clock; the others learn it from `gather`."""
    run = start(world, tmp_path / "r", save_every=0, save_minutes=5)
    trainer = Trainer(Config(model=str(ROOT / "assets/calculator")), world)
    run.last_save = time.time() - 4 * 60
    for step, saved in ((1, []), (2, []), (3, ["step-3"]), (4, ["step-3"])):
        gather(Rollouts(), world, 100)
        trainer.version = step
        run.save(trainer, step)
        trainer.saved()
        assert [p.name for p in (run.folder / "checkpoints").glob("step-*")] == saved
        if step == 1:  # the next save finds that it is time, the gather after it says so
            run.last_save -= 2 * 60


def test_a_loss_draws_the_same_numbers_after_a_resume(world):
    """They have names, the seed's and the step's, whatever was drawn before."""
    cfg, drawn = Config(model=str(ROOT / "assets/calculator"), rows_per_step=4, eval_size=0), []
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)

    def loss(logprobs, rows, cfg):
        drawn.append(torch.rand(3).tolist())
        return sft_loss(logprobs, rows, cfg)

    for step in (0, 1, 1):
        trainer, data = Trainer(cfg, world, tokenizer), Examples(cfg, tokenizer)
        trainer.version = step
        torch.rand(step + 5)
        trainer.step(gather(data.batch(step), world, 4096), loss)
    assert drawn[1] == drawn[2] != drawn[0]
