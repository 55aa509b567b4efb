"""The table that travels, `gather` (generators -> trainers), and the packing plan.
Legend, for every file: N rows of the table, B rows of a micro-batch, T tokens, V vocabulary.
A column (N, T) is of the token *in* that column: logprobs[n, t] = log p(tokens[n, t] | before)."""

import hashlib
import heapq
import itertools
import json
import math
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist


def column(kind: str, dtype: torch.dtype):
    """A field of `Rollouts` that travels: one number a "row", (N,), or one a "cell", (N, T)."""
    return field(default=None, metadata={kind: dtype})


@dataclass
class Rollouts:
    """One row per reply. Right-padded in memory, flat when it travels."""

    index: torch.Tensor = column("row", torch.int64)  # step * 2^32 + slot of the prompt; a group's
    reply: torch.Tensor = column("row", torch.int64)  # in its group; sorted by (index, reply)
    length: torch.Tensor = column("row", torch.int64)  # prompt + all turns
    sampled: torch.Tensor = column("row", torch.int64)  # tokens the policy sampled = mask.sum(1)
    weight: torch.Tensor = column("row", torch.float32)  # 0 or 1: counts, in every divisor too
    share: torch.Tensor = column("row", torch.float32)  # what its token counts in the loss's sum
    finished: torch.Tensor = column("row", torch.bool)  # ended by itself, not cut off
    reward: torch.Tensor = column("row", torch.float32)  # sum of the reward functions
    rewards: dict[str, torch.Tensor] = field(default_factory=dict)  # each function's own (N,)
    tokens: torch.Tensor = column("cell", torch.int64)
    mask: torch.Tensor = column("cell", torch.bool)  # sampled by the policy, not given
    logprobs: torch.Tensor = column("cell", torch.float32)  # as sampled, at its temperature; else 0
    version: torch.Tensor = column("cell", torch.int32)  # weights that sampled the token, or -1
    advantage: torch.Tensor = column("cell", torch.float32)
    turns: torch.Tensor = None  # (N, T) int64, before gather: number of the token's turn
    returns: torch.Tensor = None  # (N, K) float32, before gather: earned from each turn on
    # Only after gather, only on the trainer that trains the rows:
    ref_logprobs: torch.Tensor = None  # (N, T) float32: of the reference model, where asked for
    teacher_logprobs: torch.Tensor = None  # (N, T) float32: of the teacher, where asked for
    old_logprobs: torch.Tensor = None  # (N, T) float32: of the policy before the batch's updates
    minibatch: torch.Tensor = None  # (N,) int64: the update, of its batch, that trains the row
    all: "Rollouts" = None  # the small columns, (N,), of every row of the batch
    plan: list[list[list[int]]] = field(default_factory=list)  # [mini-batch][micro-batch] = rows
    infos: list[dict] = field(default_factory=list)  # what every rank told the first trainer
    stop: bool = False  # some rank was told to stop
    # Besides its rows: samples, notes and evaluations, which `gather` brings to the first trainer.
    info: dict = field(default_factory=dict)

    @classmethod
    def blank(cls, n: int, t: int) -> "Rollouts":
        """N rows of T tokens in which everything is 0, and no version sampled anything."""
        rows = {k: torch.zeros(n, dtype=dtype) for k, dtype in SMALL.items()}
        cells = {k: torch.zeros(n, t, dtype=dtype) for k, dtype in CELLS.items()}
        return cls(**rows, **{**cells, "version": cells["version"] - 1})

    def __len__(self) -> int:
        return 0 if self.index is None else len(self.index)

    def columns(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in vars(self).items() if torch.is_tensor(v)}

    def take(self, rows) -> "Rollouts":
        """The rows of these numbers, with the padding cut to the longest of them."""
        at = torch.as_tensor(rows, dtype=torch.long)
        width = int(self.length[at].max()) if len(at) else 0
        cut = {k: v[at, :width] if v.dim() == 2 else v[at] for k, v in self.columns().items()}
        return Rollouts(**cut, rewards={k: v[at] for k, v in self.rewards.items()})


