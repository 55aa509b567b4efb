"""The generator without its engine: how replies end, what they earn, how long they may take."""

import concurrent.futures
import functools
import time
from types import SimpleNamespace

import numpy
import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from examples.calculator import Calculator
from generator import Generator, judge
from rollouts import Row
from runtime import UserError
from tasks import Episode

EOS = 2


@pytest.fixture(scope="module")
def calculator():
    return Calculator(SimpleNamespace(seed=0))


def row(*turns, prompt="1*2+3=", answer=5):
    return Row(3, 4, 0, 5, Episode({"prompt": prompt, "answer": answer}, list(turns)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", numpy.float32("nan")])
def test_a_reward_that_is_no_number_is_named_with_its_row(calculator, value):
    def generous(episode):
        return value

    task = SimpleNamespace(reply=calculator.reply, rewards=[calculator.correct, generous])
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
    judge(SimpleNamespace(reply=calculator.reply, rewards=rewards), judged, may_go_on=False)
    assert judged.rewards == {"correct": 1.0, "times": 1.5, "Constant": 1.0, "<lambda>": 7.0}
    assert all(type(value) is float for value in judged.rewards.values())


def test_judge_goes_on_or_rewards(calculator):
    judged = row("[1*2]")
    assert judge(calculator, judged, may_go_on=True) == "=2" and judged.rewards == {}
    assert judge(calculator, judged, may_go_on=False) is None and judged.rewards == {"correct": 0.0}


@pytest.fixture
def make():
    """settings, task -> a generator without an engine, with one worker for its task."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def make(task, **settings):
            usual = dict(deterministic=True, task_seconds=0.5, group_size=1, max_refills=0)
            cfg = SimpleNamespace(dtype="auto", **{**usual, **settings})
            made = Generator(cfg, SimpleNamespace(generates=False, cuda=False), task, None)
            made.jobs, made.rows, made.groups, made.complete = {}, {}, {}, {}
            made.open, made.pool = {3: cfg.group_size}, pool
            return made

        yield make


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
    made.turn_ended("a", tokens, [-1.0] * len(tokens), reason)
    while made.jobs:
        made.apply_jobs()
    assert made.complete[3] == [reply] and reply.finished == finished


def slow(episode):
    time.sleep(0.3)
    return 1.0


def test_deterministic_waits_for_every_row(make):
    """Even for those that wait in the queue longer than the limit, which is each row's own."""
    made = make(SimpleNamespace(rewards=[slow]), task_seconds=0.5, group_size=5)
    for _ in range(5):
        made.ask(row("#5"), may_go_on=False)
    made.apply_jobs()
    assert len(made.complete[3]) == 5 and not made.jobs and made.open == {3: 0}


def test_a_row_over_the_time_limit_is_named(make):
    made = make(SimpleNamespace(rewards=[slow]), task_seconds=0.01)
    made.ask(row("#5"), may_go_on=False)
    with pytest.raises(UserError, match="longer than task_seconds=0.01 .step 3, slot 4, reply 5"):
        for _ in range(20):
            time.sleep(0.01)
            made.check_time()


def test_what_every_engine_would_say_is_said_once():
    said = []
    for engine, leads in ((0, True), (0, False), (1, True), (1, False)):  # two engines, TP 2
        world = SimpleNamespace(generates=False, cuda=False, engine=engine, leads=leads)
        made = Generator(SimpleNamespace(dtype="auto"), world, None, None)
        made.told = {"notes": []}
        made.note("left out 1 of 3 prompts")
        said += made.told["notes"]
    assert len(said) == 1
