"""The generator without its engine: how replies end, what they earn, how long they may take."""

import asyncio
import contextlib
import functools
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
from conftest import ROOT, judge
from transformers import AutoTokenizer

from examples.calculator import Calculator
from generator import Generator
from losses import group_advantages
from rollouts import Row, from_rows
from runtime import UserError
from tasks import Episode, Task
from workers import PORTION, Workers

EOS = 2
WORLD = SimpleNamespace(generates=False, cuda=False, lap=lambda: None)


@pytest.fixture(scope="module")
def calculator():
    return Calculator(SimpleNamespace(seed=0))


def row(*turns, prompt="1*2+3=", answer=5):
    return Row(3, 4, 0, 5, Episode({"prompt": prompt, "answer": answer}, list(turns)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", numpy.float32("nan")])
def test_a_reward_that_is_no_number_is_named_with_its_row(calculator, value):
    def generous(episode):
        return value

    task = task_of(calculator.correct, generous)
    with pytest.raises(UserError, match="generous returned .*.*step 3, slot 4, reply 5, prompt '1"):
        judge(task, row("#5"), may_go_on=False)


def times(factor, episode):
    return numpy.float32(factor * 0.5)


class Constant:
    def __call__(self, episode):
        return True


def test_rewards_of_every_kind_have_a_name(calculator):
    rewards = [calculator.correct, functools.partial(times, 3), Constant(), lambda episode: 7]
    judged = row("#5")
    judge(task_of(*rewards), judged, may_go_on=False)
    assert judged.rewards == {"correct": 1.0, "times": 1.5, "Constant": 1.0, "<lambda>": 7.0}
    assert all(type(value) is float for value in judged.rewards.values())


def test_judge_goes_on_or_rewards(calculator):
    judged = row("[1*2]")
    assert judge(calculator, judged, may_go_on=True) == "=2" and judged.rewards == {}
    assert judge(calculator, judged, may_go_on=False) is None and judged.rewards == {"correct": 0.0}


@pytest.fixture
def make():
    """settings, task -> a generator without an engine, with one worker for its task."""

    def make(task, **settings):
        usual = dict(deterministic=True, task_seconds=0.5, group_size=1, max_refills=0)
        usual |= dict(max_turns=2, max_new_tokens=12, episode_seconds=0.0, model="m")
        cfg = SimpleNamespace(dtype="auto", **{**usual, **settings})
        made = Generator(cfg, WORLD, task, None)
        made.rows, made.groups, made.complete = {}, {}, {}
        made.open, made.workers = {3: cfg.group_size}, Workers(task, 1, cfg.task_seconds)
        return made

    return make


@pytest.mark.parametrize(
    ("text", "reason", "turn", "finished"),
    [
        ("#5<eos>", "stop", 0, True),  # by the policy
        ("[1*2", "length", 0, False),  # no tokens left
        ("[1*]", "stop", 0, True),  # by the environment, which has no answer
        ("[1*2]", "stop", 1, False),  # no turn left
        ("[111*222]", "stop", 0, False),  # no room for the environment's answer
    ],
)
def test_finished_is_ended_by_itself(make, calculator, text, reason, turn, finished):
    made, reply = make(calculator, max_turns=2, max_new_tokens=12), row()
    made.tokenizer, made.eos = AutoTokenizer.from_pretrained(ROOT / "assets/calculator"), {EOS}
    tokens = made.encode(text)
    reply.turn, made.rows["a"] = turn, reply
    made.turns_ended([("a", tokens, [-1.0] * len(tokens), reason)])
    while len(made.workers):
        made.apply_jobs()
    assert made.complete[3] == [reply] and reply.finished == finished


def done(workers):
    """All answers, in the order of the questions."""
    out = []
    while len(workers):
        out += workers.answers(wait=1.0)
    return sorted(out, key=lambda answer: answer[0].key)


def slow(episode):
    time.sleep(0.3)
    return 1.0


async def waits(episode):
    await asyncio.sleep(0.3)
    return 1.0


def task_of(*rewards, reply=None):
    task = Task(None)
    task.rewards, task.reply = list(rewards), reply or task.reply
    return task


@pytest.mark.parametrize(
    ("paid", "discount", "again"),
    [
        ([[1.0], [1.0]], 1.0, True),
        ([[1.0], [0.0]], 1.0, False),
        ([[1.0], [0.0, 0.0, 1.0]], 1.0, True),  # the same return at each turn
        ([[1.0], [0.0, 0.0, 1.0]], 0.5, False),  # the first one came sooner
        ([[0.0], [0.0, 0.0]], 0.5, True),
        ([[1.0, 0.0], [0.0, 1.0]], 1.0, False),
    ],
)
def test_a_group_is_drawn_again_where_its_advantages_are_zero(make, paid, discount, again):
    made, drawn = make(task_of(slow), group_size=2, max_refills=1, discount=discount), []
    made.refills, made.start_group = {}, lambda *what: drawn.append(what)
    group = [row("a"), row("b")]
    for one, earned in zip(group, paid):
        n = len(earned)  # a token a turn
        one.paid, one.tokens, one.mask, one.turns = earned, [1] * n, [True] * n, [*range(n)]
        one.logprobs, one.version = [0.0] * n, [0] * n
        made.completed(one)
    assert drawn == [(3, 4, 1)] * again and (made.complete == {}) == again
    table = from_rows(group, [], discount)
    assert bool(group_advantages(table, "mean").any()) != again


@pytest.mark.parametrize("reward", [slow, waits])
def test_deterministic_waits_for_every_row(make, reward):
    """Even for those that wait in the queue longer than the limit, which is each row's own."""
    made = make(task_of(reward), task_seconds=0.5, group_size=5)
    for _ in range(5):
        made.workers.ask(row("#5"), may_go_on=False)
    made.apply_jobs()
    assert len(made.complete[3]) == 5 and not len(made.workers) and made.open == {3: 0}


def stuck(episode):
    return float(re.match("(a+)+$", "a" * 64 + "b") is None)  # holds the interpreter's lock


def catches(episode):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


async def asks(episode):
    await asyncio.sleep(60)


async def holds(episode):
    time.sleep(8)  # does not give way to others


def ends(episode):
    os._exit(3)


def speaks(episode):
    raise ValueError("of\n two lines")


def leaves(episode):
    sys.exit(3)


async def leaves_too(episode):
    sys.exit(3)


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (speaks, "speaks raised ValueError: of two lines"),
        (leaves, "leaves raised SystemExit: 3"),
        (leaves_too, "leaves_too raised SystemExit: 3"),
        (stuck, "stuck took longer than task_seconds=0.3"),
        (catches, "catches took longer than task_seconds=0.3"),
        (asks, "asks took longer than task_seconds=0.3"),
        (holds, "an async function did not give way for longer than task_seconds=0.3"),
        (ends, "a process of the task died"),
    ],
)
def test_a_call_that_never_returns_or_ends_its_process_is_named(reward, sentence):
    workers, start = Workers(task_of(reward), 1, seconds=0.3), time.monotonic()
    workers.ask(row("#5"), False)
    with pytest.raises(UserError, match=f"{sentence}.*step 3, slot 4, reply 5, prompt '1"):
        done(workers)
    assert time.monotonic() - start < 4


