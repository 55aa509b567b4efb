"""The environments and rewards of examples/: right and wrong play, and packages that are real."""

import asyncio
import http.server
import importlib.util
import json
import pathlib
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from examples import blackjack, maths_tool, maze, rewards
from runtime import UserError
from tasks import Episode

EXAMPLES = [p for p in (ROOT / "examples").glob("*.py") if p.stem != "ppo"]


def cfg(data="", **task_settings):
    usual = {"seed": 0, "prompts_per_step": 4, "task": "mine", "task_data": data}
    return SimpleNamespace(**usual, task_settings=task_settings)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 120


def test_blackjack_is_played_and_paid_by_hands():
    game = blackjack.Blackjack(cfg(hands="2"))
    assert game.hands == 2 and blackjack.add(15, True, 9) == (14, False)
    assert blackjack.add(11, True, 11) == (12, True) and blackjack.add(12, False, 10)[0] == 22
    episode = Episode(game.train[0], ["+"])
    while (said := game.reply(episode)) is not None:
        episode.turns += [said, "."]
    paid = game.won(episode)
    assert len(paid) == len(episode.turns[::2]) and sum(p != 0 for p in paid) <= 2
    assert max(map(abs, paid)) <= 1
    for odd in ("", "5+", "++"):  # all hands that are left
        assert game.reply(wrong := Episode(game.train[0], [odd])) is None
        assert game.won(wrong) == [-2.0] and game.wins(wrong) == 0
    cut = Episode(game.train[0], ["+", " 9/12", "1"], {"paid": [0.0]})
    assert game.won(cut) == [0.0, 0.0]
    assert game.wins(Episode({}, [], {"paid": [0.0, 1.0]})) == 0.5
    assert game.weights == {"wins": 0.0}


def test_blackjack_is_written_in_four_characters():
    """The total where it always is: a policy that has to look for it takes 7 for 17."""
    shown = {}
    for deal in map(str, range(400)):
        seen, up = blackjack.Blackjack.show(deal), blackjack.card(deal, "dealer", 0)
        assert shown.setdefault(seen[0], up) == up and len(seen) == 4
        assert blackjack.begin(deal) == (int(seen[2:]), {"/": False, "*": True}[seen[1]])
    assert sorted(shown.values()) == list(range(2, 12))


def test_the_best_play_of_blackjack_is_worth_what_is_known():
    """Taking and standing alone, from endless decks: -0.0470 a hand; the book's first rows."""
    best = lambda t, s, up: blackjack.hits(t, s, up) > blackjack.stands(t, (up, up == 11))  # noqa: E731
    takes = [up for up in range(2, 12) if best(16, False, up)]
    assert takes == [7, 8, 9, 10, 11] and not best(17, False, 10) and best(17, True, 10)
    game = blackjack.Blackjack(cfg())

    def move(seen):
        return ".+"[best(int(seen[-2:]), seen[-3] == "*", 2 + "234567890x".index(seen[-4]))]

    played = [game.play(problem, move)[1] / game.hands for problem in game.train]
    assert -0.06 < sum(played) / len(played) < -0.035


def test_the_players_of_blackjack_that_are_shown_draw_too_much():
    game, taken = blackjack.Blackjack(cfg()), {}
    for name in map(str, range(1500)):
        pieces = [text for text, _ in game.demonstration(name, 0.5)]
        for seen, move in zip(pieces[::2], pieces[1::2], strict=True):
            kind = seen[-4] in "23456", seen[-3] == "*", int(seen[-2:])
            taken.setdefault(kind, []).append(move == "+")
    share = lambda *kind: sum(taken[kind]) / len(taken[kind])  # noqa: E731
    assert share(True, False, 7) > 0.85 and share(True, False, 17) < 0.6
    assert share(False, False, 18) > 0.5 and share(True, False, 13) > 0.5  # where it is wrong
    assert share(False, False, 16) - share(True, False, 16) > 0.05


def test_a_maze_has_a_shortest_way_and_pays_for_it():
    walk = maze.Maze(cfg())
    for problem in walk.train[:50]:
        doors = walk.doors(problem)
        far = maze.distances(doors, problem["goal"])
        assert len(doors) == len(far) == 16  # every cell can be left and reached
        episode, moves = Episode(problem), 0
        while walk.short(episode) == 0:
            at = episode.state.get("at", problem["start"])
            step = lambda m, at=at: (at[0] + maze.MOVES[m][0], at[1] + maze.MOVES[m][1])  # noqa: E731
            episode.turns.append(min(doors[at], key=lambda m: far[step(m)]))
            said, moves = walk.reply(episode), moves + 1
        assert said is None and walk.short(episode) == 1 and moves == far[problem["start"]]
    problem = walk.train[0]
    wall = next(m for m in maze.MOVES if m not in walk.doors(problem)[problem["start"]])
    bumped = Episode(problem, [wall])
    assert walk.reply(bumped) == problem["prompt"] and bumped.state["moves"] == 1
    assert walk.reply(Episode(problem, ["a6"])) is None
    for name in map(str, range(50)):
        pieces = walk.demonstration(name, 0.5)
        assert all(text in maze.MOVES for text, own in pieces if own)


