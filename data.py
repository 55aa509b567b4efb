"""Data for SFT: examples of several forms -> rows of tokens with a mask of those to be trained."""

import functools

from rollouts import Rollouts, Row, from_rows
from runtime import UserError
from tasks import load_task, permutation, read_examples


class Examples:
    """What is trained, in which order: rows of a file, permuted by epoch, or demonstrations."""

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.permutation = functools.lru_cache(1)(permutation)  # of the present epoch
        if tokenizer.eos_token_id is None:
            raise UserError(f"model={cfg.model}: its tokenizer has no token that ends a reply")
        if not cfg.data:
            self.task, self.left_out = load_task(cfg), 0
            if not hasattr(self.task, "demonstration"):
                raise UserError(f"task={cfg.task} has no demonstrations to learn from: give --data")
            rows = [self.demonstration("heldout", i, 1.0) for i in range(cfg.eval_size)]
            self.heldout = table(rows, 0)
            return
        rows = read_examples(cfg.data, "train")
        examples = [self.encode(pieces(example, where)) for where, example in rows]
        kept = [e for e in examples if len(e[0]) <= cfg.max_tokens]
        self.left_out, held = len(examples) - len(kept), min(cfg.eval_size, len(kept) // 10)
        self.heldout, self.train = table(kept[:held], 0), kept[held:]
        if not self.train:
            raise UserError(f"data={cfg.data}: no example has at most max_tokens={cfg.max_tokens}")

    def demonstration(self, split: str, i: int, progress: float):
        return self.encode(self.task.demonstration(f"{self.cfg.seed}/{split}/{i}", progress))

    def example(self, i: int) -> tuple[list[int], list[bool]]:
        """(tokens, mask) of the i-th example, by the seed and i alone: a resumed run goes on."""
        if not self.cfg.data:
            return self.demonstration("train", i, i / (self.cfg.steps * self.cfg.rows_per_step))
        epoch, place = divmod(i, len(self.train))
        return self.train[self.permutation(self.cfg.seed, epoch, len(self.train))[place]]

    def encode(self, text: list[tuple[str, bool]] | list[dict]) -> tuple[list[int], list[bool]]:
        """Pieces (text, trained) and a trained EOS behind them; or messages by the template."""
        if text and isinstance(text[0], dict):
            return self.encode_chat(text)
        tokens, mask = [], []
        for piece, trained in text:  # the first gets the tokenizer's BOS, as prompts in RL do
            ids = self.tokenizer.encode(piece, add_special_tokens=not tokens)
            tokens, mask = tokens + ids, mask + [trained] * len(ids)
        return tokens + [self.tokenizer.eos_token_id], mask + [True]

    def encode_chat(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """By the model's own template; what an assistant message adds to its prompt is trained."""
        if not self.tokenizer.chat_template:
            raise UserError(f"model={self.cfg.model} has no chat template for 'messages'")
        template = functools.partial(self.tokenizer.apply_chat_template, return_dict=True)
        tokens, mask = [], []
        for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            before = template(messages[:i], add_generation_prompt=True)["input_ids"]
            after = template(messages[: i + 1])["input_ids"]
            if after[: len(before)] != before or before[: len(tokens)] != tokens:
                why = "no prefix of it can be trained"
                raise UserError(f"this chat template rewrites earlier turns: {why}")
            mask += [False] * (len(before) - len(tokens)) + [True] * (len(after) - len(before))
            tokens = after
        return tokens, mask

    def batch(self, step: int) -> Rollouts:
        """The rows of a step as a table; `gather` takes the first trainer's and deals them out."""
        first = step * self.cfg.rows_per_step
        return table([self.example(first + i) for i in range(self.cfg.rows_per_step)], step)


def pieces(example: dict, where: str) -> list:
    """`messages`, or `prompt` with `completion` (or `answer`) -> what `Examples.encode` takes."""
    if messages := example.get("messages"):
        text = isinstance(messages, list) and all(
            isinstance(m, dict) and {str} == {type(m.get("role")), type(m.get("content"))}
            for m in messages
        )
        if not text:
            raise UserError(f"{where}: 'messages' is not a list of texts with 'role' and 'content'")
        return messages
    reply = example.get("completion", example.get("answer"))
    if not isinstance(example.get("prompt"), str) or reply is None:
        what = f"no 'messages', and no 'prompt' with 'completion': {sorted(example)}"
        raise UserError(f"{where}: {what}")
    return [(example["prompt"], False), (str(reply), True)]


def table(rows: list[tuple[list[int], list[bool]]], step: int) -> Rollouts:
    """Rows (tokens, mask) -> table. What only RL has is zero."""
    made = []
    for slot, (tokens, mask) in enumerate(rows):
        mask = [False, *mask[1:]]  # nothing comes before the first token
        made.append(Row(step, slot, 0, 0, None, tokens=tokens, mask=mask))
    return from_rows(made, [])
