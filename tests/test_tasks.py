"""Tasks: right answers, wrong answers, bad files, and no model's text ever evaluated."""

import json
from types import SimpleNamespace

import pytest
from conftest import SHARED

import tasks
from runtime import UserError
from tasks import Episode


def cfg(**extra):
    return SimpleNamespace(
        **{"seed": 0, "prompts_per_step": 16, "task": "calculator", "task_data": "", **extra}
    )


def say(text, answer=None, **problem):
    return Episode({"prompt": "", "answer": answer, **problem}, [text])


@pytest.fixture(scope="module")
def calculator():
    return tasks.Calculator(cfg())


def test_calculator_answers_calls(calculator):
    assert calculator.reply(say("[63*11]")) == "=693"
    assert calculator.reply(say("[693+48]")) == "=741"
    assert calculator.reply(say("[2-5]")) == "=-3"
    for text in (
        "63*11",
        "[63*]",
        "[]",
        "[9**9]",
        "[9/3]",
        "[__import__('os')]",
        "[1e9]",
        "[" + "9" * 60 + "]",
    ):
        assert calculator.reply(say(text)) is None, text


def test_calculator_reward(calculator):
    assert calculator.correct(say("[63*11]=693[693+48]=741#741", 741)) == 1
    for text in ("#740", "741", "#741#741", "#741 ", "#7#41", ""):
        assert calculator.correct(say(text, 741)) == 0, text


def test_heldout_problems_share_no_prompt_with_training():
    for make in (tasks.Calculator, tasks.SumDigits, tasks.Countdown):
        task = make(cfg())
        train, heldout = ({e["prompt"] for e in split} for split in (task.train, task.heldout))
        assert len(heldout) >= 256 and not train & heldout, make.__name__


def test_prompts_come_from_names(calculator):
    again = tasks.Calculator(cfg())
    assert [again.problem(7, s) for s in range(16)] == [calculator.problem(7, s) for s in range(16)]
    epoch = len(calculator.train) // 16
    seen = [calculator.problem(step, slot)["prompt"] for step in range(epoch) for slot in range(16)]
    assert len(set(seen)) == len(seen) == len(calculator.train)  # an epoch is a permutation
    assert (
        calculator.problem(3, 4, attempt=1)
        == calculator.problem(3, 4, attempt=1)
        != calculator.problem(3, 4)
    )
    assert tasks.Calculator(cfg(seed=1)).problem(0, 0) != calculator.problem(0, 0)


def test_demonstrations_are_right_and_hold_both_strategies(calculator):
    made = [calculator.demonstration(str(i), progress=0.9) for i in range(400)]
    for pieces in made:
        prompt, reply = pieces[0][0], "".join(text for text, _ in pieces[1:])
        assert calculator.correct(say(reply, tasks.calculate(prompt[:-1]))) == 1
    tools = [pieces for pieces in made if "[" in pieces[1][0]]
    assert 0.2 < len(tools) / 400 < 0.4
    assert [trained for _, trained in tools[0]] == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]  # the tool's words are not
    early = [calculator.demonstration(str(i), progress=0.1) for i in range(400)]
    assert 0.7 < sum("[" in pieces[1][0] for pieces in early) / 400 < 0.9


def test_sum_of_digits():
    task = tasks.SumDigits(cfg())
    assert all(e["answer"] == f"#{sum(map(int, e['prompt'][:-1]))}" for e in task.train[:100])


def test_countdown():
    task = tasks.Countdown(cfg())
    problem = dict(numbers=[3, 4, 5])
    assert task.correct(say("so <answer>3*4+5</answer>", 17, **problem)) == 1
    assert task.correct(say("3*4+5", 17, **problem)) == 1
    for text in ("3*4+4+1", "17", "3*4+5+5", "<answer></answer>", "3*(4", "3**4"):
        assert task.correct(say(text, 17, **problem)) == 0, text