SMALL, CELLS = (  # name -> type, in the order in which they travel; a cell is 32 bits wide then
    {f.name: f.metadata[kind] for f in fields(Rollouts) if kind in f.metadata}
    for kind in ("row", "cell")
)
PER_TOKEN = ("tokens", "mask", "logprobs", "version", "turns")  # lists of a Row, columns here


@dataclass
class Row:
    """One reply while it is being made: what will be a row of the table."""

    step: int
    slot: int
    attempt: int
    reply: int
    episode: object  # tasks.Episode
    evaluates: bool = False  # a row of an evaluation: judged and forgotten
    tokens: list[int] = field(default_factory=list)  # prompt, turns and the environment's replies
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    prompt_length: int = 0
    turn: int = 0
    # Weights that came during this turn: (its tokens so far, version that made them).
    borders: list[tuple[int, int]] = field(default_factory=list)
    finished: bool = False
    started: float = 0.0  # when, by time.monotonic
    turns: list[int] = field(default_factory=list)  # of each token, the number of its turn
    rewards: dict[str, float] = field(default_factory=dict)  # as the functions gave them
    paid: list[float] = field(default_factory=list)  # to each turn, by the rewards' weights

    def append_given(self, tokens: list[int]):
        """Tokens that the policy did not sample: the prompt, or the environment's reply."""
        n = len(tokens)
        self.prompt_length = self.prompt_length or n
        self.append(tokens, [False] * n, [0.0] * n, [-1] * n, [0] * n)

    def append_sampled(self, tokens: list[int], logprobs: list[float], now: int):
        """A turn of the policy. A token whose log-prob is not finite is taken out of the loss."""
        versions = []
        for count, version in [*self.borders, (len(tokens), now)]:
            # An engine may have been past the end by then: it queues steps ahead.
            versions += [version] * (min(count, len(tokens)) - len(versions))
        self.borders = []
        mask = [*map(math.isfinite, logprobs)]
        if not all(mask):
            logprobs = [p if ok else 0.0 for p, ok in zip(logprobs, mask)]
            versions = [v if ok else -1 for v, ok in zip(versions, mask)]
        self.append(tokens, mask, logprobs, versions, [self.turn] * len(tokens))

    def append(self, *values: list):
        """What each of some more tokens has, in the order of PER_TOKEN."""
        assert len({*map(len, values)}) == 1, "every token has its log-prob, mask, version, turn"
        for name, more in zip(PER_TOKEN, values):
            getattr(self, name).extend(more)

    def name(self) -> str:
        """For a person."""
        kind = "evaluation of version" if self.evaluates else "step"
        where = f"{kind} {self.step}, slot {self.slot}, reply {self.reply}"
        return f"{where}, prompt {str(self.episode.problem['prompt'])[:60]!r}"

    @property
    def index(self) -> int:
        return self.step * 2**32 + self.slot

    @property
    def key(self) -> tuple:
        return (self.evaluates, self.step, self.slot, self.attempt, self.reply)

    def seed(self, base: int) -> int:
        """63 bits from the row's name: the same numbers in any topology and after a resume."""
        name = f"{base}/{self.key}/{self.turn}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def from_rows(rows: list[Row], reward_names: list[str], discount: float = 1.0) -> Rollouts:
    """Finished rows -> table, sorted by (index, reply). A turn's return is what it earned plus
    `discount` times the next one's; from its end on a row stands with what its last turn earned."""
    rows = sorted(rows, key=lambda r: (r.index, r.reply))
    table = Rollouts.blank(len(rows), max((len(r.tokens) for r in rows), default=0))
    turns = max((len(r.paid) for r in rows), default=0)
    table.returns, table.turns = torch.zeros(len(rows), turns), torch.zeros_like(table.tokens)
    cells, small = {name: getattr(table, name).numpy() for name in PER_TOKEN}, []
    for i, row in enumerate(rows):
        what = row.index, row.reply, len(row.tokens), sum(row.mask)
        small.append((*what, 1, 1, row.finished, sum(row.paid)))  # in the order of SMALL
        to_go = [*itertools.accumulate(row.paid[::-1], lambda later, now: now + discount * later)]
        table.returns.numpy()[i] = [*to_go[::-1], *to_go[:1] * turns][:turns]
        for name, column in cells.items():
            column[i, : len(getattr(row, name))] = getattr(row, name)  # quicker than by tensors
    for (name, dtype), values in zip(SMALL.items(), zip(*small)):
        setattr(table, name, torch.tensor(values, dtype=dtype))
    table.rewards = {k: torch.tensor([r.rewards[k] for r in rows]).float() for k in reward_names}
    return table


