"""The generator: rows from their first token to their reward, in an engine that never drains.
Rows are admitted, go on turn after turn without waiting for each other, and keep running while new
weights land between two engine steps. Token ids go in and come out; text is the task's alone."""

import contextlib
import time

import torch
import torch.distributed as dist
from transformers import GenerationConfig

import report
from engine import TESTED, Engine
from rollouts import Rollouts, Row, from_rows
from runtime import UserError
from tasks import Episode, reward_name
from workers import Workers

EVALUATION = -1  # stands for a batch where rows of an evaluation are counted


class Generator:
    """One engine's rank. On a rank that only trains it is empty, and every call passes through."""

    def __init__(self, cfg, world, task, tokenizer, version: int = 0):
        """`version` is that of the weights that the first sync will bring."""
        self.cfg, self.world, self.task, self.tokenizer = cfg, world, task, tokenizer
        half = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and world.cuda)
        self.dtype = torch.bfloat16 if half else torch.float32
        self.version, self.loaded = version - 1, False  # dummy weights until the first sync
        self.sleeps = world.generates and world.cuda and world.colocated and cfg.sleep == "auto"
        if not world.generates:
            return
        self.rows: dict[str, Row] = {}  # in the engine, by request name
        self.groups: dict[tuple, list[Row]] = {}  # (batch, slot) -> rows that have their reward
        self.complete: dict[int, list[Row]] = {}  # batch -> rows of complete groups
        self.refills: dict[int, list[float]] = {}  # batch -> rewards of groups drawn again
        self.open: dict[int, int] = {}  # batch -> rows admitted and not complete
        self.judged, self.later = [], []  # rows of an evaluation: with their reward; not yet asked
        self.queue: list[tuple] = []  # requests for the next engine step
        self.taken: dict[int, int] = {}  # batch -> times this engine asked for a slot
        self.batch = version  # the batch that slots are taken from
        self.told = {"notes": [], "evals": []}  # what the next `gather` brings to the others
        if world.leads:
            self.prepare_prompts()
            self.workers = Workers(task, cfg.task_workers, cfg.task_seconds)
        with world.span("build engine"):
            self.engine = Engine(cfg, world, self.dtype)
        if self.engine.version.split("+")[0] not in TESTED:
            self.note(f"vLLM {self.engine.version} was not tested; {' and '.join(TESTED)} were")
        if not world.trains:
            world.meanwhile = self.run_until

    def note(self, *texts: str):
        """For the person at the screen. What every engine would say, the first one says."""
        if self.world.engine == 0 and self.world.leads:
            self.told["notes"] += texts

    def wake(self, part: str):
        """Take back the memory of "weights" or "kv_cache", which slept while the rank trained."""
        if self.sleeps and self.loaded:
            self.engine.wake(part)

    def new_version(self):
        """New weights are in. Running rows go on: remember which tokens are the old version's. Rows
        without a token start again: no cache of old weights is under a row that is all new."""
        self.version, self.loaded = self.version + 1, True
        if not self.world.generates:
            return
        if self.cfg.inflight == "recompute":  # "keep": they keep the cache of the old weights
            self.engine.recompute()
        for name, count in self.engine.sampled_so_far().items():
            if not count:
                self.engine.abort(name)
            if self.world.leads and count:
                self.rows[name].borders.append((count, self.version - 1))
            elif self.world.leads:
                self.submit(self.rows[name])
        due = self.cfg.eval_every and self.version % self.cfg.eval_every == 0
        if self.world.leads and (due or self.version == self.cfg.steps):
            self.admit_evaluation()

    def prepare_prompts(self):
        """Tokenise every prompt; empty ones and those over max_prompt_tokens are not asked."""
        self.note(*report.advice(self.cfg, self.task, self.tokenizer))
        limit = self.cfg.max_prompt_tokens
        for split in ("train", "heldout")[: 1 + bool(self.cfg.eval_size)]:
            every = getattr(self.task, split, [])
            every = [{**e, "tokens": self.encode_prompt(e["prompt"])} for e in every]
            kept = [e for e in every if 0 < len(e["tokens"]) <= limit]
            what = f"of {len(every)} {split} prompts: over max_prompt_tokens={limit}, or empty"
            if not kept:
                raise UserError(f"task={self.cfg.task}: left out all {what}")
            if len(kept) < len(every):
                self.note(f"left out {len(every) - len(kept)} {what}")
            setattr(self.task, split, kept)
        self.eos = eos_tokens(self.cfg.model, self.tokenizer)
        every = range(len(self.tokenizer) if self.task.stop else 0)  # `)$` is one token, too
        words = self.tokenizer.batch_decode([[t] for t in every])
        ends = {t for t, word in zip(every, words) if word.endswith((*self.task.stop,))} | self.eos
        self.stops = sorted(ends | {t for c in self.task.stop for t in self.encode(c)[-1:]})

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, prompt: str | list[dict]) -> list[int]:
        """By the model's chat template where it has one, else with the tokenizer's own BOS."""
        if isinstance(prompt, str) and not self.tokenizer.chat_template:
            return self.tokenizer.encode(prompt)
        return self.encode(self.render(prompt))

    def render(self, chat: str | list[dict], *more: dict) -> str:
        """A chat by the model's template, up to where the policy's next message begins."""
        task, template = self.task, str(self.tokenizer.chat_template or "")
        if not template or task.thinking != "auto" and "enable_thinking" not in template:
            what = "thinking" if template else "messages"
            raise UserError(f"model={self.cfg.model}: its chat template has no place for {what}")
        chat = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
        if task.system and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": task.system}, *chat]
        on = task.thinking.lower() in ("yes", "true", "on", "1")  # as YAML has it
        switch = {} if task.thinking == "auto" else {"enable_thinking": on}
        how = {"tokenize": False, "add_generation_prompt": True, "tools": task.tools or None}
        return self.tokenizer.apply_chat_template([*chat, *more], **how, **switch)

    def encode_reply(self, row: Row, reply: str | list[dict]) -> list[int]:
        """The tokens that an answer adds: text as it is; messages, and text after EOS, as what the
        template writes between two messages. What was sampled stays (Qwen3 drops old thinking)."""
        closed = row.tokens[-1] in self.eos
        if isinstance(reply, str) and not (closed and self.tokenizer.chat_template):
            return self.encode(reply)
        reply = [{"role": "user", "content": reply}] if isinstance(reply, str) else reply
        asked, mark = self.render("?"), {"role": "assistant", "content": "<the policy's message>"}
        before, found, after = self.render("?", mark, *reply).partition(mark["content"])
        if not found or not (asked.startswith(before) or before.startswith(asked)):
            why = "writes other messages anew when one is added: no answer is exact to the token"
            raise UserError(f"the chat template of model={self.cfg.model} {why}; answer with text")
        if closed:  # what the template ends the message with, the policy has said itself
            ends = [end for t in self.eos if after.startswith(end := self.tokenizer.decode([t]))]
            after = after.removeprefix(ends[0] if ends else "")
        return self.encode(after)

    def admit(self):
        """Take slots while this engine has a free place, and fewer rows than its share of a batch:
        who is quick takes more, so that engines finish together. Batch b is open once the weights
        have version b - max_policy_age, so that no token is older when it is trained."""
        share = self.cfg.prompts_per_step * self.cfg.group_size / len(self.world.engines)
        end = min(self.cfg.steps, self.version + self.cfg.max_policy_age + 1)
        while self.loaded and self.batch < end:
            running = len(self.rows) + len(self.workers) - self.open.get(EVALUATION, 0)
            if running >= share or len(self.rows) >= self.cfg.max_num_seqs:
                return
            if (slot := self.take_slot(self.batch)) is None:
                self.batch += 1
            else:
                self.start_group(self.batch, slot, attempt=0)

    def take_slot(self, batch: int) -> int | None:
        """A batch's next slot or None, by a counter in torchrun's store, or dealt out."""
        engines, taken = len(self.world.engines), self.taken.get(batch, 0)
        dealt = self.cfg.deterministic or engines == 1
        slot = taken * engines + self.world.engine if dealt else self.world.count(f"slots/{batch}")
        self.taken[batch] = taken + 1
        return slot if slot < self.cfg.prompts_per_step else None

    def admit_evaluation(self):
        """Held-out problems for the new weights, dealt to the engines; they run beside training."""
        problems = self.task.heldout[: self.cfg.eval_size] if self.cfg.eval_size else []
        for slot in range(self.world.engine, len(problems), len(self.world.engines)):
            for reply in range(self.cfg.eval_samples):
                self.later += [Row(self.version, slot, 0, reply, Episode(problems[slot]), True)]

    def start_group(self, batch: int, slot: int, attempt: int):
        problem = self.task.problem(batch, slot, attempt)
        for reply in range(self.cfg.group_size):
            self.start(Row(batch, slot, attempt, reply, Episode(problem)))

    def start(self, row: Row):
        batch = EVALUATION if row.evaluates else row.step
        self.open[batch] = self.open.get(batch, 0) + 1
        row.started = time.monotonic()
        if self.task.start:
            return self.workers.ask(row, may_go_on=True)
        row.append_given(row.episode.problem["tokens"])
        self.submit(row)

    def room(self, row: Row) -> int:
        most = row.episode.problem.get("max_new_tokens", self.cfg.max_new_tokens)
        return min(most, self.cfg.max_new_tokens) - (len(row.tokens) - row.prompt_length)

    def submit(self, row: Row):
        """Ask for the row's next turn at the next engine step."""
        name = "/".join(map(str, (*row.key, row.turn)))
        self.rows[name] = row
        greedy = row.evaluates and self.cfg.eval_samples == 1
        sampling = {"temperature": 0.0 if greedy else self.cfg.temperature}
        sampling |= {"max_tokens": self.room(row), "seed": row.seed(self.cfg.seed)}
        self.queue.append((name, row.tokens, self.stops, sampling))

    def turns_ended(self, turns: list[tuple[str, list[int], list[float], str]]):
        """Turns came out of the engine: write them down, then ask the environment or the rewards. A
        reply has finished if the environment ended it, not if turns, tokens or time ran out."""
        said = [t[:-1] if t[-1] in self.eos else t for _, t, *_ in turns]
        for (name, *turn, reason), text in zip(turns, self.tokenizer.batch_decode(said)):
            row = self.rows.pop(name)
            row.append_sampled(*turn, self.version)
            row.finished = reason == "stop"  # true if the environment's answer is None
            row.episode.turns.append(text)
            self.workers.ask(row, may_go_on=row.finished)

    def apply_jobs(self):
        """Take what the workers have finished, turns and ends; `deterministic` waits for all."""
        answers = self.workers.answers()
        while self.cfg.deterministic and len(self.workers):
            self.world.lap()
            answers += self.workers.answers(wait=1.0)
        for row, reply in sorted(answers, key=lambda answer: answer[0].key):
            if reply is None:
                self.open[EVALUATION if row.evaluates else row.step] -= 1
                self.completed(row)
                continue
            if not row.tokens:  # it is from `start`
                row.append_given(tokens := self.encode_prompt(reply))
                if not 0 < len(tokens) <= self.cfg.max_prompt_tokens:
                    why = "no prompt, or one over max_prompt_tokens"
                    raise UserError(f"start made {why} ({row.name()})")
                self.submit(row)
                continue
            tokens = self.encode_reply(row, reply)
            late = 0 < self.cfg.episode_seconds < time.monotonic() - row.started
            if not late and row.turn + 1 < self.cfg.max_turns and len(tokens) < self.room(row):
                row.append_given(tokens)
                said = [reply] if isinstance(reply, str) else [m["content"] for m in reply]
                row.episode.turns.append("\n".join(said))
                row.turn += 1
                self.submit(row)
            else:  # no time, no turn, or no room for these words and one more token: cut off here
                row.finished = False
                self.workers.ask(row, may_go_on=False)

    def completed(self, row: Row):
        """A row has its reward. Where its group's returns are equal the slot draws another prompt,
        up to `max_refills` times (DAPO, arXiv 2503.14476, 3.2): a bias, which the log shows."""
        if row.evaluates:
            return self.judged.append(row)
        group = self.groups.setdefault((row.step, row.slot), [])
        group.append(row)
        if len(group) < self.cfg.group_size:
            return
        del self.groups[row.step, row.slot]
        if row.attempt < self.cfg.max_refills:
            returns = from_rows(group, [], self.cfg.discount).returns  # as advantages compare them
            if (returns == returns[0]).all():
                self.refills.setdefault(row.step, []).append(sum(row.paid))
                return self.start_group(row.step, row.slot, row.attempt + 1)
        self.complete.setdefault(row.step, []).extend(group)

    def run_until(self, done):
        """Step the engine until `done()`. Its ranks act on one message a step, from the first."""
        while True:
            requests = [None]  # stop
            if self.world.leads:
                self.apply_jobs()
                if not done():
                    self.admit()  # first: what is trained has no wait for what is judged
                    while self.later and len(self.rows) + len(self.workers) < self.cfg.max_num_seqs:
                        self.start(self.later.pop(0))
                    requests, self.queue = [self.queue], []
            if len(self.world.engine_ranks) > 1:
                first, group = self.world.engine_ranks[0], self.world.engine_group
                dist.broadcast_object_list(requests, src=first, group=group)
            if requests[0] is None:
                return
            salt = str(self.version)  # of the weights that will read the prompts
            for name, tokens, stops, sampling in requests[0]:
                self.engine.add(name, tokens, salt, stops, **sampling)
            if not self.engine.busy():
                time.sleep(0.0005)  # all rows are with the task, or there is nothing to do
                self.world.lap("idle")
                continue
            self.world.lap("admit")
            if (turns := self.engine.step()) and self.world.leads:
                self.turns_ended(turns)
            self.world.lap("generate")

    def collect(self, step: int) -> Rollouts:
        """Run until batch `step` is complete, rewards included; later batches stay in the engine.
        Returns this engine's rows of the batch (whole groups), sorted; none without an engine."""
        names = [reward_name(f) for f in self.task.rewards]
        if not self.world.generates:
            return from_rows([], names)
        with self.world.span("collect"):
            ready = lambda: self.batch > step and not self.open.get(step)  # noqa: E731
            self.run_until(lambda: self.world.stopping or ready())
            if self.sleeps:
                self.finish_evaluation()  # no row outlives the cache
                if not self.engine.busy():  # else the run was told to stop, and ends here
                    self.engine.sleep()
            rows = [] if self.world.stopping else self.complete.pop(step, [])
            rows.sort(key=lambda r: r.key)
            table = from_rows(rows, names, self.cfg.discount)
            samples = report.telling([report.sample(i, row) for i, row in enumerate(rows)])
            table.info = {**self.report(), "samples": samples[: self.cfg.log_samples]}
            table.info["refills"] = self.refills.pop(step, [])
            return table

    def report(self) -> dict:
        """What this engine has to tell besides its rows, once."""
        told, self.told = self.told, {"notes": [], "evals": []}
        return told

    def finish_evaluation(self):
        """The next weights wait for the rows that judge the present ones. An evaluation is of one
        version; its standard error is over problems, whose samples are averaged first."""
        if not self.world.generates:
            return
        self.run_until(lambda: self.world.stopping or not (self.later or self.open.get(EVALUATION)))
        problems: dict[int, list[float]] = {}
        for row in self.judged:
            problems.setdefault(row.slot, []).append(sum(row.paid))
        if problems and not self.world.stopping:
            means = [sum(r) / len(r) for r in problems.values()]
            size = min(self.cfg.eval_size, len(self.task.heldout))
            self.told["evals"].append({"version": self.version, "rewards": means, "of": size})
        self.judged = []

    def finish(self) -> Rollouts:
        """After the last step: the last evaluation's results, in a table without rows."""
        self.finish_evaluation()
        return Rollouts(info=self.report() if self.world.generates else {})


def eos_tokens(model: str, tokenizer) -> set[int]:
    """Every token that ends a reply: the tokenizer's, and all of the generation config's."""
    found = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):
        ids = GenerationConfig.from_pretrained(model).eos_token_id
        found |= set(ids if isinstance(ids, list) else [ids])
    if not (found := found - {None}):
        raise UserError(f"model={model}: no end-of-sequence token in tokenizer or config")
    return found
