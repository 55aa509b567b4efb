"""Countdown: make a number from given ones.

torchrun --nproc_per_node=3 grpo.py --task=countdown --model=...
"""

import random
import re

from examples.calculator import calculate
from tasks import Episode, Task


class Countdown(Task):
    """Reach a target with + - * and each of the given numbers at most once.

    The last `<answer>` counts; without one, the last line.
    """

    system = "Give the expression inside <answer> tags, for example <answer>3*4+5</answer>."

    def __init__(self, cfg):
        super().__init__(cfg)
        examples = {}
        rng = random.Random("countdown")
        while len(examples) < 4096:
            numbers = [rng.randint(1, 20) for _ in range(3)]
            target = calculate("".join(str(n) + rng.choice("+-*") for n in numbers)[:-1])
            if 0 < target <= 100:
                prompt = f"Use {', '.join(map(str, numbers))} to make {target}."
                examples[prompt] = {"prompt": prompt, "answer": target, "numbers": numbers}
        self.train, self.heldout = list(examples.values())[512:], list(examples.values())[:512]

    def correct(self, episode: Episode) -> float:
        """1 if the expression has the target's value and uses no number too often, else 0."""
        found = re.findall(r"<answer>(.*?)</answer>", episode.text, re.DOTALL)
        expression = (found[-1] if found else episode.text.strip().rpartition("\n")[2]).strip()
        if calculate(expression) != episode.problem["answer"]:
            return 0.0
        left = list(episode.problem["numbers"])
        for n in map(int, re.findall(r"\d+", expression)):
            if n not in left:
                return 0.0
            left.remove(n)
        return 1.0
