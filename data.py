"""Data for SFT: examples of several forms -> rows of tokens with a mask of those to be trained.
The first trainer alone reads. `datasets` tokenises a source once, in processes, and keeps what it
made; a stream is tokenised as it comes. What a batch holds follows from settings and its number."""

import concurrent.futures
import itertools
import math
import pathlib
import random

from rollouts import Rollouts, Row, from_rows
from runtime import UserError, load_symbol
from tasks import load_task, open_source


class Examples:
    """What is trained, in which order: sources by their weights, or a task's demonstrations."""

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer, self.steps = cfg, tokenizer, cfg.steps
        self.form = cfg.form or f"{pathlib.Path(__file__).parent}/examples/forms.py:encode"
        load_symbol(self.form, "form")  # what is wrong with it is said now
        self.seen, self.long, self.bad = 0, 0, []  # rows so far; too long ones; why others are bad
        if tokenizer.eos_token_id is None:
            raise UserError(f"model={cfg.model}: its tokenizer has no token that ends a reply")
        if cfg.data:
            self.table, held = self.mix()
        else:
            self.table, self.task = None, load_task(cfg)
            if not hasattr(self.task, "demonstration"):
                raise UserError(f"task={cfg.task} has no demonstrations to learn from: give --data")
            held = {"": [self.demonstration("heldout", i, 1.0) for i in range(cfg.eval_size)]}
        self.heldout = {k: to_table(rows, 0, cfg.max_tokens) for k, rows in held.items() if rows}
        self.end = math.ceil(cfg.epochs * len(self.table)) if cfg.epochs else None
        if cfg.epochs:  # the lengths alone say how many batches that makes
            self.steps = sum(1 for _ in self.batches(self.table.select_columns("length")))
        self.coming, self.ahead, self.next = enumerate(self.batches(self.table)), None, 0
        self.thread = concurrent.futures.ThreadPoolExecutor(1)

    def mix(self):
        """One table of all sources, every row once an epoch, or drawn by weights until each source
        was used up; streams take turns. Also what is held out, by name."""
        import datasets  # seconds, which the other ranks need not spend

        cfg, tables, weights = self.cfg, [], []
        held = {name: list(self.load(name, "test")) for name in cfg.eval_data.split(",") if name}
        for text in cfg.data.split(","):
            name, _, weight = text.partition("=")
            table = self.load(name, "train", cfg.streaming)
            if not cfg.eval_data and not cfg.streaming:
                n = min(cfg.eval_size, len(table) // 10)
                held[name], table = list(table.take(n)), table.skip(n)
            tables.append(table)
            weights.append(float(weight or 0))
        shares = [w / sum(weights) for w in weights] if any(weights) else None
        end = "all_exhausted" if shares else "all_exhausted_without_replacement"
        return datasets.interleave_datasets(tables, shares, cfg.seed, stopping_strategy=end), held

    def load(self, name: str, split: str, streaming: bool = False):
        """The rows that can be trained of a source as `open_source` knows it, with `@split`."""
        import datasets

        cfg, (source, _, given) = self.cfg, name.partition("@")
        place, rows = open_source(source, given or split, streaming)
        code = pathlib.Path(self.form.partition(":")[0]).read_text()
        how = {"form": self.form, "code": code, "tokenizer": self.tokenizer, "place": place}
        how = {"fn_kwargs": {**how, "loss_on": cfg.loss_on}, "batched": True}
        how["remove_columns"] = rows.column_names or [*next(iter(rows))]
        whole, bit, text = map(datasets.Value, ("int32", "bool", "string"))
        kinds = {"tokens": [whole], "mask": [bit], "length": whole, "given": whole, "bad": text}
        how["features"] = datasets.Features(kinds)
        if streaming:
            rows = rows.map(encode, with_indices=True, **how)
            return rows.filter(lambda row: self.keep(1000, row))
        datasets.arrow_dataset.mp.set_start_method("spawn", force=True)  # a rank must not fork
        several = min(cfg.data_workers, len(rows) // 5000) or None  # to start one takes seconds
        rows = rows.map(encode, with_indices=True, num_proc=several, **how)
        few = rows.select_columns(["length", "given", "bad"]).to_list()
        total = self.seen + len(few)
        kept = [i for i, row in enumerate(few) if self.keep(total, row)]
        if not kept:
            raise UserError(f"{place}: no example has at most max_tokens={cfg.max_tokens}")
        return rows.select(kept)

    def keep(self, total: int, row: dict) -> bool:
        """Whether a row can be trained; the others are counted. UserError: too many are bad."""
        cfg, most, self.seen = self.cfg, self.cfg.max_tokens, self.seen + 1
        if row["bad"]:
            self.bad.append(row["bad"])
            if len(self.bad) > cfg.max_bad * max(total, self.seen):
                raise UserError(f"{self.bad[0]} (more are bad than max_bad={cfg.max_bad:g} allows)")
            return False
        self.long += row["length"] > most  # of one that is cut something trained must be left
        return row["length"] <= most or cfg.too_long == "cut" and row["given"] < most

    def demonstration(self, split: str, i: int, progress: float) -> dict:
        text = self.task.demonstration(f"{self.cfg.seed}/{split}/{i}", progress)
        make = load_symbol(self.form, "form")
        made = make({"pieces": [text]}, [i], "", self.tokenizer, self.cfg.loss_on)
        if (why := made["bad"][0]) or made["length"][0] > self.cfg.max_tokens:
            what = why or f"{made['length'][0]} tokens, over max_tokens={self.cfg.max_tokens}"
            raise UserError(f"task={self.cfg.task}: a demonstration has {what}")
        return {name: column[0] for name, column in made.items()}

    def rows(self, table):
        """Row after row for ever, epochs in orders of their own; a stream is shuffled a little."""
        cfg, more = self.cfg, {"buffer_size": 4096} if self.cfg.streaming else {}
        for i in itertools.count():
            if table is None:
                yield self.demonstration("train", i, i / (cfg.steps * cfg.rows_per_step))
                continue
            order, part = random.Random(f"{cfg.seed}/epoch {i}").getrandbits(32), None
            for part in table.shuffle(order, **more).iter(64):  # thrice as quick as by ones
                yield from (dict(zip(part, values)) for values in zip(*part.values()))
            if part is None:
                raise UserError(f"data={cfg.data}: no example of at most {cfg.max_tokens} tokens")

    def batches(self, table):
        """Lists of rows, from the first on: `rows_per_step`, or what `tokens_per_step` holds."""
        cfg, batch, tokens = self.cfg, [], 0
        for row in itertools.islice(self.rows(table), self.end):
            length = min(row["length"], cfg.max_tokens)
            over, full = tokens + length > cfg.tokens_per_step, len(batch) == cfg.rows_per_step
            if batch and (over if cfg.tokens_per_step else full):
                yield batch
                batch, tokens = [], 0
            batch.append(row)
            tokens += length
        yield batch

    def batch(self, step: int) -> Rollouts:
        """The table of a step; earlier ones are passed over."""
        now = self.ahead if step == self.next else None
        self.ahead, self.next = None, step + 1
        return (now or self.thread.submit(self.read, step)).result()

    def begin(self):
        """A thread makes the next table, while a GPU works on another."""
        if self.next < self.steps:  # none behind the last: what is left out of it would be counted
            self.ahead = self.thread.submit(self.read, self.next)

    def read(self, step: int) -> Rollouts:
        rows = next(rows for number, rows in self.coming if number == step)
        return to_table(rows, step, self.cfg.max_tokens)


def encode(rows: dict, numbers, form: str, code: str, **how) -> dict[str, list]:
    """What `datasets` maps over a source. By `code` it knows what an older form made."""
    return load_symbol(form, "form")(rows, numbers, **how)


def to_table(rows: list[dict], step: int, most: int) -> Rollouts:
    """Rows -> table, each cut to so many tokens. What only RL has is zero."""
    cut = enumerate((row["tokens"][:most], row["mask"][:most]) for row in rows)
    return from_rows([Row(step, i, 0, 0, None, tokens=x, mask=m) for i, (x, m) in cut], [])
