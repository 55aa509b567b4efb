"""Episodes of several turns: exact to the token, paid by turns, cut off where a limit says so."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SHAPE, judge, lines, run
from test_generator import WORLD, row, task_of
from test_runs import good
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import grpo
import report
import tasks
from generator import Generator
from report import load_rollouts
from rollouts import Row
from runtime import UserError
from tasks import Episode, Task
from workers import Workers

QWEN = """{%- for m in messages %}
{%- set words = m.content if loop.last else m.content.split('</think>')[-1] %}
{{- '<|' + m.role[0] + '|>' + words + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|a|>' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{%- endif %}
{%- endif %}"""
# The system prompt goes in front of the last message, wherever that is.
MOVES_SYSTEM = """{%- for m in messages if m.role != 'system' %}
{{- '<|' + m.role[0] + '|>' + (messages[0].content if loop.last else '') + m.content + '<|end|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|a|>' }}{%- endif %}"""
WORDS = ["<pad>", "<|end|>", "<|s|>", "<|u|>", "<|a|>", "<|t|>", "<think>", "</think>"]


def chat_tokenizer(template=QWEN):
    """Bytes with the merges ab and abab: `ab` is one token, and two, and no text says which."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {w: i for i, w in enumerate([*WORDS, *alphabet, "ab", "abab"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(WORDS)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<pad>", chat_template=template
    )
    return fast


@pytest.fixture
def playing():
    """task, settings -> a generator without an engine, whose engine is the test."""

    def make(task, tokenizer, **settings):
        usual = dict(deterministic=True, group_size=1, max_refills=0, max_turns=3, dtype="auto")
        usual |= dict(max_new_tokens=200, max_prompt_tokens=99, episode_seconds=0.0, model="m")
        made = Generator(SimpleNamespace(**{**usual, **settings}), WORLD, task, tokenizer)
        made.rows, made.groups, made.complete, made.queue, made.open = {}, {}, {}, [], {}
        made.workers, made.eos, made.stops = Workers(task, 1, 5.0), {1}, [1]
        made.submit = lambda row: made.rows.__setitem__(row.turn, row)  # no seed, no sampling
        return made

    return make


def says(made, text_or_tokens):
    """The policy's turn, to the environment's answer."""
    tokens = text_or_tokens
    if isinstance(tokens, str):
        tokens = made.encode(tokens)
    [name] = made.rows
    made.turns_ended([(name, tokens, [-1.0] * len(tokens), "stop")])
    while len(made.workers):
        made.apply_jobs()
    return tokens


def begin(made, prompt="x"):
    made.start(Row(0, 0, 0, 0, Episode({"prompt": prompt, "tokens": made.encode_prompt(prompt)})))
    while len(made.workers):
        made.apply_jobs()
    return made.rows[0]


END = 1


def test_what_was_sampled_is_trained_where_text_says_less(playing):
    tokenizer = chat_tokenizer()
    a, b, both = (tokenizer.convert_tokens_to_ids(w) for w in ("a", "b", "ab"))
    assert tokenizer.encode("ab") == [both] and tokenizer.decode([a, b]) == "ab"
    made = playing(
        task_of(lambda e: 1.0, reply=lambda e: "ab" if len(e.turns) < 2 else None), tokenizer
    )
    played = begin(made)
    prompt = list(played.tokens)
    says(made, [a, b, END]), says(made, [both, a, END])
    between = tokenizer.encode("\n<|u|>ab<|end|>\n<|a|>")
    assert played.tokens == prompt + [a, b, END] + between + [both, a, END]
    sampled = [False] * len(prompt) + [True] * 3 + [False] * len(between) + [True] * 3
    assert played.mask == sampled and played.turns[-1] == 1
    assert played.episode.turns == ["ab", "ab", "aba"] and made.complete[0] == [played]


def test_a_template_that_rewrites_history_does_not_touch_it(playing):
    """The thinking of the first turn stays in the tokens; the template would leave it out."""
    tokenizer = chat_tokenizer()
    observe = lambda e: [{"role": "tool", "content": "7"}, {"role": "user", "content": "go"}]  # noqa: E731
    made = playing(task_of(lambda e: 1.0, reply=observe), tokenizer)
    made.task.thinking, made.task.system = "no", "S"
    played = begin(made, "q")
    assert tokenizer.decode(played.tokens) == "<|s|>S<|end|>\n<|u|>q<|end|>\n<|a|><think></think>"
    says(made, "why</think>ab<|end|>")
    history = [{"role": "assistant", "content": "why</think>ab"}, *observe(None)]
    assert "why" not in tokenizer.apply_chat_template(history, tokenize=False)
    after = "why</think>ab<|end|>\n<|t|>7<|end|>\n<|u|>go<|end|>\n<|a|><think></think>"
    assert tokenizer.decode(played.tokens).endswith("<think></think>" + after)
    assert played.episode.turns == ["why</think>ab", "7\ngo"]
    says(made, "no end of its own")  # by a stop character: the template closes the message
    assert tokenizer.decode(played.tokens).endswith(
        "own<|end|>\n<|t|>7<|end|>\n<|u|>go<|end|>\n<|a|><think></think>"
    )


def test_templates_that_cannot_be_exact_or_lack_a_switch_are_refused(playing):
    made = playing(task_of(lambda e: 1.0, reply=lambda e: "go"), chat_tokenizer(MOVES_SYSTEM))
    made.task.system = "S"
    begin(made)
    with pytest.raises(UserError, match="chat template of model=m writes other messages anew"):
        says(made, "ab<|end|>")
    made.task.thinking = "no"
    with pytest.raises(UserError, match="no place for thinking"):
        made.encode_prompt("q")
    made.tokenizer.chat_template = None
    assert made.encode_prompt("q") == made.encode("q")
    cfg = grpo.Config()
    [said] = report.advice(cfg, made.task, made.tokenizer)
    assert said.endswith(
        "no chat template: prompts of text go without the task's system and thinking"
    )
    assert not report.advice(cfg, task_of(lambda e: 1.0), made.tokenizer)
    cfg.max_policy_age, cfg.old_policy = 1, "trainer"
    assert "old tokens" in report.advice(cfg, made.task, made.tokenizer)[1]
    with pytest.raises(UserError, match="no place for messages"):
        made.encode_prompt([{"role": "user", "content": "q"}])


def test_the_environment_makes_the_prompt_and_sees_the_last_turn(playing):
    """`start` is asked before the first turn, `reply` after the last; what it says then is cut."""
    seen = []

    async def start(episode):
        episode.state["at"] = 5
        return [{"role": "user", "content": "made"}]

    async def reply(episode):
        seen.append((len(episode.turns), episode.state["at"]))
        return "more"

    task = task_of(lambda e: 1.0, reply=reply)
    task.start = start
    made = playing(task, chat_tokenizer(), max_turns=2)
    played = begin(made)
    assert made.tokenizer.decode(played.tokens) == "<|u|>made<|end|>\n<|a|>"
    assert played.prompt_length == len(played.tokens)
    says(made, "a<|end|>"), says(made, "b<|end|>")
    assert seen == [(1, 5), (3, 5)] and made.complete[0] == [played] and not played.finished
    assert played.episode.turns == ["a", "more", "b"] and played.paid == [0.0, 1.0]
    nothing = type("Nothing", (), {"start": lambda self, episode: None})()
    task.start = nothing.start  # a method, as in a task
    with pytest.raises(UserError, match="<lambda> returned None .*step 0, slot 0"):
        begin(playing(task, chat_tokenizer()))
    for wrong in ([{"role": "user"}], [None], 0):  # of a turn, too
        task = task_of(lambda e: 1.0, reply=lambda e, wrong=wrong: wrong)
        with pytest.raises(UserError, match="<lambda> returned .*step 0, slot 0"):
            says(made := playing(task, chat_tokenizer()), begin(made) and "a<|end|>")


def test_an_episode_that_takes_too_long_is_cut_off(playing):
    made = playing(
        task_of(lambda e: 1.0, reply=lambda e: "go"), chat_tokenizer(), episode_seconds=60
    )
    played = begin(made)
    says(made, "a<|end|>")
    assert not made.complete
    played.started = time.monotonic() - 61
    made.rows = {1: played}
    says(made, "a<|end|>")
    assert made.complete[0] == [played] and not played.finished and len(played.paid) == 2


def test_rewards_by_turns_and_weights():
    judged = row("a", "env", "b")
    task = task_of(lambda e: [1.0, 2.0], lambda_of("late", 4.0))
    task.weights = {"late": "0.5"}  # as a command line has it
    judge(task, judged, may_go_on=False)
    assert judged.rewards == {"<lambda>": 3.0, "late": 4.0} and judged.paid == [1.0, 4.0]
    for wrong in ([1.0], [1.0, math.nan], [1.0, 2.0, 3.0]):
        with pytest.raises(UserError, match=r"wrong returned \[1.0.* for 2 turns .*step 3, slot 4"):
            judge(task_of(lambda_of("wrong", wrong)), row("a", "env", "b"), may_go_on=False)


def lambda_of(name, value):
    function = lambda episode: value  # noqa: E731
    function.__name__ = name
    return function


def test_a_tasks_settings():
    cfg = SimpleNamespace(seed=0, prompts_per_step=4, task="x.py:Y", task_settings={})

    class Mine(Task):
        hands: int = 4

    assert Mine(cfg).hands == 4
    cfg.task_settings = {"hands": "6", "system": "Be brief.", "thinking": False}
    assert (
        vars(Mine(cfg)).items() >= {"hands": 6, "system": "Be brief.", "thinking": "False"}.items()
    )
    for wrong in ({"hand": 6}, {"reply": "x"}, {"weights": "x"}, {"system": {"a": 1}}):
        cfg.task_settings = wrong
        with pytest.raises(UserError, match=r"task_settings\.\w+=.*not a setting of task=x.py:Y"):
            Mine(cfg)
    cfg.task, cfg.task_settings = "calculator", {"weights": {"corect": 2}}
    with pytest.raises(UserError, match="weights of task=calculator: 'corect' is none of correct"):
        tasks.load_task(cfg)


CHAT = """
import tasks


class Chat(tasks.Task):
    system = "S"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.each, self.turns]
        self.train = self.heldout = [{"prompt": str(i)} for i in range(8)]

    async def reply(self, episode):
        return [{"role": "tool", "content": "ab" * len(episode.turns)}]

    async def each(self, episode):
        return [float("a" in turn) for turn in episode.turns[::2]]

    async def turns(self, episode):
        return len(episode.turns[::2])
"""


def test_a_run_of_chats_is_exact_to_the_token(tmp_path):
    """A random model of a tokenizer in which most samples are not how their text is encoded: what
    the trainer finds for the tokens of all turns is what the engine sampled them with."""
    tokenizer = chat_tokenizer()
    shape = {**SHAPE, "vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, "eos_token_id": 1}))
    model.generation_config.eos_token_id = [1, *range(200, 230)]  # a turn has eight tokens or so
    model.save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "chat.py").write_text(CHAT)
    args = [f"--model={tmp_path}/m", f"--task={tmp_path}/chat.py:Chat", "--save_rollouts=true"]
    args += ["--steps=1", "--prompts_per_step=4", "--group_size=4", "--max_new_tokens=96"]
    args += ["--discount=0.5", "--task_settings.weights.turns=0.25", "--task_settings.thinking=no"]
    folder = good(
        run(2, "grpo.py", *args, "--eval_size=4", f"--run_dir={tmp_path}/r"), tmp_path / "r"
    )
    [metrics] = [line for line in lines(folder) if "loss" in line]
    table = load_rollouts(f"{folder}/rollouts/0")
    assert metrics["mismatch_max"] < 1e-4
    texts = [tokenizer.decode(t[:n]) for t, n in zip(table.tokens.tolist(), table.length.tolist())]
    again = [tokenizer.encode(text) for text in texts]
    assert any(a != t[: len(a)] for a, t in zip(again, table.tokens.tolist()))
    assert sum("<|t|>" in text for text in texts) > 8 and all(t.startswith("<|s|>S") for t in texts)
    given = table.tokens[
        ~table.mask & (torch.arange(table.tokens.shape[1]) < table.length[:, None])
    ]
    assert (given == tokenizer.convert_tokens_to_ids("<|t|>")).any()  # the tool's are not trained
    assert not (table.tokens[table.mask] == 0).all()
    reward = table.rewards["each"] + 0.25 * table.rewards["turns"]
    assert torch.allclose(table.reward, reward) and metrics["reward/turns"] > 1
    spread = [len(a[m].unique()) for a, m in zip(table.advantage, table.mask)]
    assert max(spread) > 1  # a turn has an advantage of its own
