"""Faults, with real processes: every rank gone in 30 s, a last line that says why, nothing left.

`make test` runs a sample, `make test-all` every cell; it prints the matrix, which stands in
benchmarks/faults.md.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, SFT, logs, trace
from faults import DEADLINE, PHASES, SMALL, Watched, free_port
from test_runs import assert_same_run, good, learned, run

long = pytest.mark.long
# (script, ranks, rank) -> what it is and the phases that it has.
VICTIMS = {
    ("grpo.py", 3, 0): ("generator", "start build generate gather sync evaluate"),
    ("grpo.py", 3, 1): ("first trainer", "start gather train sync save"),
    ("grpo.py", 3, 2): ("second trainer", "start gather train sync save"),
    ("grpo.py", 2, 1): ("the only trainer", "train"),
    ("sft.py", 2, 0): ("rank 0 of SFT", "start gather train save evaluate"),
    ("sft.py", 2, 1): ("rank 1 of SFT", "train save"),
}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
SAMPLE = [("grpo.py", 3, 0, "generate", "kill")]
CELLS = [
    pytest.param(*who, phase, how, marks=[] if (*who, phase, how) in SAMPLE else long)
    for who, (_, phases) in VICTIMS.items()
    for phase in phases.split()
    for how in SIGNALS
]


@pytest.fixture
def watch(tmp_path):
    """A run under a watcher, of which nothing stays."""
    made = []

    def start(script, ranks, *args, **more):
        small = SMALL if script == "grpo.py" else SFT
        made.append(Watched(tmp_path / f"r{len(made)}", script, ranks, *small, *args, **more))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.mark.parametrize(("script", "ranks", "rank", "phase", "how"), CELLS)
def test_killed_or_stopped(watch, matrix, script, ranks, rank, phase, how):
    victim, early = VICTIMS[script, ranks, rank][0], phase in ("start", "build")
    more = (
        ["--eval_size=128", "--eval_samples=4"]
        if phase == "evaluate" and rank == 0 and ranks == 3
        else []
    )
    for _ in range(4):  # short phases are sometimes over before the signal is there
        watched = watch(script, ranks, *more)
        hit = watched.hit(rank, PHASES[phase], SIGNALS[how], steps=0 if early else 1)
        if hit in PHASES[phase]:
            break
        watched.close()
    seconds, code, line = watched.gone(), watched.end(), watched.last_line()
    matrix(f"kill -{'9' if how == 'kill' else 'STOP'}", victim, hit, seconds, code, line)
    assert seconds < DEADLINE and code != 0
    assert f"rank {rank}" in line and f"stopped in {hit}: it " in line
    assert ("died" if how == "kill" else "was suspended for 15 s") in line
    assert early or f"log/rank{rank}.log" in line
    watched.leaves_nothing()


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "r"
    return good(run(3, "grpo.py", *SMALL, f"--run_dir={folder}"), folder)


def model(folder):
    return (folder / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("rank", "phase", "how"),
    [(0, "train", "stop"), pytest.param(1, "save", "kill", marks=long)],
)
def test_sft_goes_on_by_itself(watch, matrix, sft, rank, phase, how):
    """--max-restarts: from its last checkpoint, to the same result, bitwise."""
    watched = watch("sft.py", 2, launcher=["--max-restarts=3"])
    watched.wait_for(rank, PHASES[phase], steps=2)
    hit = watched.hit(rank, PHASES[phase], SIGNALS[how], steps=2)
    seconds, code = watched.gone(), watched.end()
    matrix(
        f"kill -{how.upper()}, --max-restarts=3",
        f"rank {rank} of SFT",
        hit,
        seconds,
        code,
        "same result",
    )
    assert seconds < DEADLINE and code == 0, watched.said() + logs(watched.folder)
    assert f"rank {rank} (trainer)" in watched.last_line()
    assert "starting at step 0" not in watched.said()
    assert learned(watched.folder) == learned(sft) and model(watched.folder) == model(sft)
    watched.leaves_nothing()


@long
@pytest.mark.parametrize(
    ("rank", "phase", "how"),
    [
        (0, "generate", "kill"),
        (0, "sync", "stop"),
        (1, "train", "kill"),
        (1, "save", "stop"),
        (2, "save", "kill"),
    ],
)
def test_grpo_goes_on_by_itself(watch, matrix, grpo, rank, phase, how):
    watched = watch("grpo.py", 3, launcher=["--max-restarts=3"])
    hit = watched.hit(rank, PHASES[phase], SIGNALS[how], steps=2)
    seconds = watched.gone()
    watched.hit(1, {"collect", "arrive gather", "train"}, signal.SIGKILL, steps=3, attempt=1)
    again, code = watched.gone(), watched.end()
    matrix(
        f"kill -{how.upper()}, --max-restarts=3", f"rank {rank}", hit, seconds, code, "same result"
    )
    assert max(seconds, again) < DEADLINE and code == 0, watched.said() + logs(watched.folder)
    assert_same_run(watched.folder, grpo)
    watched.leaves_nothing()


@long
def test_at_age_1_a_resumed_run_trains_the_same_prompts(watch, tmp_path):
    """Rows in flight are sampled again, whole batches at a time, in the same order."""
    args = [*SMALL, "--max_policy_age=1"]
    whole = good(run(3, "grpo.py", *args, f"--run_dir={tmp_path}/whole"), tmp_path / "whole")
    watched = watch("grpo.py", 3, "--max_policy_age=1", launcher=["--max-restarts=1"])
    watched.hit(0, PHASES["generate"], signal.SIGKILL, steps=2)
    assert watched.end() == 0, watched.said()
    from report import load_rollouts

    for step in range(4):
        a, b = (load_rollouts(f / f"rollouts/{step}") for f in (whole, watched.folder))
        assert torch.equal(a.index, b.index) and torch.equal(a.reply, b.reply)
        assert [r[: r.index(16)] for r in a.tokens.tolist()] == [
            r[: r.index(16)] for r in b.tokens.tolist()
        ]


# ---------------------------------------------------------------- the user's code, memory, disk

TASK = """
import re, time
from examples.calculator import Calculator
class Mine(Calculator):
    def __init__(self, cfg):
        super().__init__(cfg)
        {init}
    def reply(self, e):
        {reply}
    def correct(self, e):
        {reward}
