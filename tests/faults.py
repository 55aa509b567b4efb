"""A run, somebody who watches it through torchrun's store, and what is left after a fault.

The watcher is outside: it reads each rank's phase where the ranks read each other's.
"""

import contextlib
import datetime
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import psutil
import torch.distributed as dist
from conftest import ROOT, logs

DEADLINE = 30  # seconds in which every rank has to be gone
SMALL = ["--prompts_per_step=6", "--group_size=4", "--eval_size=12", "--eval_every=2"]
SMALL += ["--steps=4", "--deterministic=true", "--save_every=1", "--save_rollouts=true"]
PHASES = {  # as the issue calls them -> as the ranks do
    "start": {"start"},
    "build": {"build engine"},
    "generate": {"collect"},
    "gather": {"arrive gather", "gather"},
    "train": {"train"},
    "sync": {"arrive sync", "sync"},
    "save": {"save"},
    "evaluate": {"evaluate"},
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Watched:
    """torchrun as the README gives it, under a watcher."""

    def __init__(self, folder, script: str, ranks: int, *args: str, launcher=(), env=None):
        self.folder, self.ranks, self.port = pathlib.Path(folder), ranks, free_port()
        self.before = set(os.listdir("/dev/shm"))
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += [f"--master_port={self.port}", *launcher, str(ROOT / script)]
        env = {**os.environ, **(env or {})}
        env.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", None)  # the README's command does not have it
        self.err = pathlib.Path(f"{folder}.err").open("w+")  # noqa: SIM115 (until close)
        self.process = subprocess.Popen(
            [*command, *args, f"--run_dir={folder}"], cwd=ROOT, stderr=self.err, env=env
        )
        self.pids: dict[int, int] = {}
        self.store = None

    def beat(self, rank: int, attempt: int = 0) -> dict:
        """What the rank has last said of itself, {} before."""
        if self.store is None:
            where, limit = ("127.0.0.1", self.port), datetime.timedelta(seconds=60)
            self.store = dist.TCPStore(
                *where, is_master=False, wait_for_workers=False, timeout=limit
            )
        key = f"nanoforge/{attempt}/beat/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else {}

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def wait_for(self, rank: int, phases: set[str], steps: int = 0, attempt: int = 0) -> str:
        """Until the rank is in one of the phases, after some steps; returns which."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            if steps and self.steps() < steps:
                time.sleep(0.01)
                continue
            told = self.beat(rank, attempt)
            if told.get("phase") in phases:
                beats = {r: self.beat(r, attempt) for r in range(self.ranks)}
                self.pids = {r: b["pid"] for r, b in beats.items() if b}
                if len(self.pids) < self.ranks:
                    continue  # somebody is still importing torch, and could not say a word
                return self.beat(rank, attempt)["phase"] if steps == 0 else told["phase"]
        raise AssertionError(f"rank {rank} was never in {phases}: {self.said()}")

    def hit(self, rank: int, phases: set[str], number, steps: int = 0, attempt: int = 0) -> str:
        """Send the signal in one of the phases; returns the phase that it hit."""
        self.wait_for(rank, phases, steps, attempt)
        os.kill(self.pids[rank], number)
        self.at = time.monotonic()
        return self.beat(rank, attempt)["phase"]

    def gone(self) -> float:
        """Seconds from the fault until every rank that there was is gone."""
        while any(psutil.pid_exists(p) for p in self.pids.values()):
            assert time.monotonic() - self.at < 2 * DEADLINE, self.alive()
            time.sleep(0.05)
        return time.monotonic() - self.at

    def alive(self) -> str:
        return subprocess.run(["ps", "-o", "pid,stat,cmd", "-A"], capture_output=True).stdout

    def end(self, timeout: float = 240) -> int:
        """The exit code; torchrun has ended."""
        return self.process.wait(timeout)

    def said(self) -> str:
        self.err.seek(0)
        return self.err.read()

    def last_line(self) -> str:
        """Our last line, which has to stand directly above torchrun's own."""
        text = self.said()
        ours = [x for x in text.splitlines() if x.startswith("nanoforge: ")]
        assert len(ours) == 1, text[-3000:] + logs(self.folder)
        return ours[0]

    def leaves_nothing(self):
        """No process with this run's folder in its command; nothing in /dev/shm that nobody has."""
        for process in psutil.process_iter(["pid", "cmdline"]):
            assert str(self.folder) not in " ".join(process.info["cmdline"] or ()), process
        held = ""
        for maps in pathlib.Path("/proc").glob("[0-9]*/maps"):
            with contextlib.suppress(OSError):
                held += maps.read_text()
        new = set(os.listdir("/dev/shm")) - self.before
        assert all(f"/dev/shm/{name}" in held for name in new), new

    def close(self):
        """Whatever happened: nothing of it stays."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
            for process in [*family, psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.err.close()