def test_the_python_tool_answers_programs_and_not_answers():
    try:
        maths_tool.check_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    game = maths_tool.CountdownWithPython(cfg())
    call = "I search.\n```python\nprint(3*4+5)\n```"
    assert game.reply(Episode({}, [call])) == "Output: 17"
    assert game.reply(Episode({}, ["<answer>3*4+5</answer>"])) is None
    episode = Episode(
        {"answer": 17, "numbers": [3, 4, 5]}, [call, "Output: 17", "<answer>3*4+5</answer>"]
    )
    assert game.correct(episode) == 1
    episode.turns[-1] = "<answer>17</answer>"
    assert game.correct(episode) == 0
    assert maths_tool.CountdownWithPython(cfg(tool=False)).reply(Episode({}, [call])) is None


def test_worked_answers_become_programs():
    worked = "Half of 48 is <<48/2=24>>24.\nTogether <<48+24=72>>72.\n#### 72"
    task = maths_tool.GSM8KWithPython
    _, _, call, printed, final = task.conversation("How many?", worked, True)
    assert call["content"] == "```python\na = 48/2\nb = 48+a\nprint(b)\n```"
    assert printed["content"] == "Output: 72.0" and final["content"] == "Answer: 72"
    assert task.conversation("How many?", worked.replace("#### 72", "#### 73"), True) is None
    system, _, plain = task.conversation("How many?", worked, False)
    assert plain["content"] == "Half of 48 is 24.\nTogether 72.\nAnswer: 72"
    assert system["content"] == task.alone


def test_worked_answers_are_a_form_of_sft(tmp_path):
    """GSM8K's own rows, in JSONL and as `datasets` has them; without arithmetic no program."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
    one = "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + one + "{% endfor %}"
    made = [{"question": "1+2=", "answer": "<<1+2=3>>3\n#### 3"}]
    made += [{"question": "1", "answer": "#### 1"}]
    how = {"place": "here", "tokenizer": tokenizer, "loss_on": "assistant"}
    bad = {"jsonl": ["", "{", json.dumps({"question": "1"})]}  # a blank line is none
    why = [x for x in maths_tool.with_tool(bad, [0, 1, 2], **how)["bad"]]
    assert len(why) == 2 and "here, line 2" in why[0] and "here, line 3" in why[1]
    as_text = {"jsonl": list(map(json.dumps, made))}
    columns = {k: [row[k] for row in made] for k in made[0]}
    for rows in (as_text, columns):
        assert [bool(why) for why in maths_tool.with_tool(rows, [0, 1], **how)["bad"]] == [
            False,
            True,
        ]
        assert maths_tool.without_tool(rows, [0, 1], **how)["bad"] == ["", ""]


def test_an_answer_is_the_last_number_of_the_last_message():
    correct = maths_tool.GSM8KWithPython.correct
    for text, reward in (("Answer: $1,072", 1), ("Answer: 7\nAnswer: 1072", 1), ("1072", 0)):
        assert correct(None, Episode({"answer": "1072"}, [text])) == reward


def test_rewards_to_copy():
    said = lambda *turns: Episode({"answer": "1/2"}, list(turns))  # noqa: E731
    half = 1.0 if rewards.math_verify else 0.0
    assert rewards.mathematics(said(r"so \boxed{0.5}")) == half
    assert rewards.mathematics(said("<answer>1/2</answer>")) == 1
    assert rewards.mathematics(said("1/2")) == rewards.mathematics(said(r"\boxed{2}")) == 0
    assert rewards.mathematics(Episode({"answer": "1,200"}, [r"\boxed{1200.0}"])) == 1
    for text, value in (
        ("<think>so</think>1", 1),
        ("<think> </think>1", 0),
        ("a<think>b</think>", 0),
    ):
        assert rewards.thinking(said(text)) == value
    assert rewards.has_form(r"#\d+")(said("#12")) == 1 and rewards.has_form(r"#\d+")(said("#")) == 0
    short = rewards.shorter_than(4, over=4)
    assert [short(said("a" * n, "environment")) for n in (4, 6, 8, 20)] == [1, 0.5, 0, 0]
    latin = rewards.in_script("latin")
    assert latin(said("ab 12", "\u4e2d", "c\u4e2d")) == 0.75 and latin(said("12")) == 0


class Server(http.server.BaseHTTPRequestHandler):
    """Fails at first, then rates a reply by its length."""

    failures = 2

    def answer(self, value):
        self.send_response(200), self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):  # noqa: N802
        self.answer({"data": [{"id": "the judge"}]})

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).failures:
            type(self).failures -= 1
            return self.send_error(503)
        assert body["model"] == "the judge"
        reply = body["messages"][0]["content"].rpartition("Reply: ")[2]
        self.answer({"choices": [{"message": {"content": f"{len(reply)} of 10"}}]})

    def log_message(self, *args):
        pass


def test_a_judge_is_asked_again_and_its_silence_counted(tmp_path):
    from examples.judge import Judged

    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(4)))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        judged = Judged(cfg(str(tmp_path / "p.jsonl"), address=address, patience="5"))
        episodes = [Episode({"prompt": "q"}, ["x" * n]) for n in (3, 7)]

        async def both(task):
            return await asyncio.gather(*map(task.rated, episodes))

        assert asyncio.run(both(judged)) == [0.3, 0.7]
        assert [judged.asked(e) for e in episodes] == [1, 1]
        server.shutdown()
    silent = Episode({"prompt": "q"}, ["x"])
    nobody = Judged(cfg(str(tmp_path / "p.jsonl"), address="http://127.0.0.1:9"))
    assert asyncio.run(nobody.rated(silent)) == 0 and nobody.asked(silent) == 0


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


@needs("reasoning_gym")
def test_reasoning_gym():
    from examples.reasoning_gym_task import ReasoningGym

    task = ReasoningGym(cfg(name="leg_counting", config={"max_animals": "4"}))
    problem = task.train[0]
    for said, reward in ((problem["entry"]["answer"], 1), ("none", 0)):
        assert task.score(Episode(problem, [f"<answer>{said}</answer>"])) == reward
    assert task.score(Episode(problem, [problem["entry"]["answer"]])) == 0  # outside of its tags
    with pytest.raises(UserError, match="reasoning-gym, no_such_task: "):
        ReasoningGym(cfg(name="no_such_task"))


GUESS = """
import verifiers as vf
from datasets import Dataset