"""
LOSS = """
import torch
calls = 0
def mine(logprobs, rows, cfg):
    global calls
    calls += 1
    {loss}
    return -(rows.advantage * logprobs * rows.mask * rows.share[:, None]).sum(), {{}}
"""
USER = {  # fault -> (what the user's code does, settings, who fails, what the line says)
    "a reward raises": (dict(reward="return 1 / 0"), [], 0, "correct raised ZeroDivisionError"),
    "an environment raises": (dict(reply="return [][0]"), [], 0, "reply raised IndexError"),
    "a task raises": (dict(init="self.x = {}['a']"), [], None, "KeyError: 'a'"),
    "a reward never returns": (
        dict(reward="return float(re.match('(a+)+$', 'a' * 64 + 'b') is None)"),
        ["--task_seconds=2"],
        0,
        "correct took longer than task_seconds=2",
    ),
    "a reward ends its process": (
        dict(reward="import os; os._exit(3)"),
        [],
        0,
        "a process of the task died",
    ),
    "a loss raises": (dict(loss="raise ValueError('no')"), [], 1, "ValueError: no"),
    "out of memory in the trainer": (
        dict(loss="torch.zeros(2**50)"),
        [],
        1,
        "can't allocate memory",
    ),
    "a loss never returns": (
        dict(loss="import time; time.sleep(999)"),
        ["--stuck_seconds=20"],
        1,
        "stopped in train: it did not move for 20 s",
    ),
    "every loss is NaN": (
        dict(loss="logprobs = logprobs * float('nan')"),
        ["--max_skipped=1"],
        1,
        "the gradient's norm is nan, 2 times in a row",
    ),
}


@long
@pytest.mark.parametrize("fault", USER)
def test_the_users_code(watch, matrix, tmp_path, fault):
    code, args, rank, sentence = USER[fault]
    usual = dict(init="pass", reply="return None", reward="return float(len(e.text))")
    if "loss" in code:
        (tmp_path / "mine.py").write_text(LOSS.format(**code))
        args = [*args, f"--loss={tmp_path}/mine.py:mine"]
    else:
        (tmp_path / "mine.py").write_text(TASK.format(**{**usual, **code}))
        args = [*args, f"--task={tmp_path}/mine.py:Mine"]
    watched = watch("grpo.py", 2, "--eval_size=0", *args)
    exit_code, line = watched.end(), watched.last_line()
    matrix(fault, "", line.partition("stopped in ")[2].partition(":")[0], None, exit_code, line)
    assert exit_code != 0 and sentence in line and "log/rank" in line
    assert rank is None or f"rank {rank} " in line
    assert "never" not in fault or rank != 1 or "in mine" in logs(watched.folder)  # its stack
    watched.leaves_nothing()


@long
def test_a_long_generation_is_no_fault(tmp_path):
    """Row after row: the phase lasts longer than a rank may stay without moving."""
    args = ["--max_num_seqs=1", "--prompts_per_step=96", "--stuck_seconds=10"]
    args += ["--steps=1", "--eval_size=0"]
    folder = good(run(2, "grpo.py", *args, f"--run_dir={tmp_path}/r"), tmp_path / "r")
    assert max(x["dur"] for x in trace(folder) if x["name"] == "collect") > 12e6


@long
def test_a_nan_is_skipped_and_counted(watch, matrix, tmp_path):
    (tmp_path / "mine.py").write_text(
        LOSS.format(loss="logprobs = logprobs * (float('nan') if calls < 3 else 1)")
    )
    watched = watch("grpo.py", 2, "--eval_size=0", f"--loss={tmp_path}/mine.py:mine")
    assert watched.end() == 0, watched.said() + logs(watched.folder)
    assert [x["skipped"] for x in learned(watched.folder)] == [1, 1, 0, 0]
    matrix("two NaN losses", "", "train", None, 0, "skipped, counted, trained on")


@long
def test_out_of_memory_in_the_engine(watch, matrix):
    watched = watch("grpo.py", 2, env={"VLLM_CPU_KVCACHE_SPACE": "4000"})  # GiB
    code, line = watched.end(), watched.last_line()
    matrix("out of memory in the engine", "generator", "build engine", None, code, line)
    assert code != 0 and "rank 0 (generator) stopped in build engine" in line
    watched.leaves_nothing()


@long
def test_a_reply_that_never_ends(watch, matrix, tiny):
    watched = watch("grpo.py", 2, f"--model={tiny('llama', (27,))}", "--temperature=0.01")
    assert watched.end() == 0, watched.said() + logs(watched.folder)
    assert max(x["length"] for x in learned(watched.folder)) <= 40
    matrix("a reply that never ends", "", "collect", None, 0, "cut off at max_new_tokens")


@long
def test_a_full_disk_during_a_save(watch, matrix, small_disk, tmp_path):
    """7 MiB do not fit: the run ends with the reason, and no half of a checkpoint is taken."""
    (tmp_path / "r0").mkdir()
    (tmp_path / "r0/checkpoints").symlink_to(small_disk)
    watched = watch("sft.py", 2)
    code, line = watched.end(), watched.last_line()
    matrix("a full disk", "both trainers", "save", None, code, line)
    assert code != 0 and "was not written: " in line and "No space left on device" in line
    assert not list(small_disk.glob("step-*")) and not list(small_disk.glob("partial-*"))
    watched.leaves_nothing()


@pytest.fixture
def two_nodes(tmp_path):
    """Start two torchruns on loopback, as two nodes; nothing of them stays."""
    made = []

    def start(*launcher, steps):
        for node in range(2):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            command += [x.replace("NODE", str(node)) for x in launcher]
            command += [str(ROOT / "sft.py"), *SFT, f"--steps={steps}", f"--run_dir={tmp_path}/r"]
            err = (tmp_path / f"{node}.err").open("w+")
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
            made.append((subprocess.Popen(command, cwd=ROOT, stderr=err, env=env), err))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(steps_of(tmp_path / "r")) < 3:
            time.sleep(0.1)
        return [psutil.Process(process.pid) for process, _ in made], [err for _, err in made]

    yield start
    for process, _ in made:
        for child in (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ()
        ):
            child.kill()
        process.kill()
        process.wait()


def steps_of(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@long
@pytest.mark.parametrize("node", [0, 1])
def test_a_restart_over_two_nodes(two_nodes, matrix, sft, tmp_path, node):
    """Nodes count their restarts each for itself; all ranks go back to the last checkpoint."""
    launcher = ["--nproc_per_node=1", "--max_restarts=3", "--rdzv_id=x", "--rdzv_backend=c10d"]
    launcher += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    agents, _ = two_nodes(*launcher, steps=30)
    [victim] = agents[node].children()
    victim.kill()
    codes = [agent.wait(240) for agent in agents]
    matrix(
        "kill -9, two nodes, --max-restarts=3", f"rank {node}", "any", None, max(codes), "goes on"
    )
    assert codes == [0, 0] and (tmp_path / "r/model/model.safetensors").exists()
    assert [x["step"] for x in learned(tmp_path / "r")] == list(range(30))


@long
@pytest.mark.parametrize(("lost", "how"), [(1, "kill"), (0, "kill"), (1, "stop"), (0, "stop")])
def test_a_lost_node(two_nodes, matrix, lost, how):
    """One agent and all its ranks are killed, or fall silent."""
    launcher = ["--nproc_per_node=2", "--node_rank=NODE", "--master_addr=127.0.0.1"]
    agents, errs = two_nodes(*launcher, f"--master_port={free_port()}", steps=100_000)
    tree = [agents[lost], *agents[lost].children(recursive=True)]
    other = agents[1 - lost].children(recursive=True)
    for process in tree:
        process.send_signal(SIGNALS[how])
    at = time.monotonic()
    psutil.wait_procs(other, timeout=2 * DEADLINE)
    seconds, code = time.monotonic() - at, agents[1 - lost].wait(DEADLINE)
    errs[1 - lost].seek(0)
    said = errs[1 - lost].read()
    ours = [x for x in said.splitlines() if x.startswith("nanoforge: ")]
    matrix(f"a lost node ({how})", f"node {lost}", "any", seconds, code, (ours or [""])[0])
    assert seconds < DEADLINE and code != 0 and len(ours) == 1, said
    assert ("torchrun" if lost == 0 else f"rank {2 * lost}") in ours[0]