def pack(lengths: list[int], num_trainers: int, budget: int) -> list[list[list[int]]]:
    """Row lengths -> plan[trainer][micro-batch] = row numbers. Balanced; equally many for each.
    Longest row first into the emptiest bin (LPT). A bin holds at most `budget` tokens; a longer row
    has one alone. Every rank computes the same plan from the same lengths: nothing is agreed."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    least = math.ceil(sum(min(n, budget) for n in lengths) / (budget * num_trainers))
    for per_trainer in itertools.count(max(1, least)):
        bins = [(0, b, []) for b in range(per_trainer * num_trainers)]  # a heap: (load, b, rows)
        for i in order:
            load, b, rows = bins[0]
            if load and load + lengths[i] > budget:
                break
            heapq.heapreplace(bins, (load + lengths[i], b, [*rows, i]))
        else:
            break
    plan = [[] for _ in range(num_trainers)]
    # Heaviest bins first, a round at a time, to and fro: what is added up comes out about equal.
    for k, (_, _, rows) in enumerate(sorted(bins, key=lambda bin: (-bin[0], bin[1]))):
        turn, place = divmod(k, num_trainers)
        plan[place if turn % 2 == 0 else num_trainers - 1 - place].append(sorted(rows))
    return plan


def exchange(parts: list[torch.Tensor], sizes: list[int], group) -> torch.Tensor:
    """parts[r] goes to rank r -> what the ranks sent here, in their order; all 1-D. Collective."""
    received = torch.empty(sum(sizes), dtype=parts[0].dtype)
    dist.all_to_all_single(received, torch.cat(parts), sizes, [len(p) for p in parts], group=group)
    return received


def to_cells(table: Rollouts, rows: torch.Tensor) -> torch.Tensor:
    """The token columns of some rows, flat, without padding: (sum of lengths * 5,) int32."""
    if not len(rows):
        return torch.empty(0, dtype=torch.int32)
    assert len({getattr(table, k).shape for k in CELLS}) == 1, "columns differ in shape"
    slot = torch.arange(table.tokens.shape[1])
    at = (rows[:, None] * len(slot) + slot)[slot < table.length[rows, None]]  # in the flat (N, T)
    bits = [getattr(table, k).flatten()[at] for k in CELLS]
    bits = [b.view(torch.int32) if b.is_floating_point() else b.int() for b in bits]
    return torch.stack(bits, 1).flatten()


def from_cells(cells: torch.Tensor, table: Rollouts):
    """Fill the token columns of `table`, whose `length` says how the flat cells fall into rows."""
    real = torch.arange(int(table.length.max())) < table.length[:, None]  # (N, T)
    blank, at = Rollouts.blank(*real.shape), real.flatten().nonzero().flatten()
    for bits, (name, dtype) in zip(cells.view(-1, len(CELLS)).T.contiguous(), CELLS.items()):
        bits = bits.view(torch.float32) if dtype.is_floating_point else bits.to(dtype)
        setattr(table, name, getattr(blank, name).put_(at, bits))


def gather(rollouts: Rollouts, world, tokens_per_microbatch: int, minibatches: int = 1) -> Rollouts:
    """Rows from the engines -> each trainer's share of the batch. Collective, rows or not. A header
    per rank, then the small columns of every row to everyone, who computes the same packing plan
    from them; token columns go to the row's trainer alone, which returns its rows and `plan`."""
    world.arrive("gather")
    with world.span("gather"):
        group, me, ranks = world.control, world.rank, range(world.size)
        # An engine speaks through its first rank.
        mine = rollouts if world.leads else Rollouts(info=rollouts.info)
        header = torch.tensor([len(mine), int(world.stopping), int(world.due)])
        headers = [torch.empty_like(header) for _ in ranks]
        dist.all_gather(headers, header, group=group)
        counts, stops, due = torch.stack(headers).T.tolist()
        world.saves = any(due)
        # Only the first trainer writes things down. To all ranks it would be ranks^2 texts.
        infos = [None for _ in ranks] if world.writes else None
        dist.gather_object(tell(mine, world), infos, world.first_trainer, group)
        infos = [json.loads(text) for text in infos or []]

        columns = [getattr(mine, k) for k in SMALL] + list(mine.rewards.values())
        flat, width = torch.empty(0).double(), len(SMALL) + len(rollouts.rewards)
        if len(mine):  # as float64: an index is exact up to step 2^21
            flat = torch.stack([c.double() for c in columns], 1).flatten()
        small = exchange([flat for _ in ranks], [n * width for n in counts], group)
        small = small.view(-1, width)  # (rows of all ranks, small columns)
        source = torch.repeat_interleave(torch.tensor(ranks), torch.tensor(counts))  # who holds it
        place = torch.cat([torch.arange(n) for n in counts])  # the row's number there
        order = [i for _, i in sorted((key, i) for i, key in enumerate(small[:, :2].tolist()))]
        small, source, place = small[order].T, source[order], place[order]
        everyone = Rollouts(**{k: c.to(dtype) for (k, dtype), c in zip(SMALL.items(), small)})
        everyone.rewards = {k: c.float() for k, c in zip(rollouts.rewards, small[len(SMALL) :])}

        plan = plan_batch(everyone, world.num_trainers, tokens_per_microbatch, minibatches)
        plan = dict(zip(world.trainer_ranks, plan))
        trained = [sum(sum(plan.get(r, []), []), []) for r in ranks]  # rows, by rank
        share = [torch.tensor(sorted(rows), dtype=torch.long) for rows in trained]
        parts = [to_cells(mine, place[rows[source[rows] == me]]) for rows in share]
        rows = share[me][source[share[me]].argsort(stable=True)]  # they arrive rank by rank
        sizes = [int(everyone.length[rows[source[rows] == r]].sum()) * len(CELLS) for r in ranks]
        cells = exchange(parts, sizes, group)
        out = everyone.take(rows)
        if len(rows):
            from_cells(cells, out)
        here = {int(row): i for i, row in enumerate(rows)}
        out.plan = [[[here[row] for row in micro] for micro in mini] for mini in plan.get(me, [])]
        out.all, out.infos, out.stop = everyone, infos, any(stops)
        return out


