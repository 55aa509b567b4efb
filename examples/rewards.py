"""Rewards to copy into a task: mathematics, thinking, form, length, language.

Each is a function of an Episode, or makes one. A task lists some, and what each counts:

    self.rewards = [mathematics, thinking, shorter_than(400), in_script("latin")]
    weights = {"thinking": 0.2, "shorter_than": 0.1, "in_script": 0.1}
"""

import re
import unicodedata

from tasks import Episode

try:
    import math_verify
except ImportError:  # then numbers and texts are compared
    math_verify = None


def mathematics(episode: Episode) -> float:
    """1 if the reply's last boxed or tagged answer is worth `answer`: by math-verify, where 1/2 is
    0.5, and without it as numbers or texts."""
    target = str(episode.problem["answer"])
    found = re.findall(r"\\boxed\{([^{}]*)\}|<answer>(.*?)</answer>", episode.turns[-1], re.DOTALL)
    if not found:
        return 0.0
    given = next(text for text in found[-1] if text or text == found[-1][-1]).strip()
    if math_verify:
        parsed = [math_verify.parse(f"${text}$", parsing_timeout=None) for text in (target, given)]
        return float(math_verify.verify(*parsed, timeout_seconds=None))
    try:
        return float(abs(float(given.replace(",", "")) - float(target.replace(",", ""))) < 1e-6)
    except ValueError:
        return float(given == target)


def thinking(episode: Episode) -> float:
    """1 for one block of thinking with words in it, before anything else."""
    return float(
        bool(re.match(r"\s*<think>\s*\S.*?</think>(?!.*<think>)", episode.text, re.DOTALL))
    )


def has_form(pattern: str):
    """1 if the whole reply has the form of a regular expression."""

    def has_form(episode: Episode) -> float:
        return float(re.fullmatch(pattern, episode.text, re.DOTALL) is not None)

    return has_form


def shorter_than(characters: int, over: int = 0):
    """1 up to that length; then it falls, to 0 at `over` characters more (DAPO's soft limit)."""

    def shorter_than(episode: Episode) -> float:
        more = sum(map(len, episode.turns[::2])) - characters
        return 1.0 if more <= 0 else max(1 - more / over, 0.0) if over else 0.0

    return shorter_than


def in_script(name: str):
    """The share of letters of a script, by Unicode's names: "latin", "cjk", "cyrillic", "greek"."""

    def in_script(episode: Episode) -> float:
        letters = [c for turn in episode.turns[::2] for c in turn if c.isalpha()]
        right = sum(unicodedata.name(c, "").startswith(name.upper()) for c in letters)
        return right / len(letters) if letters else 0.0

    return in_script
