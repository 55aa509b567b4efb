"""The table that travels, `gather` (generators -> trainers), and the packing plan.

Legend, for every file: N rows of the table, B rows of a micro-batch, T tokens, V vocabulary.
A column (N, T) is about the token *in* that column: logprobs[n, t] = log p(tokens[n, t] | before).
"""

import hashlib
import heapq
import json
import math
import pathlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

SMALL = {  # the (N,) columns, in the order in which they travel
    "index": torch.int64,
    "reply": torch.int64,
    "length": torch.int64,
    "sampled": torch.int64,
    "weight": torch.float32,
    "finished": torch.bool,
    "reward": torch.float32,
}
CELLS = {  # the (N, T) columns, each 32 bits wide on its way
    "tokens": torch.int64,
    "mask": torch.bool,
    "logprobs": torch.float32,
    "version": torch.int32,
    "advantage": torch.float32,
}


@dataclass
class Rollouts:
    """One row per reply. Right-padded in memory, flat when it travels.

    After `gather` a trainer holds the token columns of its own rows, and in `all` the small columns
    of every row.
    """

    index: torch.Tensor = None  # (N,) int64: step * 2^32 + slot of the prompt; a group's
    reply: torch.Tensor = None  # (N,) int64: number in its group; sorted by (index, reply)
    length: torch.Tensor = None  # (N,) int64: prompt + all turns
    sampled: torch.Tensor = None  # (N,) int64: tokens that the policy sampled = mask.sum(1)
    weight: torch.Tensor = None  # (N,) 0 or 1: whether the row counts, in every divisor too
    finished: torch.Tensor = None  # (N,) bool: ended by itself, not cut off
    reward: torch.Tensor = None  # (N,) float32: sum of the reward functions
    rewards: dict[str, torch.Tensor] = field(default_factory=dict)  # each function's own (N,)
    tokens: torch.Tensor = None  # (N, T) int64
    mask: torch.Tensor = None  # (N, T) bool: sampled by the policy, not given
    logprobs: torch.Tensor = None  # (N, T) float32, as sampled (temperature applied), else 0
    version: torch.Tensor = None  # (N, T) int32: weights that sampled the token, -1 elsewhere
    advantage: torch.Tensor = None  # (N, T) float32
    # Only after gather, only here:
    all: "Rollouts" = None  # the small columns of every row of the batch
    microbatches: list[list[int]] = field(default_factory=list)  # this trainer's rows
    infos: list[dict] = field(default_factory=list)  # what every rank had to tell
    stop: bool = False  # some rank was told to stop
    # Besides its rows: samples, notes and evaluations, which `gather` brings to every rank.
    info: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return 0 if self.index is None else len(self.index)

    def columns(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in vars(self).items() if torch.is_tensor(v)}

    def take(self, rows: list[int], device=None) -> "Rollouts":
        """The given rows, with the padding cut to the longest of them, on `device`."""
        at = torch.tensor(rows, dtype=torch.long)
        width = int(self.length[at].max()) if rows else 0
        rewards = {k: v[at] for k, v in self.rewards.items()}
        cut = {k: v[at, :width] if v.dim() == 2 else v[at] for k, v in self.columns().items()}
        return Rollouts(**{k: v.to(device) for k, v in cut.items()}, rewards=rewards)

    def save(self, path: pathlib.Path):
        """All columns as one safetensors file (`load_rollouts` reads a folder of them)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {f"rewards/{k}": v for k, v in self.rewards.items()}
        save_file({k: v.contiguous() for k, v in {**self.columns(), **named}.items()}, path)


def load_rollouts(folder: str | pathlib.Path) -> Rollouts:
    """One step's table as `--save_rollouts` left it: every trainer's rows, sorted."""
    parts = [load_file(p) for p in sorted(pathlib.Path(folder).glob("*.safetensors"))]
    width = max(p["tokens"].shape[1] for p in parts)

    def wide(name, v):
        nothing = -1 if name == "version" else 0
        return F.pad(v, (0, width - v.shape[1]), value=nothing) if v.dim() == 2 else v

    columns = {k: torch.cat([wide(k, p[k]) for p in parts]) for k in parts[0]}
    key = list(zip(columns["index"].tolist(), columns["reply"].tolist()))
    order = sorted(range(len(key)), key=key.__getitem__)
    table, rewards = Rollouts(), {}
    for name, values in columns.items():
        if name.startswith("rewards/"):
            rewards[name.removeprefix("rewards/")] = values[order]
        else:
            setattr(table, name, values[order])
    table.rewards = rewards
    return table


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
    borders: list[tuple[int, int]] = field(default_factory=list)  # in this turn
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
        """A turn of the policy. A token whose log-prob is not finite is taken out of the loss.

        `borders` are (tokens so far, version that made them): weights that came during the turn.
        """
        versions = []
        for count, version in [*self.borders, (len(tokens), now)]:
            versions += [version] * (count - len(versions))
        self.borders = []
        finite = [math.isfinite(p) for p in logprobs]
        self.tokens += tokens
        self.mask += finite
        self.logprobs += [p if ok else 0.0 for p, ok in zip(logprobs, finite, strict=True)]
        self.version += [v if ok else -1 for v, ok in zip(versions, finite, strict=True)]

    def name(self) -> str:
        """For a person."""
        kind = "evaluation of version" if self.evaluates else "step"
        return f"{kind} {self.step}, slot {self.slot}, reply {self.reply}"

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


def from_rows(rows: list[Row], reward_names: list[str]) -> Rollouts:
    """Finished rows of the generator -> table, sorted by (index, reply)."""
    rows = sorted(rows, key=lambda r: (r.index, r.reply))
    n, t = len(rows), max((len(r.tokens) for r in rows), default=0)

    def padded(name, fill, dtype):
        out = torch.full((n, t), fill, dtype=dtype)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            out[i, : len(values)] = torch.tensor(values, dtype=dtype)
        return out

    def column(values, dtype):
        return torch.tensor(list(values), dtype=dtype)

    return Rollouts(
        index=column((r.index for r in rows), torch.int64),
        reply=column((r.reply for r in rows), torch.int64),
        length=column((len(r.tokens) for r in rows), torch.int64),
        sampled=column((sum(r.mask) for r in rows), torch.int64),
        weight=torch.ones(n),
        finished=column((r.finished for r in rows), torch.bool),
        reward=column((sum(r.rewards.values()) for r in rows), torch.float32),
        rewards={k: column((r.rewards[k] for r in rows), torch.float32) for k in reward_names},
        tokens=padded("tokens", 0, torch.int64),
        mask=padded("mask", False, torch.bool),
        logprobs=padded("logprobs", 0.0, torch.float32),
        version=padded("version", -1, torch.int32),
    )


# ---------------------------------------------------------------- the packing plan


def pack(lengths: list[int], num_trainers: int, budget: int) -> list[list[list[int]]]:
    """Row lengths -> plan[trainer][micro-batch] = row numbers. Balanced; equally many for each.

    Longest row first into the emptiest bin (LPT). A bin holds at most `budget` tokens; a longer row
    has a bin alone. Every rank computes the same plan from the same lengths, so nothing needs to be
    agreed on.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_trainer = max(1, math.ceil(sum(min(n, budget) for n in lengths) / (budget * num_trainers)))
    while True:
        bins = [[] for _ in range(per_trainer * num_trainers)]
        heap = [(0, b) for b in range(len(bins))]
        for i in order:
            load, b = heap[0]
            if load and load + lengths[i] > budget:
                break
            heapq.heapreplace(heap, (load + lengths[i], b))
            bins[b].append(i)
        else:
            break
        per_trainer += 1
    loads = {b: load for load, b in heap}
    plan = [[] for _ in range(num_trainers)]
    # Heaviest bins first, a round at a time, to and fro: what is added up comes out about equal.
    for k, b in enumerate(sorted(range(len(bins)), key=lambda b: (-loads[b], b))):
        turn, place = divmod(k, num_trainers)
        plan[place if turn % 2 == 0 else num_trainers - 1 - place].append(sorted(bins[b]))
    return plan


