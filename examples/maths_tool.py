"""The Python tool on mathematics: a model that may run programs before it answers.

    torchrun --nproc_per_node=3 grpo.py --task=examples/maths_tool.py:GSM8KWithPython --model=... \
        --task_data=FOLDER --max_turns=3 --max_prompt_tokens=512 --max_new_tokens=768
    ... --task=examples/maths_tool.py:CountdownWithPython
    torchrun --nproc_per_node=2 sft.py --model=... --data=FOLDER \
        --form=examples/maths_tool.py:without_tool  # GSM8K's answers as chats
    ... --form=examples/maths_tool.py:with_tool --max_bad=0.07  # 472 of 7,473 make no program

A message with a block of Python (```python ... ```) is a call: the program runs in bubblewrap
(examples/python_tool.py), and what it prints is the user's next message. The answer is the last
number behind `Answer:` for GSM8K, the expression in <answer> tags for countdown.
"""

import functools
import json
import re

from examples import forms
from examples.countdown import Countdown
from examples.gsm8k import GSM8K, number
from examples.python_tool import check_sandbox, run_python
from tasks import Episode, unpack

NO_PROGRAM = "its steps make no program that prints the answer"
PROGRAM = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


class WithPython:
    """The tool, for any task whose answers it does not touch. `tool=no` takes it away."""

    tool: bool = True
    alone: str = ""  # the system prompt without the tool; empty: the same

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.correct]
        if self.tool:
            check_sandbox()
        elif self.system == type(self).system:
            self.system = self.alone or self.system

    def reply(self, episode: Episode) -> str | None:
        call = PROGRAM.findall(episode.turns[-1]) if self.tool else []
        return f"Output: {run_python(call[-1]).strip() or '(nothing)'}" if call else None


class GSM8KWithPython(WithPython, GSM8K):
    """The same problems and the same reward, with the tool and without."""

    system = (
        "Solve the problem with a Python program in a ```python block that prints what you need;"
        " its output comes in the next message. Then finish with one line: Answer: NUMBER"
    )
    alone: str = "Solve the problem step by step. Finish with one line: Answer: NUMBER"

    def correct(self, episode: Episode) -> float:
        """1 if the last `Answer: number` of the last message is right, else 0."""
        found = re.findall(r"Answer:\s*(-?\$?[\d,]*\.?\d+)", episode.turns[-1])
        given, target = number(found[-1]) if found else None, number(episode.problem["answer"])
        return float(given is not None and abs(given - target) <= 1e-6)

    @classmethod
    def conversation(cls, question: str, worked: str, tool: bool) -> list[dict] | None:
        """A worked answer of GSM8K as a chat. With the tool each `<<48/2=24>>` is a line of a
        program, where earlier results have names; None if that does not print the answer."""
        steps, answer = re.findall(r"<<([^=<>]+)=([^<>]+)>>", worked), worked.rpartition("#### ")[2]
        chat = [{"role": "system", "content": cls.system if tool else cls.alone}]
        chat += [{"role": "user", "content": question}]
        final = {"role": "assistant", "content": f"Answer: {answer}"}
        if not tool:
            words = re.sub(r"<<[^<>]*>>", "", worked.rpartition("\n#### ")[0])
            return [*chat, {**final, "content": f"{words}\n{final['content']}"}]
        plain = r"(?:[\d.+\-/() ]|\*(?!\*))+"  # of a data file, and no powers: it is evaluated
        if not steps or not all(re.fullmatch(plain, left) for left, _ in steps):
            return None
        lines, names, values = [], {}, {}
        for (left, result), name in zip(steps, "abcdefghijklmnopqrstuvwxyz"):
            left = re.sub(r"[\d.]+", lambda n: names.get(number(n[0]), n[0]), left)
            lines.append(f"{name} = {left}")
            try:
                values[name] = eval(left, {"__builtins__": {}}, values)
            except (SyntaxError, ArithmeticError, TypeError):
                return None
            names[number(result)] = name
        if abs(values[name] - (number(answer) or 0)) > 1e-6:
            return None
        program = "\n".join([*lines, f"print({name})"])
        call = {"role": "assistant", "content": f"```python\n{program}\n```"}
        return [*chat, call, {"role": "user", "content": f"Output: {values[name]}"}, final]


def shown(tool: bool, rows: dict, numbers, place: str, **how) -> dict[str, list]:
    """A form for sft.py: GSM8K's rows as the conversations that the task has. A row of another kind
    goes on as it is: forms.py says what is wrong with it."""
    texts = []
    for values in zip(*rows.values()):
        row = dict(zip(rows, values))
        try:
            example = unpack(row, place, 1)[1]
            chat = GSM8KWithPython.conversation(example["question"], example["answer"], tool)
            texts.append(json.dumps({"messages": chat} if chat else {NO_PROGRAM: example}))
        except Exception:
            texts.append(row["jsonl"] if "jsonl" in row else json.dumps(row, default=str))
    return forms.encode({"jsonl": texts}, numbers, place, **how)


with_tool, without_tool = functools.partial(shown, True), functools.partial(shown, False)


class CountdownWithPython(WithPython, Countdown):
    alone: str = Countdown.system
    system = (
        "You can write a Python program in a ```python block that searches; its output comes in the"
        " next message. Then give the expression inside <answer> tags, as <answer>3*4+5</answer>."
    )

    def correct(self, episode: Episode) -> float:
        return Countdown.correct(self, Episode(episode.problem, episode.turns[-1:]))
