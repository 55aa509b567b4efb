"""GSM8K with torchforge's two rewards: the answer, and a block of thinking before it.

torchrun --nproc_per_node=3 grpo.py --task=gsm8k --model=...                     # from the hub
torchrun --nproc_per_node=3 grpo.py --task=gsm8k --model=... --task_data=FOLDER  # *.jsonl
"""

import math
import re

from runtime import UserError
from tasks import Episode, Task, read_examples


def number(text: str) -> float | None:
    """`$1,234.5` or `1e6` -> float; None if it is no finite number."""
    try:
        value = float(re.sub(r"[$,\s]", "", text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def math_answer(episode: Episode) -> float:
    """1 if the first <answer> is the target within 1e-6, 0.1 if it stands outside tags, else 0."""
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


class GSM8K(Task):
    """Grade-school maths (arXiv 2110.14168), from `task_data` or the hub."""

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
        """Examples of GSM8K's own format: the answer is what stands behind `#### `."""
        examples = []
        for where, e in read_examples(source, split):
            if "question" not in e or "#### " not in str(e.get("answer")):
                raise UserError(f"{where}: needs a question, and an answer with '#### '")
            examples.append({"prompt": e["question"], "answer": e["answer"].rpartition("#### ")[2]})
        return examples