def tell(mine: Rollouts, world) -> str:
    """What a rank has to say besides its rows, as JSON: its clock, spans, samples, notes."""
    for sample in mine.info.get("samples", []):  # its mean over the sampled tokens
        row = sample["row"]
        sample["advantage"] = float(mine.advantage[row].sum() / max(int(mine.sampled[row]), 1))
    world.lap()
    told = {"rank": world.rank, "clock": world.clock, "spans": world.spans, **mine.info}
    world.spans = []
    return json.dumps(told, default=str)


def plan_batch(table: Rollouts, num_trainers: int, budget: int, minibatches: int) -> list:
    """plan[trainer][mini-batch][micro-batch] = row numbers, from the small columns. Writes
    `minibatch`: whole groups, in the order of their slots. Rows of share 0 are not computed."""
    groups, group = torch.unique(table.index, return_inverse=True)
    table.minibatch = group * minibatches // max(len(groups), 1)  # (N,)
    plan = [[] for _ in range(num_trainers)]
    for k in range(minibatches):
        rows = ((table.minibatch == k) & (table.share > 0)).nonzero().flatten().tolist()
        for trainer, micro in zip(plan, pack(table.length[rows].tolist(), num_trainers, budget)):
            trainer.append([[rows[i] for i in numbers] for numbers in micro])
    return plan
