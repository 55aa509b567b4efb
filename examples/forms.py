"""What sft.py makes of rows of data: tokens, and which are trained. For columns of your own copy it
and edit `read`: torchrun --nproc_per_node=2 sft.py --data=rows.jsonl --form=my_forms.py:encode
"""

import functools

from runtime import UserError
from tasks import unpack


def encode(rows: dict[str, list], numbers, place: str, tokenizer, loss_on: str) -> dict[str, list]:
    """Rows of a source, as `datasets.map` has them -> rows of tokens; or why a row is bad."""
    made = []
    for i, *values in zip(numbers, *rows.values()):
        where = place
        try:
            where, row = unpack(dict(zip(rows, values)), place, i + 1)
            for tokens, mask in tokenise(row, tokenizer, loss_on) if row else ():
                mask = [False, *mask[1:]]  # nothing comes before the first token
                if True not in mask:
                    raise ValueError("nothing in it is to be trained")
                made.append((tokens, mask, len(tokens), mask.index(True), ""))
        except Exception as error:  # a template's own refusals are jinja2's
            what = str(error) if isinstance(error, UserError) else f"{where}: {error}"
            made.append(([], [], 0, 0, what))
    columns = zip(*made) if made else [[]] * 5
    return dict(zip(("tokens", "mask", "length", "given", "bad"), map(list, columns)))


def tokenise(row: dict, tokenizer, loss_on: str) -> list[tuple[list[int], list[bool]]]:
    """A row -> [(tokens, mask)], mostly one. ValueError: the row is bad, for this reason."""
    text = read(row, bool(tokenizer.chat_template))
    if isinstance(text[0], dict):
        return by_template(text, tokenizer, loss_on)
    tokens, mask = [], []
    for piece, trained in text:  # the first gets the tokenizer's BOS, as prompts in RL do
        ids = tokenizer.encode(piece, add_special_tokens=not tokens)
        tokens, mask = tokens + ids, mask + [trained or loss_on == "all"] * len(ids)
    return [(tokens + [tokenizer.eos_token_id], mask + [True])]  # it ends there: that is trained


def read(row: dict, chat: bool) -> list:
    """A row -> messages, where the model has a chat template, or pieces (text, whether trained)."""
    if row.get("messages"):
        return messages(row["messages"], chat)
    asked, said = row.get("instruction"), row.get("output")
    if isinstance(asked, str) and isinstance(said, str):
        return alpaca(asked, row.get("input"), said, chat)
    if row.get("pieces"):  # a task's demonstration
        return row["pieces"]
    reply = row.get("completion", row.get("answer"))
    if not isinstance(row.get("prompt"), str) or reply is None:
        what = "no 'messages', no 'instruction' with 'output', no 'prompt' with 'completion'"
        raise ValueError(f"{what}: {sorted(row)}")
    if not isinstance(reply, str | int | float):
        raise ValueError(f"the reply to 'prompt' is no text: {reply!r:.60}")
    if chat:  # as RL asks the same prompt
        turns = {"user": row["prompt"], "assistant": str(reply)}
        return [{"role": role, "content": text} for role, text in turns.items()]
    return [(row["prompt"], False), (str(reply), True)]


def messages(turns, chat: bool) -> list[dict]:
    """[{"role": "user", "content": "..."}, ...], as the data has them."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'messages' is not a list of texts with 'role' and 'content'")
    if {type(turn.get(key)) for turn in turns for key in ("role", "content")} != {str}:
        raise ValueError("'messages' is not a list of texts with 'role' and 'content'")
    if not chat:
        raise ValueError("'messages', but the model has no chat template")
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def alpaca(asked: str, given: str | None, said: str, chat: bool) -> list:
    """Instruction, input and output: a chat, or under Alpaca's headings without a template."""
    if chat:
        asked = f"{asked}\n\n{given}" if given else asked
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    given = f"### Input:\n{given}\n\n" if given else ""
    return [(f"### Instruction:\n{asked}\n\n{given}### Response:\n", False), (said, True)]


def by_template(turns: list[dict], tokenizer, loss_on: str) -> list[tuple[list[int], list[bool]]]:
    """What an assistant's message adds to its generation prompt is trained, up to its end of turn.
    Where the template shows a turn otherwise once others follow (Qwen3's leaves its thoughts out),
    what follows is a row of its own: each turn is trained behind what it is sampled behind."""
    template = functools.partial(tokenizer.apply_chat_template, return_dict=True)
    if loss_on == "all":
        tokens = template(turns)["input_ids"]
        return [(tokens, [True] * len(tokens))]
    replies = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    rows, eos = [([], [])], tokenizer.eos_token_id
    for i in replies[-1:] if loss_on == "last" else replies:
        before = template(turns[:i], add_generation_prompt=True)["input_ids"]
        after, (tokens, mask) = template(turns[: i + 1])["input_ids"], rows[-1]
        if after[: len(before)] != before:
            raise ValueError("the chat template does not go on from its own generation prompt")
        if before[: len(tokens)] != tokens:
            rows, tokens, mask = [*rows, ([], [])], [], []
        said = after[len(before) :]
        ends = [i for i, t in enumerate(said, 1) if t == eos]
        if not ends:  # the template's own end of turn (Qwen3's base models)
            ends = [i for i, t in enumerate(said, 1) if tokenizer.decode([t]).strip()]
        rest = len(said) - max(ends, default=0)  # a newline behind the end of turn
        mask = mask + [False] * (len(before) - len(tokens)) + [True] * (len(said) - rest)
        rows[-1] = after, mask + [False] * rest
    return rows
