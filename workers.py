"""Where the user's code runs: environments and rewards, with a time limit for each row's turn.

Plain functions run in processes: a thread that does not return could not be ended, and one that
holds the interpreter's lock would hold up the engine. They are forked before the engine is built,
so a task needs no pickling: what travels is an Episode. A task with `async` functions is awaited in
one thread, where thousands of episodes wait for their tools at once.
"""

import asyncio
import concurrent.futures
import ctypes
import faulthandler
import inspect
import math
import multiprocessing
import numbers
import os
import queue
import signal
import threading
import time

import torch

from rollouts import Row
from runtime import UserError
from tasks import Task, reward_name

PORTION = 0.002  # seconds of work that a process is handed at once: a message costs 0.2 ms


class Workers:
    """Rows go in by `ask`, and come out of `answers` with a reply or with their rewards."""

    def __init__(self, task: Task, count: int, seconds: float):
        self.task, self.seconds, self.mean, self.loop = task, seconds, PORTION, None
        self.queue: list[tuple[Row, bool]] = []  # to be handed out
        self.jobs: dict[concurrent.futures.Future, list[Row]] = {}
        self.done = queue.SimpleQueue()  # of futures
        if any(map(inspect.iscoroutinefunction, (task.reply, *task.rewards))):
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        else:
            how = {"mp_context": multiprocessing.get_context("fork"), "initializer": begin}
            self.pool = concurrent.futures.ProcessPoolExecutor(count, **how, initargs=(task,))
            self.pool.submit(os.getpid).result()  # forks them all

    def __len__(self) -> int:
        return len(self.queue) + sum(map(len, self.jobs.values()))

    def ask(self, row: Row, may_go_on: bool):
        self.queue.append((row, may_go_on))

    def hand_out(self):
        """A row that waits for a tool is alone; quick functions share a message."""
        size = 1 if self.loop else max(1, int(PORTION / self.mean))
        for first in range(0, len(self.queue), size):
            part = self.queue[first : first + size]
            if self.loop:
                work = asyncio.wait_for(judge(self.task, *part[0], True), self.seconds)
                future = asyncio.run_coroutine_threadsafe(work, self.loop)
            else:
                bare = [(Row(*row.key[1:], row.episode, row.evaluates), on) for row, on in part]
                future = self.pool.submit(answer, bare, self.seconds)
            self.jobs[future] = [row for row, _ in part]
            future.add_done_callback(self.done.put)
        self.queue = []

    def answers(self, wait: bool = False) -> list[tuple[Row, str | None]]:
        """(row, the environment's reply) for what has come back, None once it has its rewards; with
        `wait` for all. UserError where a call failed, or took longer than it may.
        """
        self.hand_out()
        out = []
        while self.jobs if wait else not self.done.empty():
            future = self.done.get()
            rows = self.jobs.pop(future)
            try:
                results = future.result()
            except TimeoutError:
                raise too_late(rows[0], self.seconds) from None
            except concurrent.futures.process.BrokenProcessPool:
                names = f"{rows[0].name()}, or another row that was with the task"
                raise UserError(f"a process of the task died: see the log ({names})") from None
            for row, (reply, rewards, state, seconds) in zip(rows, results):
                row.rewards, row.episode.state = rewards, state
                self.mean = 0.9 * self.mean + 0.1 * seconds
                out.append((row, reply))
        return out


# ---------------------------------------------------------------- in a process


def begin(task: Task):
    """What a worker is, from its fork on: it ends with its rank, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):  # the rank decides what becomes of its rows
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, late)
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    answer.task = task


class Late(BaseException):
    """Not an Exception: the user's code may catch those."""


def late(*_):
    raise Late


def too_late(row: Row, seconds: float) -> UserError:
    return UserError(f"the task took longer than task_seconds={seconds:g} ({describe(row)})")


def answer(rows: list[tuple[Row, bool]], seconds: float) -> list[tuple]:
    # Of a call that no signal interrupts the log gets the stack, and the process ends.
    faulthandler.dump_traceback_later((seconds + 5) * len(rows), exit=True)
    out = []
    for row, may_go_on in rows:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            judge(answer.task, row, may_go_on, False).send(None)
        except StopIteration as end:  # nothing in it waits, so one step is all
            out += end.value
        except Late:
            raise too_late(row, seconds) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    return out


# ---------------------------------------------------------------- a row


async def judge(task: Task, row: Row, may_go_on: bool, threads: bool) -> list[tuple]:
    """[(reply, rewards, what the environment remembers, seconds)]; the reply is None once there are
    rewards.
    """
    start, reply, rewards = time.perf_counter(), None, {}
    if may_go_on:
        reply = await guarded(task.reply, row, threads)
    if reply is None:
        for function in task.rewards:
            value, name = await guarded(function, row, threads), reward_name(function)
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise UserError(f"{name} returned {value!r} as a reward ({describe(row)})")
            rewards[name] = float(value)
    return [(reply, rewards, row.episode.state, time.perf_counter() - start)]


async def guarded(function, row: Row, threads: bool):
    """Call the user's function; what it raises becomes one sentence that names it and the row."""
    try:
        if inspect.iscoroutinefunction(function):
            return await function(row.episode)
        return await asyncio.to_thread(function, row.episode) if threads else function(row.episode)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{reward_name(function)} raised {what} ({describe(row)})") from error


def describe(row: Row) -> str:
    return f"{row.name()}, prompt {row.episode.problem['prompt'][:60]!r}"
