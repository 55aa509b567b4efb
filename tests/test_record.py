"""The run folder, in one process: what is kept, set aside, said, exported."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from conftest import ROOT, lines
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import grpo
import report
import sft
import weights
from heartbeat import HEART
from record import Run
from rollouts import Rollouts
from runtime import say_what_failed
from trainer import Trainer

CALCULATOR = ROOT / "assets/calculator"


def start(world, folder, **settings) -> Run:
    """A run whose log does not take this process's output."""
    mine = os.dup(1), os.dup(2)
    settings = {"run_dir": str(folder), "model": str(CALCULATOR), **settings}
    run = Run(sft.Config(**settings), world)
    for kept, number in zip(mine, (1, 2)):
        os.dup2(kept, number), os.close(kept)
    HEART.screen = run.screen
    return run


def checkpoint(folder, step) -> str:
    path = folder / "checkpoints" / f"step-{step}"
    path.mkdir(parents=True)
    (path / "about.json").write_text(json.dumps({"step": step}))
    return str(path)


def told(**info) -> Rollouts:
    """What `gather` brings of a rank."""
    return Rollouts(infos=[{"rank": 0, "clock": {}, "spans": [], **info}])


@pytest.mark.parametrize(
    ("resume", "own", "restart", "starts", "keeps"),
    [
        ("no", 2, 0, None, False),
        ("auto", 2, 0, "own", True),
        ("auto", None, 0, None, False),  # nothing to go on from: set aside, not erased
        ("own", 2, 0, "own", True),
        ("given", 2, 0, "given", False),  # goes on another run's work
        ("no", None, 1, None, True),  # a restart goes on in its folder
        ("no", 2, 1, "own", True),
        ("given", None, 1, "given", True),  # crashed before its first save
        ("given", 2, 1, "own", True),
    ],
)
def test_where_a_run_starts(world, tmp_path, capfd, resume, own, restart, starts, keeps):
    folder, world.restart = tmp_path / "r", restart
    if restart:  # after a start that came to this folder
        world.store.set("nanoforge/folder", "chosen")
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n")
    places = {None: None, "given": checkpoint(tmp_path / "other", 7)}
    places["own"] = checkpoint(folder, own) if own else None
    run = start(world, folder, resume=places.get(resume, resume))
    assert run.checkpoint == places[starts]
    assert (folder / "metrics.jsonl").exists() == keeps
    assert (tmp_path / "r.1/metrics.jsonl").exists() != keeps
    without = "resume=auto: no checkpoint in" in capfd.readouterr().err
    assert without == (resume == "auto" and own is None)


def test_a_restart_before_the_folder_was_taken_is_a_start(world, tmp_path):
    """The first try died in its imports: what is in the folder is another run's."""
    for folder, restarted, lost in (("r", 1, True), ("r", 2, False)):
        world.restart = restarted
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.yaml").write_text("")
        own = checkpoint(tmp_path / folder, 2)
        assert (
            (start(world, tmp_path / folder).checkpoint is None)
            == lost
            != (pathlib.Path(own).exists())
        )


def test_a_stop_s_checkpoint_need_not_be_judged(world, tmp_path):
    """Its last evaluation was cut short; that of a crash is made again from the one before."""
    run = start(world, tmp_path / "r")
    run.cfg = grpo.Config(eval_every=5, resume="auto")
    before, last = (pathlib.Path(checkpoint(run.folder, step)) for step in (3, 6))
    assert run.unjudged(last) == "version 5 was not yet judged" and run.unjudged(before) == ""
    run.cfg.resume = run.checkpoint = str(last)  # the user's own word
    assert run.unjudged(last) == ""
    run.cfg.resume = "auto"
    trainer = Trainer(sft.Config(model=str(CALCULATOR)), world)
    trainer.version = 6
    run.stopped(trainer, 6, told())
    assert (last / "stopped").exists() and run.unjudged(last) == ""