# ---------------------------------------------------------------- gather


def exchange(parts: list[torch.Tensor], sizes: list[int], group) -> list[torch.Tensor]:
    """parts[r] goes to rank r (1-D) -> what each rank sent here. One all-to-all. Collective."""
    received = torch.empty(sum(sizes), dtype=parts[0].dtype)
    dist.all_to_all_single(received, torch.cat(parts), sizes, [len(p) for p in parts], group=group)
    return list(received.split(sizes))


def to_cells(table: Rollouts, rows: torch.Tensor) -> torch.Tensor:
    """The token columns of some rows, flat, without padding: (sum of lengths * 5,) int32."""
    real = torch.arange(table.tokens.shape[1]) < table.length[rows, None]  # (rows, T)
    bits = [getattr(table, k)[rows][real] for k in CELLS]
    bits = [b.view(torch.int32) if b.is_floating_point() else b.int() for b in bits]
    return torch.stack(bits, 1).flatten()


def from_cells(cells: torch.Tensor, table: Rollouts):
    """Fill the token columns of `table`, whose `length` says how the flat cells fall into rows."""
    real = torch.arange(int(table.length.max())) < table.length[:, None]  # (N, T)
    for bits, (name, dtype) in zip(cells.view(-1, len(CELLS)).T.contiguous(), CELLS.items()):
        column = torch.full(real.shape, -1 if name == "version" else 0, dtype=dtype)
        column[real] = bits.view(torch.float32) if dtype.is_floating_point else bits.to(dtype)
        setattr(table, name, column)


