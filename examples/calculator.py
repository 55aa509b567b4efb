"""The embedded default: arithmetic with a tool, whose prompts are made and not read.

torchrun --nproc_per_node=3 grpo.py
"""

import ast
import operator
import random
import re

from tasks import Episode, Task

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> int | None:
    """The value of integers joined by + - * ( ), or None. A model's text is parsed, never run."""

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant):
            return node.value
        raise ValueError

    # Python would also read 1_2 as 12. The length bounds the tree's depth and the value's size.
    if len(expression) > 40 or not re.fullmatch(r"[0-9+\-*() ]+", expression):
        return None
    try:
        return value(ast.parse(expression, mode="eval").body)
    except (ValueError, SyntaxError):
        return None


class Calculator(Task):
    """`63*11+48=`: `[63*11]` is a call, which the environment answers with `=693`; then `#741`."""

    stop = "]"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.train, self.heldout = [], []
        # Drawn without replacement: no prompt stands twice.
        for i, n in enumerate(random.Random("calculator").sample(range(90**3), 20_512)):
            a, b, c = 10 + n // 8100, 10 + n // 90 % 90, 10 + n % 90
            example = {"prompt": f"{a}*{b}+{c}=", "answer": a * b + c, "numbers": (a, b, c)}
            (self.train if i < 20_000 else self.heldout).append(example)

    def reply(self, episode: Episode) -> str | None:
        """The value of the call that the turn ended with; None if there is none."""
        call = re.search(r"\[([^\[\]]*)\]$", episode.turns[-1])
        result = calculate(call[1]) if call else None
        return None if result is None else f"={result}"

    def correct(self, episode: Episode) -> float:
        """1 if the text ends in `#number`, its only #, and the number is right; else 0."""
        found = re.fullmatch(r"[^#]*#(-?\d+)", episode.text)
        return float(found is not None and found[1] == str(episode.problem["answer"]))

    def demonstration(self, name: str, progress: float) -> list[tuple[str, bool]]:
        """One example for SFT, as pieces (text, whether it is trained).

        `progress` is the share of SFT that is done. At last three in ten use the tool and the
        others guess. Before, eight in ten do: copying numbers into a call is learned late and
        suddenly, and the guesses, which nobody can learn, are noise in its way.
        """
        rng = random.Random(f"demonstration {name}")
        problem = rng.choice(self.heldout if "heldout" in name else self.train)
        a, b, c = problem["numbers"]
        pieces = [(problem["prompt"], False)]
        if rng.random() < (0.8 if progress < 0.65 else 0.3):
            pieces += [(f"[{a}*{b}]", True), (f"={a * b}", False)]
            pieces += [(f"[{a * b}+{c}]", True), (f"={a * b + c}", False)]
        return [*pieces, (f"#{a * b + c}", True)]
