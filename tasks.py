"""Tasks: where prompts come from, what the environment answers, and what a reply is worth. What a
user edits first.

A task is a class with four things (see `Task`). Its `reply` and its rewards run in the generator's
pool of workers, so a slow one holds only its own row. Nothing here knows of ranks, engines or
gradients.

    --task=calculator | sum_digits | countdown | gsm8k | file.jsonl | my_file.py:MyTask
"""

import ast
import json
import math
import operator
import pathlib
import random
import re
from dataclasses import dataclass, field

from runtime import UserError, load_symbol


@dataclass
class Episode:
    """One reply in the making: the problem, and the turns of the policy and its environment
    alternately, as text.
    """

    problem: dict
    turns: list[str] = field(default_factory=list)
    state: dict = field(
        default_factory=dict
    )  # whatever an environment wants to remember between its turns

    @property
    def text(self) -> str:
        return "".join(self.turns)


class Task:
    """Subclass it, fill `train` and `heldout` with dicts (`prompt`, and what your rewards need),
    list your rewards.
    """

    system: str = ""  # system prompt, for models with a chat template
    stop: str = (
        ""  # each character ends a turn of the policy, so that `reply` can answer in mid-text
    )
    train: list[dict]
    heldout: list[dict]

    def __init__(self, cfg):
        self.cfg = cfg
        # Functions of an Episode -> float, logged by their names; a reply's reward is their sum.
        self.rewards = [self.correct]

    def correct(self, episode: Episode) -> float:
        """1 for the right answer, else 0."""
        return float(episode.text.strip() == str(episode.problem["answer"]))

    def reply(self, episode: Episode) -> str | None:
        """What the environment appends after a turn of the policy; None ends the episode. It may
        take its time.
        """
        return None

    def problem(self, step: int, slot: int, attempt: int = 0) -> dict:
        """The prompt of a slot, by its name: a permutation of `train` per epoch; a later attempt
        draws anew.
        """
        if attempt:
            return random.Random(f"{self.cfg.seed}/{step}/{slot}/{attempt}").choice(self.train)
        epoch, place = divmod(step * self.cfg.prompts_per_step + slot, len(self.train))
        if getattr(self, "shuffled", (None,))[0] != epoch:
            self.shuffled = (
                epoch,
                random.Random(f"{self.cfg.seed}/epoch {epoch}").sample(self.train, len(self.train)),
            )
        return self.shuffled[1][place]


def reward_name(function) -> str:
    """Under which a reward is logged: its `__name__`, or that inside a partial, or its class's."""
    inner = getattr(function, "func", function)
    return getattr(function, "__name__", getattr(inner, "__name__", type(function).__name__))


# ---------------------------------------------------------------- calculator: the embedded default


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> int | None:
    """The value of integers joined by + - *, or None. It parses: a model's text is never evaluated
    as code.
    """

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError

    try:
        return value(ast.parse(expression, mode="eval").body) if len(expression) <= 40 else None
    except (ValueError, SyntaxError):
        return None