@pytest.mark.parametrize(
    ("text", "target", "reward"),
    [
        ("<answer>42</answer>", "42", 1.0),
        ("<answer> $1,234.50 </answer>", "1234.5", 1.0),
        ("<answer>1e6</answer>", "1,000,000", 1.0),
        ("<answer>42.0000001</answer>", "42", 1.0),
        ("<answer>41</answer><answer>42</answer>", "42", 0.0),  # the first one counts
        ("<answer>41</answer> or 42", "42", 0.1),
        ("it is $1,234", "1234", 0.1),
        ("<answer>nan</answer>", "42", 0.0),
        ("421", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_math_answer(text, target, reward):
    assert tasks.math_answer(say(text, target)) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>so</think>", 1.0),
        ("<think> \n</think>", 0.2),
        ("<think>so", 0.2),
        ("so</think>", 0.2),
        ("so", 0.0),
    ],
)
def test_thinking(text, reward):
    assert tasks.thinking(say(text)) == reward


def test_jsonl_names_the_broken_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "1", "answer": "2"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: not a JSON object"):
        tasks.JsonLines(cfg(), str(path))
    path.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(20)))
    with pytest.raises(UserError, match="row 1: needs 'prompt' and 'answer'"):
        tasks.JsonLines(cfg(), str(path))
    path.write_text("".join(json.dumps({"prompt": f"{i}", "answer": i}) + "\n" for i in range(20)))
    task = tasks.JsonLines(cfg(), str(path))
    assert (len(task.train), len(task.heldout)) == (18, 2)


def test_parquet_and_jsonl_are_read_alike(tmp_path):
    import datasets

    rows = [{"question": f"q{i}", "answer": f"because\n#### {i}"} for i in range(5)]
    (tmp_path / "jsonl").mkdir(), (tmp_path / "parquet").mkdir()
    for split in ("train", "test"):
        (tmp_path / "jsonl" / f"{split}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows)
        )
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    a, b = (tasks.GSM8K(cfg(task_data=str(tmp_path / kind))) for kind in ("jsonl", "parquet"))
    assert a.train == b.train and a.train[3] == {"prompt": "q3", "answer": "3"}


@pytest.mark.skipif(
    not (SHARED / "data/gsm8k").exists(), reason="the GSM8K files are not on this machine"
)
def test_gsm8k():
    task = tasks.GSM8K(cfg(task_data=str(SHARED / "data/gsm8k")))
    assert (len(task.train), len(task.heldout)) == (7473, 1319)
    assert all(tasks.number(e["answer"]) is not None for e in task.train + task.heldout)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1"])
def test_a_reward_that_is_no_number_is_named_with_its_row(calculator, value):
    from generator import judge
    from rollouts import Row

    def generous(episode):
        return value

    task = SimpleNamespace(reply=calculator.reply, rewards=[calculator.correct, generous])
    row = Row(3, 4, 0, 5, Episode({"prompt": "1*2+3=", "answer": 5}, ["#5"]))
    with pytest.raises(UserError, match="generous returned .*.*step 3, slot 4, reply 5, prompt '1"):
        judge(task, row, may_go_on=False)


def test_judge_goes_on_or_rewards(calculator):
    from generator import judge
    from rollouts import Row

    row = Row(0, 0, 0, 0, Episode({"prompt": "1*2+3=", "answer": 5}, ["[1*2]"]))
    assert judge(calculator, row, may_go_on=True) == "=2" and row.rewards == {}
    assert judge(calculator, row, may_go_on=False) is None and row.rewards == {"correct": 0.0}


def test_a_user_task_and_a_wrong_name(tmp_path):
    (tmp_path / "mine.py").write_text("import tasks\nclass Mine(tasks.SumDigits):\n    pass\n")
    assert type(tasks.load_task(cfg(task=f"{tmp_path}/mine.py:Mine"))).__name__ == "Mine"
    for name in (
        "nonsense",
        f"{tmp_path}/mine.py:Other",
        f"{tmp_path}/none.py:Mine",
        f"{tmp_path}/none.jsonl",
    ):
        with pytest.raises(UserError):
            tasks.load_task(cfg(task=name))