def gather(rollouts: Rollouts, world, tokens_per_microbatch: int) -> Rollouts:
    """Rows from the engines -> each trainer's share of the batch. Collective: every rank calls it,
    rows or not.

    One fixed header per rank, then the small columns of every row to everyone. Each rank alone
    computes the same packing plan from them, and the token columns go only to the trainer that
    trains the row. Returns on a trainer its own rows, their `microbatches`, and in `all` the small
    columns of the batch.
    """
    world.arrive("gather")
    with world.span("gather"):
        group, size, me = world.control, world.size, world.rank
        mine = (
            rollouts if world.leads else Rollouts(info=rollouts.info)
        )  # an engine speaks through its first rank
        for sample in mine.info.get("samples", []):  # its mean over the sampled tokens
            row = sample["row"]
            sample["advantage"] = float(mine.advantage[row].sum() / max(int(mine.sampled[row]), 1))
        info = {
            "rank": me,
            "clock": world.clock,
            "spans": world.spans,
            "rewards": list(mine.rewards),
            **mine.info,
        }
        world.clock, world.spans = {}, []
        info = torch.frombuffer(
            bytearray(json.dumps(info, default=str).encode()), dtype=torch.uint8
        )
        headers = [torch.empty(3, dtype=torch.int64) for _ in range(size)]
        dist.all_gather(
            headers, torch.tensor([len(mine), len(info), int(world.stopping)]), group=group
        )
        counts, info_sizes, stops = torch.stack(headers).T.tolist()
        infos = [json.loads(bytes(i.tolist())) for i in exchange([info] * size, info_sizes, group)]
        rewards = next((i["rewards"] for i in infos if i["rewards"]), [])

        # float64 holds an index (step * 2^32 + slot) exactly up to step 2^21
        small = (
            [getattr(mine, k) for k in SMALL] + [mine.rewards[k] for k in rewards]
            if len(mine)
            else []
        )
        small = (
            torch.stack([c.double() for c in small], 1).flatten()
            if small
            else torch.empty(0, dtype=torch.float64)
        )
        width = len(SMALL) + len(rewards)
        tables = exchange([small] * size, [n * width for n in counts], group)
        table = torch.cat(tables).view(-1, width)  # (rows of all ranks, small columns)
        source = torch.repeat_interleave(
            torch.arange(size), torch.tensor(counts)
        )  # rank that holds the row
        place = torch.cat([torch.arange(n) for n in counts])  # its number there
        order = torch.tensor(
            sorted(range(len(table)), key=lambda i: table[i, :2].tolist()), dtype=torch.long
        )
        table, source, place = table[order].T, source[order], place[order]
        everyone = Rollouts(**{k: c.to(dtype) for (k, dtype), c in zip(SMALL.items(), table)})
        everyone.rewards = {k: c.float() for k, c in zip(rewards, table[len(SMALL) :])}

        counted = everyone.weight.nonzero().flatten()  # rows of weight 0 are not trained
        plan = pack(everyone.length[counted].tolist(), world.num_trainers, tokens_per_microbatch)
        plan = [[[int(counted[i]) for i in micro] for micro in trainer] for trainer in plan]
        share = {
            r: torch.tensor(sorted(sum(plan[t], [])), dtype=torch.long)
            for t, r in enumerate(world.trainer_ranks)
        }

        nothing = torch.empty(0, dtype=torch.int32)
        parts = [nothing] * size
        for r, rows in share.items():
            here = rows[source[rows] == me]
            parts[r] = to_cells(mine, place[here]) if len(here) else nothing
        rows = share.get(me, torch.empty(0, dtype=torch.long))
        rows = rows[torch.argsort(source[rows], stable=True)]  # they arrive rank by rank
        sizes = [
            int(everyone.length[rows[source[rows] == r]].sum()) * len(CELLS) for r in range(size)
        ]
        cells = torch.cat(exchange(parts, sizes, group))
        out = everyone.take(rows.tolist())
        if len(rows):
            from_cells(cells, out)
            number = {int(r): i for i, r in enumerate(rows)}
            out.microbatches = [[number[r] for r in micro] for micro in plan[world.trainer_index]]
        elif world.trains:
            out.microbatches = [[] for _ in plan[0]]
        out.all, out.infos, out.stop = everyone, infos, any(stops)
        return out
