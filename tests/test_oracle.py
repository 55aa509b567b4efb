"""The engine against a sampler of 60 lines in plain torch (oracle.py): the same log-probs, the same
masks over several turns, the same greedy tokens.
"""

import json

import pytest
from conftest import ROOT, lines, logs, run
from oracle import Oracle
from oracle_ranks import LIMITS, Opened
from transformers import AutoTokenizer

from grpo import Config
from report import load_rollouts
from tasks import Episode

MODEL = ROOT / "assets/calculator"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
TEMPERATURE = 2.0  # so high that sampling is not greedy decoding by chance
ROOM = 28  # tokens after the prompt: three of twelve greedy replies need no more
SIZES = ["--prompts_per_step=4", "--group_size=4", "--eval_size=12", "--eval_every=1"]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def oracle() -> Oracle:
    return Oracle(MODEL, set(encode("]")), {TOKENIZER.eos_token_id}, TEMPERATURE)


def episode(problem, turns) -> Episode:
    """The task's view of token turns: text, without the end of sequence."""
    return Episode(problem, [TOKENIZER.decode(t, skip_special_tokens=True) for t in turns])


def environment(task, problem):
    def answer(turns):
        text = task.reply(episode(problem, turns))
        return None if text is None else encode(text)

    return answer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one step, without learning."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    settings = ["--steps=1", "--lr=0", "--save_rollouts=true", f"--temperature={TEMPERATURE}"]
    task = ["--task=tests/oracle_ranks.py:Opened", f"--max_new_tokens={ROOM}"]
    done = run(2, "grpo.py", f"--run_dir={folder}", *task, *settings, *SIZES, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:] + logs(folder)
    return folder


def test_sampled_tokens_have_the_oracles_log_probs_and_masks(trained):
    table, judge, holes = load_rollouts(trained / "rollouts/0"), oracle(), 0
    task = Opened(Config(prompts_per_step=4))
    assert len(table) == 16
    for i, slot in enumerate((table.index & 0xFFFFFFFF).tolist()):
        problem, tokens = task.problem(0, slot), table.tokens[i, : table.length[i]].tolist()
        prompt = TOKENIZER.encode(problem["prompt"])
        assert tokens[: len(prompt)] == prompt
        mask = judge.mask(tokens[len(prompt) :], environment(task, problem))
        holes += not all(mask)
        mask = [False] * len(prompt) + mask
        assert table.mask[i].tolist() == mask + [False] * (table.mask.shape[1] - len(mask))
        for t, expected in enumerate(judge.score(tokens)):
            assert abs(table.logprobs[i, t] - expected * mask[t]) < 1e-4, (i, t)
    assert holes > 8  # rows with turns of the environment, which the masks leave out


def test_greedy_evaluation_has_the_oracles_accuracy(trained):
    task, judge, right = Opened(Config()), oracle(), 0.0
    for problem in task.heldout[:12]:
        prompt = TOKENIZER.encode(problem["prompt"])
        turns, _ = judge.reply(prompt, environment(task, problem), ROOM, Config.max_turns)
        right += task.correct(episode(problem, turns))
    evals = [x["eval_reward"] for x in lines(trained) if "eval_reward" in x]
    assert evals == [right / 12, right / 12]  # versions 0 and 1, the same with lr=0
    assert 0 < right < 12


def test_greedy_tokens_are_the_oracles(tmp_path):
    """Over several turns; also where tokens or turns run out."""
    done = run(1, "tests/oracle_ranks.py", str(tmp_path / "found.json"), timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    task, judge, uses = Opened(Config()), oracle(), []
    for limits, rows in zip(LIMITS, json.loads((tmp_path / "found.json").read_text())):
        assert len(rows) == 12
        for problem, row in zip(task.heldout, rows):
            prompt = TOKENIZER.encode(problem["prompt"])
            turns, finished = judge.reply(prompt, environment(task, problem), *limits)
            assert row["tokens"] == prompt + sum(turns, [])
            sampled = [[i % 2 == 0] * len(turn) for i, turn in enumerate(turns)]
            assert row["mask"] == [False] * len(prompt) + sum(sampled, [])
            assert row["finished"] == finished
            uses.append((limits, len(turns), finished))
    # What was compared. Turns: call, value, call, value, answer.
    assert {((40, 4), 5, True), ((28, 4), 5, True), ((28, 4), 5, False)} <= set(uses)
    assert {((24, 4), 3, False), ((16, 4), 3, False), ((40, 2), 3, False)} <= set(uses)
