"""Tasks: right answers, wrong answers, bad files, and no model's text ever evaluated."""

import json
from types import SimpleNamespace

import pytest
from conftest import SHARED

import tasks
from examples.calculator import Calculator, calculate
from examples.countdown import Countdown
from examples.gsm8k import GSM8K, math_answer, number, thinking
from examples.sum_digits import SumDigits
from runtime import UserError
from tasks import Episode


def cfg(**extra):
    usual = {"seed": 0, "prompts_per_step": 16, "task": "calculator", "task_data": ""}
    return SimpleNamespace(**{**usual, **extra})


def say(text, answer=None, **problem):
    return Episode({"prompt": "", "answer": answer, **problem}, [text])


@pytest.fixture(scope="module")
def calculator():
    return Calculator(cfg())


def test_calculator_answers_calls(calculator):
    assert calculator.reply(say("[63*11]")) == "=693"
    assert calculator.reply(say("[693+48]")) == "=741"
    assert calculator.reply(say("[2-5]")) == "=-3"
    for text in ("63*11", "[63*]", "[]", "[9**9]", "[9/3]", "[__import__('os')]", "[1e9]"):
        assert calculator.reply(say(text)) is None, text


def test_calculate_reads_plain_decimal_numbers_only():
    assert calculate("(1 + 2)*3-10") == -1
    for text in ("1_2", "0x10", "\u0663+1", "\uff11", "1\n", "True", "1.0", "()", "3(4)", "007"):
        assert calculate(text) is None, text
    for text in ("9" * 41, "(" * 2000 + "1" + ")" * 2000, "1" + "+1" * 5000):  # in no time
        assert calculate(text) is None, text[:40]


def test_calculator_reward(calculator):
    assert calculator.correct(say("[63*11]=693[693+48]=741#741", 741)) == 1
    for text in ("#740", "741", "#741#741", "#741 ", "#7#41", ""):
        assert calculator.correct(say(text, 741)) == 0, text


def test_heldout_problems_share_no_prompt_with_training():
    for make in (Calculator, SumDigits, Countdown):
        task = make(cfg())
        train, heldout = ({e["prompt"] for e in split} for split in (task.train, task.heldout))
        assert len(heldout) >= 256 and not train & heldout, make.__name__


def test_prompts_come_from_names(calculator):
    again = Calculator(cfg())
    assert [again.problem(7, s) for s in range(16)] == [calculator.problem(7, s) for s in range(16)]
    epoch = len(calculator.train) // 16
    seen = [calculator.problem(step, slot)["prompt"] for step in range(epoch) for slot in range(16)]
    assert len(set(seen)) == len(seen) == len(calculator.train)  # an epoch is a permutation
    assert calculator.problem(3, 4, attempt=1) == again.problem(3, 4, attempt=1)
    assert calculator.problem(3, 4, attempt=1) != calculator.problem(3, 4)
    assert Calculator(cfg(seed=1)).problem(0, 0) != calculator.problem(0, 0)


def test_demonstrations_are_right_and_hold_both_strategies(calculator):
    made = [calculator.demonstration(str(i), progress=0.9) for i in range(400)]
    for (prompt, _), *rest in made:
        reply = "".join(text for text, _ in rest)
        assert calculator.correct(say(reply, calculate(prompt[:-1]))) == 1
    tools = [example for example in made if "[" in example[1][0]]
    assert 0.2 < len(tools) / 400 < 0.4
    told = [False, True, False, True, False, True]  # the prompt and the tool's words are given
    assert [trained for _, trained in tools[0]] == told
    early = [calculator.demonstration(str(i), progress=0.1) for i in range(400)]
    assert 0.7 < sum("[" in example[1][0] for example in early) / 400 < 0.9


def test_sum_of_digits():
    task = SumDigits(cfg())
    assert all(e["answer"] == f"#{sum(map(int, e['prompt'][:-1]))}" for e in task.train[:100])


def test_countdown():
    task = Countdown(cfg())
    problem = dict(numbers=[3, 4, 5])
    assert task.correct(say("so <answer>3*4+5</answer>", 17, **problem)) == 1
    assert task.correct(say("3*4+5", 17, **problem)) == 1
    for text in (
        "3*4+4+1",
        "17",
        "3*4+5+0",
        "4+4+4+5",
        "<answer></answer>",
        "3*(4",
        "3**4",
        "9" * 5000,
    ):
        assert task.correct(say(text, 17, **problem)) == 0, text[:40]
    assert task.correct(say("3_4+5", 39, **problem)) == 0  # 34 is none of the numbers


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
    assert math_answer(say(text, target)) == reward


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
    assert thinking(say(text)) == reward