def test_lines_of_steps_to_be_done_again_are_forgotten(world, tmp_path):
    run = start(world, tmp_path / "r")
    evaluation = {"step": 1, "eval_reward": 0.5, "eval_stderr": 0.1}
    report.append(run, "metrics.jsonl", {"step": 0}, {"step": 1}, evaluation, {"step": 2})
    with open(run.folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "rew')  # killed while writing
    for step in range(4):
        report.append_spans(run.folder, "trainer", {"rank": 0, "spans": [("train", 0, 1)]}, step)
    run.truncate(2)
    events = report.timeline(run.folder / "trace.json")["early"]
    assert [step for *_, step in events] == [1] and (run.folder / "trace.json").read_text()[
        0
    ] == "["
    assert lines(run.folder) == [{"step": 0}, {"step": 1}, evaluation]
    assert run.rows == [{"step": 0}, {"step": 1}] and run.evals == {1: (0.5, 0.1)}
    (run.folder / "metrics.jsonl").write_text('{"step": 0, "rew\n{"step": 1}\n')
    with pytest.raises(ValueError):  # torn in the middle: that was no kill
        run.truncate(2)


def test_stopped_says_what_is_true_and_keeps_evaluations(world, tmp_path, capfd):
    run = start(world, tmp_path / "r")
    trainer = Trainer(run.cfg, world)
    run.stopped(trainer, 0, told())
    said = capfd.readouterr().err
    assert "stopped before step 0; nothing to save" in said and "goes on" not in said
    assert not (run.folder / "checkpoints").exists()
    trainer.version = 1
    part = {"version": 0, "rewards": [1.0, 1.0, 0.0, 1.0], "of": 4}
    run.stopped(trainer, 1, told(evals=[part]))  # version 0's result came with the last rows
    assert "stopped before step 1; --resume=auto goes on from there" in capfd.readouterr().err
    again = start(world, tmp_path / "r", resume="auto")
    trainer.version = 0
    assert again.resume(trainer) == 1 and again.evals[0][0] == 0.75


@pytest.mark.parametrize("functions", [1, 2])
def test_the_end_table(world, tmp_path, capfd, functions):
    """Once, with this session's speed; a sum of several rewards is not called accuracy."""
    run = start(world, tmp_path / "r")
    each = {"reward/a": 0.25, "reward/b": 0.25} if functions > 1 else {}
    report.append(
        run, "metrics.jsonl", {"step": 0, "reward": 0.1, "loss": 0, "tokens": 1e9, **each}
    )
    run.truncate(1)
    part = {"version": 1, "rewards": [1.0, 0.0, 1.0, 1.0], "of": 4}
    run.log(1, {"reward": 0.5, "loss": 0.0, "tokens": 5000, **each}, told(evals=[part]))
    run.started = time.time() - 10
    say_what_failed(RuntimeError("first"), world, run)
    say_what_failed(RuntimeError("its consequence"), world, run)
    said = capfd.readouterr().err
    assert said.count("held-out") == 1 and said.count("nanoforge:") == 1
    assert f"held-out {'accuracy' if functions == 1 else 'reward'}  " in said
    assert ("accuracy=0.750" if functions == 1 else "eval_reward=0.750") in said
    speed = float(said.split(" tokens per second")[0].split()[-1].replace(",", ""))
    assert 400 < speed <= 500
    assert (run.folder / "curves.png").exists()


def test_a_failure_after_another_draws_the_results_and_says_nothing(world, tmp_path, capfd):
    run = start(world, tmp_path / "r")
    run.log(0, {"loss": 0.5, "tokens": 50}, told())
    world.count("failures")  # another rank's, whose line is the last one
    say_what_failed(RuntimeError("its consequence"), world, run)
    said = capfd.readouterr().err
    assert "at first" not in said and "nanoforge:" not in said
    assert (run.folder / "curves.png").exists()


STOPPED = """
import concurrent.futures, os, sys, time
import torch.distributed as dist
server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ["MASTER_PORT"] = str(server.port)
from heartbeat import HEART
HEART.start()
import sft
from record import Run
from runtime import World, watch
world = World(None)
world.connect()
run = Run(sft.Config(run_dir=sys.argv[1], stop_seconds=0.5), world)
watch(world, run)
HEART.enter(sys.argv[2])
if HEART.phase == "beside":  # a thread writes while a step is trained
    HEART.enter("train")
    world.write = concurrent.futures.Future()
run.say("ready")
while not world.stopping:
    time.sleep(0.05)
if HEART.phase == "no store":
    del server
time.sleep(2)
run.say("written")
HEART.enter("train")
world.write = None
time.sleep(20)
"""


@pytest.mark.parametrize(
    ("phase", "waits"),
    [
        ("train", False),
        ("no store", False),
        ("save", True),
        ("export", True),
        ("beside", True),
    ],
)
def test_what_is_being_written_is_awaited_after_a_signal(tmp_path, phase, waits):
    env = dict(TORCHELASTIC_RUN_ID="x", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path / "r"), phase],
        cwd=ROOT,
        env={**os.environ, **env},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = [process.stderr.readline()]
    while said[-1] not in ("ready\n", ""):
        said.append(process.stderr.readline())
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and ("written\n" in rest) == waits, (said, rest)
    if phase != "no store":  # its loss is another fault
        assert "cut short in train, stop_seconds=0.5 after the signal" in rest
    assert time.monotonic() - start < 10


def test_export_keeps_any_generation_config(world, tmp_path):
    """Many models ship top_p without do_sample, which transformers refuses to save."""
    shutil.copytree(CALCULATOR, tmp_path / "model")
    shipped = json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9})
    (tmp_path / "model/generation_config.json").write_text(shipped)
    cfg = sft.Config(model=str(tmp_path / "model"))
    trainer = Trainer(cfg, world, AutoTokenizer.from_pretrained(cfg.model))
    out = tmp_path / "out"
    weights.export(trainer, out, world)
    kept = GenerationConfig.from_pretrained(out)
    assert (kept.eos_token_id, kept.temperature, kept.top_p) == ([2, 7], 0.6, 0.9)
    assert AutoTokenizer.from_pretrained(out).encode("1+1=")
    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (CALCULATOR, out))
    assert all((a == b).all() for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert "export" in [name for name, *_ in world.spans]

    def fails(folder):
        raise OSError("disk full")

    trainer.tokenizer = types.SimpleNamespace(save_pretrained=fails)
    with pytest.raises(OSError, match="disk full"):
        weights.export(trainer, tmp_path / "torn", world)
    assert not (tmp_path / "torn").exists()  # complete or absent
    assert (tmp_path / "partial-torn/model.safetensors").exists()
