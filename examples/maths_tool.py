"""The Python tool on mathematics: a model that may run programs before it answers.

    torchrun --nproc_per_node=3 grpo.py --task=examples/maths_tool.py:GSM8KWithPython --model=... \
        --task_data=FOLDER --max_turns=3 --max_prompt_tokens=512 --max_new_tokens=768
    ... --task=examples/maths_tool.py:CountdownWithPython

A message with a block of Python (```python ... ```) and no answer is a call: the program runs in
bubblewrap (examples/python_tool.py), and what it prints is the user's next message. The answer is
the last number behind `Answer:` for GSM8K, the expression in <answer> tags for countdown.
"""

import re

from examples.countdown import Countdown
from examples.gsm8k import GSM8K, number
from examples.python_tool import check_sandbox, run_python
from tasks import Episode

PROGRAM = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


class WithPython:
    """The tool, for any task whose answers it does not touch. `tool=no` takes it away."""

    tool: str = "yes"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.correct]
        if self.tool != "no":
            check_sandbox()

    def reply(self, episode: Episode) -> str | None:
        call = PROGRAM.findall(episode.turns[-1]) if self.tool != "no" else []
        return f"Output: {run_python(call[-1]).strip() or '(nothing)'}" if call else None


class GSM8KWithPython(WithPython, GSM8K):
    """The same prompts and the same reward, with the tool and without."""

    system = (
        "Solve the problem. You can write a Python program in a ```python block that prints what"
        " you need; its output comes in the next message. Then finish with one line: Answer: NUMBER"
    )

    def correct(self, episode: Episode) -> float:
        """1 if the last `Answer: number` of the last message is right, else 0."""
        found = re.findall(r"Answer:\s*(-?\$?[\d,]*\.?\d+)", episode.turns[-1])
        given, target = number(found[-1]) if found else None, number(episode.problem["answer"])
        return float(given is not None and abs(given - target) <= 1e-6)

    @staticmethod
    def conversation(question: str, worked: str, tool: bool) -> list[dict] | None:
        """A worked answer of GSM8K as a chat: each `<<48/2=24>>` becomes a line of a program (or
        words, without the tool). None where one of them is no arithmetic."""
        steps, answer = re.findall(r"<<([^=<>]+)=([^<>]+)>>", worked), worked.rpartition("#### ")[2]
        user = {"role": "user", "content": question}
        final = {"role": "assistant", "content": f"Answer: {answer}"}
        plain = r"(?:[\d.+\-/() ]|\*(?!\*))+"  # of a data file, and no powers: it is evaluated
        if not steps or not all(re.fullmatch(plain, left) for left, _ in steps):
            return None
        if not tool:
            words = re.sub(r"<<[^<>]*>>", "", worked.rpartition("\n#### ")[0])
            return [user, {**final, "content": f"{words}\n{final['content']}"}]
        program = "\n".join(f"print({left})" for left, _ in steps)
        try:
            printed = "\n".join(str(eval(left, {"__builtins__": {}})) for left, _ in steps)
        except (SyntaxError, ArithmeticError, TypeError):
            return None
        call = {"role": "assistant", "content": f"```python\n{program}\n```"}
        return [user, call, {"role": "user", "content": f"Output: {printed}"}, final]


class CountdownWithPython(WithPython, Countdown):
    system = (
        "You can write a Python program in a ```python block that searches; its output comes in the"
        " next message. Then give the expression inside <answer> tags, as <answer>3*4+5</answer>."
    )

    def correct(self, episode: Episode) -> float:
        return Countdown.correct(self, Episode(episode.problem, episode.turns[-1:]))