def remembers(episode):
    episode.state["calls"] = episode.state.get("calls", 0) + 1
    return f"{os.getpid()}" if episode.state["calls"] < 3 else None


def test_an_environment_remembers_and_is_elsewhere():
    task = task_of(lambda e: e.state["calls"], reply=remembers)
    workers, asked, said = Workers(task, 2, seconds=5), row("#5"), []
    for _ in range(3):
        workers.ask(asked, True)
        said += [reply for _, reply in done(workers)]
    assert said[2] is None and str(os.getpid()) not in said[:2]
    assert asked.rewards == {"<lambda>": 3.0} and asked.episode.state == {"calls": 3}


def test_fast_jobs_travel_together_and_slow_ones_alone():
    workers = Workers(task_of(lambda e: 1.0), 4, seconds=5)
    for portion, most in ((100 * PORTION, 1), (PORTION / 50, 50)):
        workers.mean = portion  # seconds that a call took of late
        for _ in range(100):
            workers.ask(row("#5"), False)
        workers.answers()
        left = [len(rows) for rows, _ in workers.jobs.values()]
        assert max(left, default=most) == most
        done(workers)


def test_a_thousand_episodes_wait_for_their_tools_at_once():
    """`async` functions are awaited together; a plain reward beside them is called too."""

    async def tool(episode):
        await asyncio.sleep(0.5)
        return "=2" if len(episode.turns) < 2 else None

    workers = Workers(task_of(lambda e: float(len(e.turns)), reply=tool), 1, seconds=5)
    rows, start = [row("[1*2]") for _ in range(1000)], time.monotonic()
    for each in rows:
        workers.ask(each, True)
    assert [reply for _, reply in done(workers)] == ["=2"] * 1000
    assert time.monotonic() - start < 5  # one after the other would be 500
    rows[0].episode.turns.append("=2")
    workers.ask(rows[0], True)
    assert done(workers) == [(rows[0], None)] and rows[0].rewards == {"<lambda>": 2.0}


ORPHANS = """
import os, time
from rollouts import Row, from_rows
from tasks import Episode, Task
from workers import Workers
task = Task(None)
task.rewards = [lambda episode: time.sleep(60)]
workers = Workers(task, 3, 60)
for reply in range(3):  # a busy one does not see that its wire has ended
    workers.ask(Row(0, 0, 0, reply, Episode({"prompt": ""})), False)
workers.answers()
print(open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read(), flush=True)
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""


def test_workers_end_with_their_rank():
    done = subprocess.run([sys.executable, "-c", ORPHANS], cwd=ROOT, capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3 and done.returncode == -9, done.stderr
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids)


def test_what_every_engine_would_say_is_said_once():
    said = []
    for engine, leads in ((0, True), (0, False), (1, True), (1, False)):  # two engines, TP 2
        world = SimpleNamespace(generates=False, cuda=False, engine=engine, leads=leads)
        made = Generator(SimpleNamespace(dtype="auto"), world, None, None)
        made.told = {"notes": []}
        made.note("left out 1 of 3 prompts")
        said += made.told["notes"]
    assert len(said) == 1