def examples(n=20):
    return [{"prompt": f"{i}", "answer": i} for i in range(n)]


def write(path, *objects) -> str:
    path.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects))
    return str(path)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    good = b'{"prompt": "1", "answer": "2"}\n\n'  # a blank line counts, but is no example
    for bad in (b'{"prompt": \n', b"[1]\n", b'{"prompt": "\xe9"}\n'):
        path.write_bytes(good + bad)
        with pytest.raises(UserError, match=r"data\.jsonl, line 3: not a JSON object: "):
            tasks.read_examples(str(path), "train")
    path.write_bytes(good + b'{"prompt": "1"}\n')
    with pytest.raises(UserError, match=r"line 3: needs 'prompt' and 'answer', has \['prompt'\]"):
        tasks.load_task(cfg(task=str(path)))
    for source in (tmp_path / "none.parquet", tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match="no such file"):
            tasks.read_examples(str(source), "train")


def test_a_file_as_a_task(tmp_path):
    path = write(tmp_path / "data.jsonl", *examples(), *examples(5))
    task = tasks.load_task(cfg(task=path))
    assert (len(task.train), len(task.heldout)) == (18, 2)  # a prompt that stands twice counts once
    with pytest.raises(UserError, match="9 different prompts"):
        tasks.load_task(cfg(task=write(tmp_path / "short.jsonl", *examples(9))))


def test_only_newlines_end_a_line(tmp_path):
    odd = {"prompt": "a\u2028b\x85c", "answer": 1}
    path = write(tmp_path / "data.jsonl", odd, {**odd, "answer": 2})
    assert [e for _, e in tasks.read_examples(path, "train")] == [odd, {**odd, "answer": 2}]


def test_parquet_and_jsonl_are_read_alike(tmp_path):
    import datasets

    rows = [{"question": f"q{i}", "answer": f"because\n#### {i}"} for i in range(5)]
    (tmp_path / "jsonl").mkdir(), (tmp_path / "parquet").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "jsonl" / f"{split}.jsonl", *rows)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    a, b = (GSM8K(cfg(task_data=str(tmp_path / kind))) for kind in ("jsonl", "parquet"))
    assert a.train == b.train and a.train[3] == {"prompt": "q3", "answer": "3"}


@pytest.mark.skipif(not (SHARED / "data/gsm8k").exists(), reason="no GSM8K files here")
def test_gsm8k():
    task = GSM8K(cfg(task_data=str(SHARED / "data/gsm8k")))
    assert (len(task.train), len(task.heldout)) == (7473, 1319)
    assert all(number(e["answer"]) is not None for e in task.train + task.heldout)


def test_two_rewards_of_one_name(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from examples.calculator import Calculator, calculate\n"
        "class Mine(Calculator):\n"
        "    def __init__(self, cfg):\n"
        "        super().__init__(cfg)\n"
        "        self.rewards = [lambda e: 1, self.correct, lambda e: 2]\n"
    )
    with pytest.raises(UserError, match="two rewards are named '<lambda>'"):
        tasks.load_task(cfg(task=f"{mine}:Mine"))


def test_a_user_task_and_a_wrong_name(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from examples.calculator import Calculator, calculate\nclass Mine(Calculator):\n    pass\n"
    )
    right = [*tasks.TASKS, f"{mine}:Mine", write(tmp_path / "data.jsonl", *examples())]
    for name in right:
        tasks.find_task(name)
    assert type(tasks.load_task(cfg(task=f"{mine}:Mine"))).__name__ == "Mine"
    wrong = {"nonsense": "known are calculator, ", f"{mine}:Other": "NAME that the file defines"}
    wrong |= {f"{tmp_path}/none.py:Mine": "no file", f"{tmp_path}/none.jsonl": "no such file"}
    for name, what in wrong.items():
        for use in (lambda cfg: tasks.find_task(cfg.task), tasks.load_task):
            with pytest.raises(UserError, match=what):
                use(cfg(task=name))