class Calculator(Task):
    """`63*11+48=`: the model may write `[63*11]`, the environment goes on with `=693`; the answer
    is `#741`.
    """

    stop = "]"

    def __init__(self, cfg):
        super().__init__(cfg)
        numbers = range(10, 100)
        drawn = random.Random("calculator").sample(
            range(90**3), 20_512
        )  # without replacement: no prompt stands twice
        problems = [(numbers[n // 8100], numbers[n // 90 % 90], numbers[n % 90]) for n in drawn]
        examples = [
            {"prompt": f"{a}*{b}+{c}=", "answer": a * b + c, "numbers": (a, b, c)}
            for a, b, c in problems
        ]
        self.train, self.heldout = examples[:20_000], examples[20_000:]

    def reply(self, episode: Episode) -> str | None:
        """The value of the bracket that the turn ended with; a turn that ends otherwise ends the
        episode.
        """
        call = re.search(r"\[([^\[\]]*)\]$", episode.turns[-1])
        result = calculate(call[1]) if call else None
        return None if result is None else f"={result}"

    def correct(self, episode: Episode) -> float:
        """1 if the text ends in the one `#number` and it is right, else 0."""
        return float(
            re.fullmatch(r"[^#]*#(-?\d+)", episode.text) is not None and self.last_number(episode)
        )

    def last_number(self, episode: Episode) -> bool:
        return episode.text.rpartition("#")[2] == str(episode.problem["answer"])

    def demonstration(self, name: str, progress: float) -> list[tuple[str, bool]]:
        """One example for SFT, as pieces (text, whether it is trained); `progress` is the share of
        SFT that is done.

        At last three in ten use the tool and the others guess. Before, eight in ten do: copying
        numbers into a call is learned late and suddenly, and the guesses, which nobody can learn,
        are noise in its way.
        """
        rng = random.Random(f"demonstration {name}")
        problem = rng.choice(self.heldout if "heldout" in name else self.train)
        a, b, c = problem["numbers"]
        answer = [(f"#{a * b + c}", True)]
        if rng.random() < (0.8 if progress < 0.65 else 0.3):
            calls = [
                (f"[{a}*{b}]", True),
                (f"={a * b}", False),
                (f"[{a * b}+{c}]", True),
                (f"={a * b + c}", False),
            ]
            return [(problem["prompt"], False), *calls, *answer]
        return [(problem["prompt"], False), *answer]


# ---------------------------------------------------------------- other tasks


class SumDigits(Task):
    """torchforge's toy: the sum of the digits of a number. Reward 1 for the exact answer."""

    def __init__(self, cfg):
        super().__init__(cfg)
        rng = random.Random("sum_digits")
        numbers = list(
            dict.fromkeys(str(rng.randrange(10, 10 ** rng.randint(2, 6))) for _ in range(8000))
        )
        examples = [{"prompt": f"{n}=", "answer": f"#{sum(map(int, n))}"} for n in numbers]
        self.train, self.heldout = examples[512:], examples[:512]


class Countdown(Task):
    """Reach a target with each of the given numbers at most once and + - *. The last `<answer>` (or
    line) counts.
    """

    system = "Give the expression inside <answer> tags, for example <answer>3*4+5</answer>."

    def __init__(self, cfg):
        super().__init__(cfg)
        examples = {}
        rng = random.Random("countdown")
        while len(examples) < 4096:
            numbers = [rng.randint(1, 20) for _ in range(3)]
            text = "".join(str(n) + rng.choice("+-*") for n in numbers)[:-1]
            if 0 < calculate(text) <= 100:
                prompt = f"Use {', '.join(map(str, numbers))} to make {calculate(text)}."
                examples[prompt] = {"prompt": prompt, "answer": calculate(text), "numbers": numbers}
        self.train, self.heldout = list(examples.values())[512:], list(examples.values())[:512]

    def correct(self, episode: Episode) -> float:
        """1 if the expression has the target's value and uses the numbers at most once each, else
        0.
        """
        found = re.findall(r"<answer>(.*?)</answer>", episode.text, re.DOTALL)
        expression = (found[-1] if found else episode.text.strip().rpartition("\n")[2]).strip()
        left = list(episode.problem["numbers"])
        for n in map(int, re.findall(r"\d+", expression)):
            if n not in left:
                return 0.0
            left.remove(n)
        return float(calculate(expression) == episode.problem["answer"])


def number(text: str) -> float | None:
    """`$1,234.5` or `1e6` -> float; None if it is no finite number."""
    try:
        value = float(re.sub(r"[$,\s]", "", text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def math_answer(episode: Episode) -> float:
    """1 if the first <answer> equals the target within 1e-6; 0.1 if the target stands only outside
    the tags; else 0.
    """
    target, text = number(str(episode.problem["answer"])), episode.text
    if target is None:
        return 0.0
    tagged = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    given = number(tagged[1]) if tagged else None
    if given is not None and abs(given - target) <= 1e-6:
        return 1.0
    outside = re.sub(r"<answer>.*?</answer>", " ", text, flags=re.DOTALL)
    values = (number(n) for n in re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?", outside))
    return 0.1 if any(v is not None and abs(v - target) <= 1e-6 for v in values) else 0.0


def thinking(episode: Episode) -> float:
    """1 for a non-empty <think> block, 0.2 for an empty one or a single tag, else 0."""
    block = re.search(r"<think>(.*?)</think>", episode.text, re.DOTALL)
    if block and block[1].strip():
        return 1.0
    return 0.2 if re.search(r"</?think>", episode.text) else 0.0


def read_examples(source: str, split: str) -> list[dict]:
    """A JSONL or parquet file, a folder with {split}.jsonl or .parquet, or a data set on the hub ->
    list of dicts.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        found = [p for end in ("jsonl", "parquet") if (p := path / f"{split}.{end}").exists()]
        if not found:
            raise UserError(f"{path}: no {split}.jsonl and no {split}.parquet in this folder")
        path = found[0]
    if path.suffix == ".jsonl" or path.suffix == ".json":
        if not path.exists():
            raise UserError(f"{path}: no such file")
        examples = []
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                examples.append(json.loads(line))
                assert isinstance(examples[-1], dict)
            except (ValueError, AssertionError):
                raise UserError(f"{path}, line {i}: not a JSON object: {line[:60]!r}") from None
        return examples
    import datasets

    try:
        if path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train").to_list()
        name, _, subset = source.partition(":")
        return datasets.load_dataset(name, subset or None, split=split).to_list()
    except (
        Exception
    ) as error:  # hub, network and file errors are many; the user needs the source and the reason
        raise UserError(
            f"task data {source!r} ({split}): {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None


class GSM8K(Task):
    """Grade-school maths (arXiv 2110.14168). `task_data` is a folder or file of its own format;
    default: the hub.
    """

    system = (
        "Think step by step inside <think> and </think> tags, "
        "then give the final number inside <answer> and </answer>."
    )

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [math_answer, thinking]
        source = cfg.task_data or "openai/gsm8k:main"
        self.train, self.heldout = (self.load(source, split) for split in ("train", "test"))

    @staticmethod
    def load(source: str, split: str) -> list[dict]:
        examples = []
        for i, e in enumerate(read_examples(source, split), start=1):
            if "question" not in e or "#### " not in e.get("answer", ""):
                raise UserError(
                    f"{source} ({split}), row {i}: needs a question, and an answer with '#### '"
                )
            examples.append({"prompt": e["question"], "answer": e["answer"].rpartition("#### ")[2]})
        return examples


class JsonLines(Task):
    """Any JSONL (or parquet) file with `prompt` and `answer`. The last tenth, at most 512 rows, is
    held out.
    """

    def __init__(self, cfg, source: str):
        super().__init__(cfg)
        examples = read_examples(source, "train")
        for i, e in enumerate(examples, start=1):
            if not {"prompt", "answer"} <= e.keys():
                raise UserError(f"{source}, row {i}: needs 'prompt' and 'answer', has {sorted(e)}")
        order = list(
            {e["prompt"]: e for e in examples}.values()
        )  # a prompt that stands twice could be on both sides
        held = min(512, len(order) // 10)
        if not held:
            raise UserError(
                f"{source}: {len(order)} different prompts; one in ten is held out, so 10 at least"
            )
        self.train, self.heldout = order[:-held], order[-held:]


TASKS = {"calculator": Calculator, "sum_digits": SumDigits, "countdown": Countdown, "gsm8k": GSM8K}


def load_task(cfg) -> Task:
    """The task that the settings name. UserError if there is none, or its data cannot be read."""
    if cfg.task in TASKS:
        return TASKS[cfg.task](cfg)
    if ".py:" in cfg.task:
        return load_symbol(cfg.task, "task")(cfg)
    if cfg.task.endswith((".jsonl", ".json", ".parquet")):
        return JsonLines(cfg, cfg.task)
    raise UserError(
        f"task={cfg.task}: known are {', '.join(TASKS)}, a .jsonl file, or my_file.py:MyTask"
    )
