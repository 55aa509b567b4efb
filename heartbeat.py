"""One thread a rank says where it is and looks at the next; torchrun sees nothing but exits."""

import contextlib
import datetime
import faulthandler
import gc
import json
import os
import pathlib
import signal
import sys
import threading
import time

import torch.distributed as dist

TICK, SILENT = 1.0, 15  # seconds between beats; beats that a stopped rank or a lost node may miss


class Heartbeat:
    """What this rank says, and what it finds wrong with itself and others. Time is counted in ticks
    of this thread, so that a laptop's sleep or a terminal's Ctrl-Z is no fault. A rank is stuck
    when its main thread has not moved for its phase's limit, unless it waits for others."""

    def __init__(self):
        names = "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
        self.rank, self.size, here = (int(os.environ.get(k, d)) for k, d in zip(names, "011"))
        first = self.rank // here * here
        self.local, self.parent = range(first, first + here), os.getppid()  # ranks of this node
        # Each rank looks at the next of its node, the first also at the next node as a whole.
        after, there = first + (self.rank + 1 - first) % here, (first + here) % self.size
        node = [range(there, there + here)] if self.rank == first != there else []
        self.watched = [[after], *node] if here > 1 else node
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.phase, self.waits, self.moved, self.still, self.beats = "start", False, True, 0, 0
        self.store, self.ended, self.heard, self.after, self.hung = None, False, {}, 0, 0
        self.lock = threading.Lock()
        self.names, self.logs = [f"rank {rank}" for rank in range(self.size)], None
        self.limit, self.screen = lambda phase: 3600.0, sys.stderr  # ticks without a move
        # Called once, in a thread, after SIGTERM or SIGINT, of which some rank's death may be why:
        self.told_to_stop = lambda: (self.say(self.dead()), self.exit())

    def start(self):
        """Connect to torchrun's store, beat until `exit`. From here on signals go to a thread: a
        main thread that is inside a collective never comes back to Python."""
        self.store = connect_store(datetime.timedelta(seconds=10))
        if len(self.local) < self.size:  # nodes count their restarts each for itself
            self.attempt = (self.store.add("nanoforge/starts", 1) - 1) // self.size
        self.enter("start")
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        for target in (lambda: (os.read(read_end, 1), self.told_to_stop()), self.run, self.guard):
            threading.Thread(target=target, daemon=True).start()

    def key(self, name: str) -> str:  # in torchrun's store, which outlives a restart
        return f"nanoforge/{self.attempt}/{name}"

    def enter(self, phase: str):
        """The rank is in another phase, and the store says so."""
        self.phase, self.waits, self.moved = phase, False, True
        if self.store is not None and not self.ended:
            with contextlib.suppress(RuntimeError):  # the store is gone: `run` sees to it
                self.tell()

    def tell(self):
        with self.lock:  # an older word must not overtake a newer one
            told = {"pid": os.getpid(), "phase": self.phase, "beats": self.beats}
            self.store.set(self.key(f"beat/{self.rank}"), json.dumps(told))

    def exit(self, code: int = 1):
        """The rank leaves as it should, or after a fault that was said: that is none of its own."""
        self.enter("end")
        self.ended = True
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # not sys.exit: threads and half-open groups must not keep a rank alive

    def line(self, rank: int, phase: str, what: str) -> str:
        where = f" (log: {self.logs}/rank{rank}.log)" if self.logs else ""
        return f"nanoforge: {self.names[rank]} stopped in {phase}: {what}{where}"

    def say(self, line: str):
        """A fault's last line, from the first rank that has something to say."""
        first = bool(line) and self.rank == self.local[0]  # without a store
        with contextlib.suppress(RuntimeError):
            first = line and (not self.store or self.store.add(self.key("failures"), 1) == 1)
        if first:  # a bar may have left its line open
            print(f"\n{line}", file=self.screen, flush=True)

    def guard(self):
        """The store's node may neither answer nor break: then no call of `run` comes back."""
        while self.hung < SILENT:  # ticks too
            time.sleep(TICK)
            self.hung += 1
        if self.rank == self.local[0]:
            print(f"\n{self.line(self.rank, self.phase, 'torchrun is silent')}", file=self.screen)
        os._exit(1)

    def run(self):
        while not self.ended:
            time.sleep(TICK)
            self.still = 0 if self.moved or self.waits else self.still + 1
            self.moved, self.hung, self.beats = False, 0, self.beats + 1
            try:
                self.tell()
                failed = self.store.check([self.key("failures")])
                self.after += failed
                if not failed:
                    self.look()
                elif self.after > SILENT:
                    self.exit()  # the torchrun of another node may not know
            except RuntimeError:
                self.fail(self.rank, "torchrun's store is lost")
            if os.getppid() != self.parent:
                self.fail(self.rank, "torchrun is gone")

    def told(self, rank: int) -> dict:
        """The last beat of a rank; of one that never spoke, what /proc knows of a local one."""
        if self.store.check([key := self.key(f"beat/{rank}")]):
            return json.loads(self.store.get(key))
        return {"pid": pids_of(self.parent).get(rank), "phase": "start", "beats": -1}

    def look(self):
        """Whether this rank is stuck, the next one stopped or hung, or the next node lost."""
        if self.still > self.limit(self.phase):
            faulthandler.dump_traceback()  # where: every thread, in its log
            self.fail(self.rank, f"it did not move for {self.limit(self.phase):.0f} s")
        for ranks in self.watched:
            told = [self.told(rank) for rank in ranks]
            for rank, beat in zip(ranks, told):  # ticks since the last beat
                number, ticks = self.heard.get(rank, (None, 0))
                self.heard[rank] = beat["beats"], ticks + 1 if number == beat["beats"] else 0
            silence, here = min(self.heard[rank][1] for rank in ranks), ranks[0] in self.local
            stopped = here and state_of(told[0]["pid"]) in "Tt"
            lost = not here and all(beat["beats"] >= 0 for beat in told)
            limit = SILENT if stopped or lost else self.limit(told[0]["phase"])
            if silence >= limit and not any(beat["phase"] == "end" for beat in told):
                what = "it was suspended" if stopped else "nothing was heard of it"
                what += " and its node" if lost else ""
                self.fail(ranks[0], f"{what} for {limit:.0f} s", told[0])

    def dead(self) -> str:
        """The sentence about a dead rank of this node, whose loss others may have felt; or ""."""
        with contextlib.suppress(RuntimeError):
            for rank, told in ((r, self.told(r)) for r in (self.local if self.store else ())):
                if told["phase"] != "end" and state_of(told["pid"]) in "ZX":
                    return self.line(rank, told["phase"], "it died")
        return ""

    def fail(self, rank: int, what: str, told: dict | None = None):
        """Say which rank is at fault and end it, if it is of this node: torchrun then ends the
        others. This one leaves where it is itself at fault, or lives on without a node."""
        self.say(self.line(rank, told["phase"] if told else self.phase, what))
        if not told or rank not in self.local:
            self.exit()
        with contextlib.suppress(ProcessLookupError, KeyError):  # it has just ended by itself
            os.killpg(pids_of(self.parent)[rank], signal.SIGKILL)  # each rank is a group


def connect_store(timeout: datetime.timedelta) -> dist.TCPStore:
    """A client of torchrun's store of its own: a call that waits holds up no other's."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timeout)


def state_of(pid: int | None) -> str:
    """R, S, D run or wait; T and t are stopped; Z is dead, X gone; "?" if no process is known."""
    with contextlib.suppress(OSError):
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text() if pid else ") ?"
        return stat.rpartition(")")[2].split()[0]
    return "X"


def pids_of(parent: int) -> dict[int, int]:
    """Rank -> process among torchrun's children, which are known before they speak."""
    found = {}
    with contextlib.suppress(OSError):
        for pid in pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            env = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(x[5:]): int(pid) for x in env if x.startswith(b"RANK=")}
    return found


HEART = Heartbeat()


def start(name: str):
    """In a script's first lines, with its __name__: what follows takes seconds, and is watched."""
    if name == "__main__" and {"TORCHELASTIC_RUN_ID", "RANK"} <= os.environ.keys():
        gc.disable()  # it costs a fifth of the imports' time; on again after the first step
        HEART.start()