class Guess(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **more):
        said = vf.types.AssistantMessage.model_validate(messages[-1]).content
        state["won"] = said == state["answer"]
        if state["won"]:
            state["final_env_response"] = [vf.UserMessage(content="yes")]
            return state["final_env_response"]
        return [vf.UserMessage(content="higher" if said < state["answer"] else "lower")]


def won(state, **more):
    return float(state.get("won", False))


def load_environment():
    data = [{"question": f"A digit ({i})?", "answer": str(i % 10)} for i in range(20)]
    return Guess(dataset=Dataset.from_list(data), rubric=vf.Rubric(funcs=[won]), max_turns=4)
"""


@needs("verifiers")
def test_an_environment_of_verifiers(tmp_path, monkeypatch):
    from examples.verifiers_env import Verifiers

    (tmp_path / "guess.py").write_text(GUESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = Verifiers(cfg(environment="guess:load_environment"))

    async def play(*guesses):
        episode, said = Episode(dict(task.train[3])), []
        said.append((await task.start(episode))[0]["content"])
        for guess in guesses:
            episode.turns.append(guess)
            reply = await task.reply(episode)
            said.append(reply and reply[0]["content"])
            episode.turns.append(said[-1])
        return said, await task.rubric(episode)

    assert asyncio.run(play("3", "5")) == (["A digit (5)?", "higher", None], 1.0)
    assert asyncio.run(play(*"9999")) == (["A digit (5)?", *["lower"] * 3, None], 0.0)
    assert asyncio.run(play("2")) == (["A digit (5)?", "higher"], 0.0)  # cut off
    with pytest.raises(UserError, match="task_settings.environment=no:where"):
        Verifiers(cfg(environment="no:where"))


@needs("openenv")
def test_an_openenv_server(tmp_path):
    """One that `openenv init` makes: it echoes, and pays a tenth a character."""
    from examples.openenv_game import OpenEnv

    made = pathlib.Path(sys.executable).with_name("openenv")
    subprocess.run([made, "init", "echo_game"], cwd=tmp_path, capture_output=True, timeout=120)
    serve = [sys.executable, "-m", "uvicorn", "server.app:app", "--port", "8139"]
    with subprocess.Popen(
        serve, cwd=tmp_path / "echo_game", stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            while "running on" not in server.stderr.readline():
                assert server.poll() is None
            task = OpenEnv(cfg(address="http://127.0.0.1:8139"))

            async def play(i):
                episode = Episode(task.train[i])
                said = [await task.start(episode)]
                for text in ("hello", '{"message": "a"}'):
                    episode.turns.append(text)
                    said.append(await task.reply(episode))
                    episode.turns.append(said[-1])
                return [json.loads(x)["echoed_message"] for x in said[1:]], await task.paid(episode)

            async def three():  # one session at a time
                return await asyncio.gather(*map(play, range(3)))

            assert asyncio.run(three()) == [(["hello", "a"], [0.5, 0.1])] * 3
        finally:
            server.kill()
