"""Where the user's code runs: environments and rewards, with a time limit for each call.
Plain functions run in processes, which can be ended and hold up no engine. They are forked before
the engine is built, so a task needs no pickling: what travels is an Episode. A task with `async`
functions is awaited in one thread, where thousands of episodes wait for their tools at once."""

import asyncio
import concurrent.futures
import ctypes
import faulthandler
import gc
import inspect
import math
import multiprocessing
import numbers
import os
import pickle
import queue
import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool

import torch

from rollouts import Row
from runtime import UserError
from tasks import Task, reward_name

PORTION = 0.002  # seconds of work that a process is handed at once: a message costs 0.2 ms


class Workers:
    """Rows go in by `ask`, and come out of `answers` with a reply or with their rewards."""

    def __init__(self, task: Task, count: int, seconds: float):
        self.task, self.seconds, self.mean, self.loop = task, seconds, PORTION, None
        self.waiting: list[tuple[Row, bool]] = []  # for `answers` to hand them out
        self.jobs: dict[concurrent.futures.Future, tuple] = {}  # -> (rows, when they were asked)
        self.done = queue.SimpleQueue()  # of futures
        if any(map(inspect.iscoroutinefunction, (task.start, task.reply, *task.rewards))):
            self.loop = asyncio.new_event_loop()
            self.loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1000))
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        else:
            fork = multiprocessing.get_context("fork")
            self.pool = concurrent.futures.ProcessPoolExecutor(count, fork, begin, (task,))
            self.pool.submit(os.getpid).result()  # forks them all

    def __len__(self) -> int:
        return len(self.waiting) + sum(len(rows) for rows, _ in self.jobs.values())

    def ask(self, row: Row, may_go_on: bool):
        self.waiting.append((row, may_go_on))

    def submit(self, part: list[tuple[Row, bool]]) -> concurrent.futures.Future:
        if self.loop:
            work = judge(self.task, *part[0], self.seconds, self.loop)
            return asyncio.run_coroutine_threadsafe(work, self.loop)
        bare = [(Row(*row.key[1:], row.episode, row.evaluates), more) for row, more in part]
        return self.pool.submit(answer, bare, self.seconds)

    def answers(self, wait: float = 0.0) -> list[tuple[Row, str | list[dict] | None]]:
        """(row, the environment's reply) for what has come back, None once it has its rewards; the
        first is awaited for `wait` seconds. UserError where a call failed or took too long."""
        size = 1 if self.loop else max(1, int(PORTION / self.mean))  # quick ones share a message
        for first in range(0, len(self.waiting), size):
            future = self.submit(part := self.waiting[first : first + size])
            self.jobs[future] = [row for row, _ in part], time.monotonic()
            future.add_done_callback(self.done.put)
        self.waiting, out = [], []
        while self.jobs:
            try:
                future = self.done.get(bool(wait) and not out, wait or None)
            except queue.Empty:
                break
            rows, _ = self.jobs.pop(future)
            try:
                results = future.result()
            except (BrokenProcessPool, pickle.PicklingError, TypeError, AttributeError) as error:
                where = f"{rows[0].name()}, or another row that was with the task; see the log"
                what = f"a process of the task died, or cannot send episode.state: {error}"
                raise UserError(f"{what} ({where})") from None
            for row, result in zip(rows, results):
                reply, row.rewards, row.paid, row.episode.state, seconds = result
                self.mean = 0.9 * self.mean + 0.1 * seconds
                out.append((row, reply))
        for rows, since in list(self.jobs.values())[:1] if self.loop else ():  # the oldest
            if time.monotonic() - since > (self.seconds + 1) * (1 + len(self.task.rewards)):
                where = f"task_seconds={self.seconds:g} ({rows[0].name()}, or one beside it)"
                raise UserError(f"an async function did not give way for longer than {where}")
        return out


def begin(task: Task):
    """In a worker, once: it ends with its rank, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):  # the rank decides what becomes of its rows
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # KeyboardInterrupt
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    gc.freeze(), gc.enable()  # off since the rank's start
    answer.task = task


def answer(rows: list[tuple[Row, bool]], seconds: float) -> list[tuple]:
    """In a worker: what `judge` says of each row."""
    # Of a call that no signal interrupts the log gets the stack, and the process ends.
    calls = len(rows) * (1 + len(answer.task.rewards))
    faulthandler.dump_traceback_later((seconds + 1) * calls, exit=True)
    out = []
    for row, may_go_on in rows:
        try:
            judge(answer.task, row, may_go_on, seconds).send(None)
        except StopIteration as end:  # nothing in it waits, so one step is all
            out += end.value
    faulthandler.cancel_dump_traceback_later()
    return out


async def judge(task: Task, row: Row, may_go_on: bool, seconds: float, loop=None) -> list[tuple]:
    """[(reply or, with rewards, None; rewards; paid to each turn; episode.state; seconds)]"""
    start, reply, rewards = time.perf_counter(), None, {}
    paid = [0.0] * max(len(row.episode.turns[::2]), 1)  # the policy's turns
    if may_go_on:
        function = task.reply if row.episode.turns else task.start
        reply = await guarded(function, row, seconds, loop)
        said = reply if isinstance(reply, list) else [{"content": reply}]
        kinds = {type(isinstance(m, dict) and m.get("content")) for m in said}
        if kinds - {str} and (reply is not None or not row.episode.turns):
            raise UserError(f"{reward_name(function)} returned {reply!r} ({row.name()})")
    for function in task.rewards if reply is None else ():
        value, name = await guarded(function, row, seconds, loop), reward_name(function)
        each = value if isinstance(value, list) else [0.0] * (len(paid) - 1) + [value]
        right = all(isinstance(v, numbers.Real) and math.isfinite(v) for v in each)
        if not right or len(each) != len(paid):
            what = f"returned {value!r} as a reward for {len(paid)} turns of the policy"
            raise UserError(f"{name} {what} ({row.name()})")
        rewards[name], weight = float(sum(each)), float(task.weights.get(name, 1.0))
        paid = [p + weight * float(v) for p, v in zip(paid, each)]
    return [(reply, rewards, paid, row.episode.state, time.perf_counter() - start)]


async def guarded(function, row: Row, seconds: float, loop):
    """Call the user's function; what it raises becomes one sentence that names it and the row."""
    name, limit, asks = reward_name(function), None, inspect.iscoroutinefunction(function)
    try:
        if loop:
            async with asyncio.timeout(seconds) as limit:
                work = function(row.episode) if asks else asyncio.to_thread(function, row.episode)
                return await work
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return function(row.episode)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        what = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, KeyboardInterrupt) or limit and limit.expired():
            what = f"took longer than task_seconds={seconds:g}"
        raise UserError(f"{name} {what} ({row.name()})") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
