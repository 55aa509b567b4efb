"""Tasks: where prompts come from, what the environment answers, what a reply is worth.
What a user edits first. A task is a class with four things (see `Task`). Its `reply` and its
rewards run in the generator's pool of workers, so a slow one holds up its own row only; those that
are `async` are awaited, thousands at once. Nothing here knows of ranks, engines or gradients."""

import functools
import json
import pathlib
import random
from dataclasses import dataclass, field

import yaml

from runtime import UserError, load_symbol


@dataclass
class Episode:
    """One reply in the making: the problem, and what has been said so far."""

    problem: dict
    turns: list[str] = field(default_factory=list)  # the policy's and the environment's, in turn
    state: dict = field(default_factory=dict)  # what an environment remembers between its turns

    @property
    def text(self) -> str:
        return "".join(self.turns)


class Task:
    """Subclass it: fill `train`, `heldout`, list your rewards. --task_settings.NAME=... sets it."""

    system: str = ""  # system prompt, for models with a chat template
    template: str = ""  # a chat template (Jinja) in place of the model's own
    thinking: str = "auto"  # yes or no: what its enable_thinking is; auto: not said
    tools: list[dict] = []  # JSON schemas, for templates that tell a model of its tools
    stop: str = ""  # each character ends a turn of the policy, as EOS does
    weights: dict[str, float] = {}  # what a reward counts in the sum, by its name; else 1
    train: list[dict]  # each has a `prompt` (text, or messages), and what your rewards need
    heldout: list[dict]
    start = None  # or a function of an Episode: its prompt, where the environment makes it

    def __init__(self, cfg):
        self.cfg = cfg
        for name, value in getattr(cfg, "task_settings", {}).items():
            kind = type(old := getattr(type(self), name, None))
            value = yaml.safe_load(value) if isinstance(value, str) and kind is not str else value
            fits = isinstance(value, {float: int | float, str: str | int | float}.get(kind, kind))
            if kind not in (str, int, float, bool, list, dict) or not fits:
                raise UserError(f"task_settings.{name}={value!r}: not a setting of task={cfg.task}")
            setattr(self, name, {**old, **value} if kind is dict else kind(value))
        # Functions of an Episode -> float, or a list: what each turn of the policy has earned.
        # Logged by their names; an episode's reward is their weighted sum.
        self.rewards = [self.correct]
        self.permutation = functools.lru_cache(1)(permutation)  # of the present epoch

    def correct(self, episode: Episode) -> float:
        """1 for the right answer, else 0."""
        return float(episode.text.strip() == str(episode.problem["answer"]))

    def reply(self, episode: Episode) -> str | list[dict] | None:
        """The environment's answer to each turn of the policy; None ends the episode. Text goes on
        after a `stop` character; after EOS it is the user's next message, by the model's chat
        template. A list is messages, with `role` and `content`."""
        return None

    def problem(self, step: int, slot: int, attempt: int = 0) -> dict:
        """The prompt of a slot, by its name; a later attempt draws anew."""
        if attempt:
            return random.Random(f"{self.cfg.seed}/{step}/{slot}/{attempt}").choice(self.train)
        epoch, place = divmod(step * self.cfg.prompts_per_step + slot, len(self.train))
        return self.train[self.permutation(self.cfg.seed, epoch, len(self.train))[place]]


def permutation(seed: int, epoch: int, size: int) -> list[int]:
    """The order of an epoch by its name: the same in any topology and after a resume."""
    return random.Random(f"{seed}/epoch {epoch}").sample(range(size), size)


def reward_name(function) -> str:
    """Under which a reward is logged: its `__name__`, or that inside a partial, or its class's."""
    inner = getattr(function, "func", function)
    return getattr(function, "__name__", getattr(inner, "__name__", type(function).__name__))


FILES = (".jsonl", ".json", ".parquet")  # what read_examples reads; .json is read as JSONL
# Of examples/, whose files are there to copy; the first is the embedded default.
TASKS = {"calculator": "Calculator", "countdown": "Countdown"}
TASKS |= {"gsm8k": "GSM8K", "sum_digits": "SumDigits"}


def read_examples(source: str, split: str) -> list[tuple[str, dict]]:
    """(where it stands, example) for each example of a source that `open_source` knows."""
    place, rows = open_source(source, split)
    found = (unpack(row, place, i) for i, row in enumerate(rows, start=1))
    return [(where, example) for where, example in found if example is not None]


def open_source(source: str, split: str, streaming: bool = False):
    """(its name, its rows as `datasets` has them) of a JSONL or parquet file, a folder with
    {split}.jsonl or {split}.parquet or one that `datasets` reads, or a data set on the hub (`name`
    or `name:subset`). A row of JSONL is its line: what stands there may be of any type."""
    import datasets

    path, (name, _, subset) = pathlib.Path(source), source.partition(":")
    path = next((p for end in FILES if (p := path / f"{split}{end}").exists()), path)
    place, how = f"{source} ({split})", {"path": name, "name": subset or None, "split": split}
    if path.suffix in FILES:
        if not path.exists():
            raise UserError(f"{path}: no such file")
        place, how = str(path), {"path": "parquet", "data_files": str(path)}
        how["split"] = "train" + "".join(split.partition("[")[1:])  # a file is one; of it a part
        if path.suffix != ".parquet":
            how |= {"path": "text", "encoding_errors": "backslashreplace"}  # which JSON refuses
            how["features"] = datasets.Features({"jsonl": datasets.Value("string")})
    try:
        return place, datasets.load_dataset(**how, streaming=streaming)
    except Exception as error:  # of the hub, the network, the file: the user needs the reason
        raise UserError(f"{place}: {type(error).__name__}: {error}".split("\n")[0]) from None


def unpack(row: dict, place: str, i: int) -> tuple[str, dict | None]:
    """(where it stands, example) of the i-th row of a source; None where a line is blank."""
    if row.keys() != {"jsonl"}:
        return f"{place}, row {i}", row
    text = row["jsonl"].strip()
    try:
        example = json.loads(text) if text else None
        if text and not isinstance(example, dict):
            raise ValueError(f"{example!r:.60}")
    except ValueError as error:
        raise UserError(f"{place}, line {i}: not a JSON object: {error}") from None
    return f"{place}, line {i}", example


def find_task(name: str):
    """What makes the task of that name from the settings, or a UserError. Reads no data."""
    examples = pathlib.Path(__file__).parent / "examples"
    place = f"{examples / name}.py:{TASKS[name]}" if name in TASKS else name
    if name.endswith(FILES):
        if not pathlib.Path(name).exists():
            raise UserError(f"task={name}: no such file")
        place = f"{examples}/from_file.py:FileTask"
    if ".py:" in place:
        return load_symbol(place, "task")
    raise UserError(f"task={name}: known are {', '.join(TASKS)}, a .jsonl file, my_file.py:MyTask")


def load_task(cfg) -> Task:
    """The task that the settings name. UserError if its data or its rewards cannot be used."""
    task = find_task(cfg.task)(cfg)
    names = [reward_name(f) for f in task.rewards]
    if again := [name for name in names if names.count(name) > 1]:
        raise UserError(f"task={cfg.task}: two rewards are named {again[0]!r}; rename one of them")
    if wrong := task.weights.keys() - {*names}:
        raise UserError(f"weights of task={cfg.task}: {min(wrong)!r} is none of {', '.join(names)}")
    return task
