"""SFT beside TRL's SFTTrainer: the same rows, weights and AdamW; in `curve` the same order, too.

    python benchmarks/sft_peer.py OUT curve --python=PEER      # a processor: losses, seconds
    python benchmarks/sft_peer.py OUT speed qwen3-0.6b         # a GPU: tokens per second
    python benchmarks/sft_peer.py OUT speed qwen3-1.7b --peers=default,liger,compile
    python benchmarks/sft_peer.py OUT fill                     # how full packs are, no training

Each trainer runs in a process of its own. PEER is the Python that has trl (default: this one).
Rows: random words, lengths like Alpaca's (log-normal: prompts with a median of 45 tokens, replies
of 60, deviations 0.5 and 1, at most 1,024 together). `curve`: fp32, batches of 16 rows; SFTTrainer
once as it comes (4 x 4 padded rows, sdpa) and once without padding, in the attention function that
we use ("packed" of model.py). `speed`: bf16, steps of 32,768 tokens in --micro=2 micro-batches of
16,384; SFTTrainer packs to 2,048 and takes as many at once. Its kinds:

    default   as it comes: sdpa, checkpointing on, weights in fp32, autocast to bf16
    best      our attention, no checkpointing, weights and AdamW in bf16
    liger, compile, both   best with Liger's kernels, torch_compile, or with both
    masters   liger, with weights and AdamW in fp32, as ours are

`fill`: real tokens over those that a GPU computes, for settings (tokens a step, pack, trainers).

Seconds are those of the steps after the first WARM ones; a start and a compilation are not in them.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WARM, LONGEST = 2, 2048
SMALL = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 4096}
SMALL |= {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def rows(words: int):
    """Rows without end: words of a vocabulary, rare ones rarely, and what of them is trained."""
    rng = random.Random("alpaca")
    while True:
        prompt = int(min(max(rng.lognormvariate(3.8, 0.5), 8), 512))
        reply = int(min(max(rng.lognormvariate(4.1, 1.0), 2), 1024 - prompt))
        tokens = [3 + int((words - 3) * rng.random() ** 3) for _ in range(prompt + reply)]
        yield {"tokens": tokens, "mask": [False] * prompt + [True] * reply}


def batches(args):
    """Lists of rows: 16, or as many as `--tokens` holds."""
    if args.what == "curve":
        made = rows(args.words)
        yield from (list(itertools.islice(made, 16)) for _ in range(args.steps))
        return
    batch, tokens, left = [], 0, args.steps
    for row in rows(args.words):
        if tokens + len(row["tokens"]) > args.tokens:
            yield batch
            batch, tokens, left = [], 0, left - 1
            if not left:
                return
        batch, tokens = [*batch, row], tokens + len(row["tokens"])


class Clock:
    """Losses, tokens and times of the steps."""

    def __init__(self):
        self.losses, self.tokens, self.wall, self.cpu = [], [], [], []
        self.tick()

    def tick(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def told(self) -> dict:
        step = [b - a for a, b in zip(self.wall[WARM:], self.wall[WARM + 1 :])]
        out = {"losses": self.losses, "cpu_s": self.cpu[-1] - self.cpu[0], "steps": step}
        out |= {"wall_s": self.wall[-1] - self.wall[0], "tokens": self.tokens}
        each = [n / s for n, s in zip(self.tokens[WARM:], step)]
        out["tokens_per_second"] = statistics.median(each) if each else 0.0
        if torch.cuda.is_available():
            out["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return out


def as_they_are(table: dict, numbers, **_) -> dict[str, list]:
    """The form of `rows`, for data.py: tokens already."""
    n = list(map(len, table["tokens"]))
    first = [mask.index(True) for mask in table["mask"]]
    return {**table, "length": n, "given": first, "bad": [""] * len(n)}


def ours(args) -> dict:
    from datasets import Dataset
    from transformers import AutoTokenizer

    import sft
    from data import Examples, to_table
    from rollouts import gather
    from runtime import World
    from trainer import Trainer

    world = World(None)
    world.connect()
    cfg = sft.Config(model=args.model, lr=args.lr, lr_schedule="constant", warmup_steps=0)
    cfg.beta2, cfg.weight_decay, cfg.tokens_per_microbatch = 0.999, 0.0, 2048
    if args.what == "speed":  # as a run reads them, from a file; rows come in another order then
        cfg.compile = torch.cuda.is_available()
        cfg.tokens_per_microbatch = args.tokens // args.micro
        cfg.data, cfg.form = str(args.out / "rows.parquet"), f"{__file__}:as_they_are"
        Dataset.from_list(list(itertools.chain(*batches(args)))).to_parquet(cfg.data)
        cfg.tokens_per_step, cfg.max_tokens, cfg.eval_size = args.tokens, 1024, 0
        cfg.steps = args.steps
        data = Examples(cfg, AutoTokenizer.from_pretrained(ROOT / "assets/calculator"))
    else:
        tables = [to_table(batch, i, LONGEST) for i, batch in enumerate(batches(args))]
    trainer = Trainer(cfg, world)
    clock = Clock()
    for step in range(args.steps):
        made = data.batch(step) if args.what == "speed" else tables[step]
        table = gather(made, world, cfg.tokens_per_microbatch)
        ahead = data.begin if args.what == "speed" else None
        clock.losses.append(trainer.step(table, sft.sft_loss, meanwhile=ahead)["loss"])
        clock.tokens.append(int(table.all.length.sum()))
        clock.tick()
    return clock.told()


def peer(args) -> dict:
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from model import Pack, packed_attention, send

    kind, speed, now = args.kind, args.what == "speed", {}

    def attention(module, query, key, value, mask, scaling=None, **_):
        return packed_attention(module, query, key, value, mask, scaling, now["pack"])

    transformers.AttentionInterface.register("ours", attention)
    transformers.AttentionMaskInterface.register("ours", lambda *_, **__: None)

    def pack_of(positions) -> Pack:
        """Where rows begin in a batch without padding; on the host, as ours."""
        at = (positions[0] == 0).nonzero().flatten()
        starts = torch.cat([at, at.new_tensor([positions.shape[1]])]).int()
        longest = int(positions.max()) + 1
        row = torch.arange(len(at)).repeat_interleave(starts.diff())
        slot = row * longest + positions[0]
        return Pack(None, None, starts, slot, None, longest, False, (len(at), longest))

    clock = Clock()

    class Timed(SFTTrainer):
        def compute_loss(self, model, inputs, *more, **named):
            now["tokens"] = now.get("tokens", 0) + inputs.pop("real")
            if pack := inputs.pop("pack"):
                to = inputs["input_ids"].device
                pack.starts, pack.slot = send(pack.starts, to), send(pack.slot, to)
                now["pack"] = pack
            loss = super().compute_loss(model, inputs, *more, **named)
            now["loss"] = now.get("loss", 0.0) + loss.detach()
            return loss

    class Ticks(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.wall, clock.cpu = [], []
            clock.tick()

        def on_step_end(self, *_, **__):
            clock.losses.append(float(now.pop("loss")))
            clock.tokens.append(now.pop("tokens"))
            clock.tick()

    how = {"output_dir": str(args.out / "trl"), "max_steps": args.steps, "learning_rate": args.lr}
    how |= {"lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_beta2": 0.999, "seed": 0}
    how |= {"optim": "adamw_torch_fused", "max_grad_norm": 1.0, "report_to": "none"}
    how |= {"save_strategy": "no", "logging_steps": 1000, "disable_tqdm": True}
    how |= {
        "completion_only_loss": True,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": args.tokens // args.micro // LONGEST if speed else 4,
    }
    how |= {
        "max_length": LONGEST if speed else None,
        "gradient_checkpointing": kind == "default" and speed,
    }
    how |= {"use_cpu": not torch.cuda.is_available()}
    if speed:
        how |= {"packing": True, "gradient_accumulation_steps": args.micro, "bf16": True}
        how |= {"use_liger_kernel": kind in ("liger", "both", "masters")}
        how |= {"torch_compile": kind in ("compile", "both")}
        how |= {"dataloader_num_workers": int(kind != "default")}  # ours reads in a thread
    else:
        how |= {"gradient_accumulation_steps": 4, "bf16": False}
        how |= {"padding_free": kind == "ours"}
    types = torch.float32 if not speed or kind in ("default", "masters") else torch.bfloat16
    attends = "sdpa" if kind == "default" else "ours"
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=types, attn_implementation=attends
    )
    made = [{"input_ids": r["tokens"], "completion_mask": [int(x) for x in r["mask"]]}
            for batch in batches(args) for r in batch]  # fmt: skip
    made = made * 2 if speed else made  # enough for the packs of the last step
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
    data = Dataset.from_list(made)
    trainer = Timed(model, SFTConfig(**how), train_dataset=data, processing_class=tokenizer)
    collate = trainer.data_collator

    def with_pack(rows: list) -> dict:
        batch = collate(rows)
        real = batch.get("attention_mask", batch["input_ids"] >= 0)
        pack = pack_of(batch["position_ids"]) if "position_ids" in batch else None
        return {**batch, "real": int(real.sum()), "pack": pack}

    trainer.data_collator = with_pack
    trainer.add_callback(Ticks())
    trainer.train()
    return clock.told()


FILLS = [(65_536, 16_384, 1), (65_536, 8192, 1), (65_536, 2048, 1), (32_768, 4096, 8)]
FILLS += [(131_072, 16_384, 8), (131_072, 18_432, 8), (16_384, 2048, 8), (16_384, 2304, 8)]


def fill(args):
    """A table: each setting over 60 steps of `rows`."""
    from model import few_sizes
    from rollouts import pack

    print("| tokens a step | of a pack at most | trainers | packs a trainer | real tokens |")
    print("|---|---|---|---|---|")
    for args.tokens, most, trainers in FILLS:
        real, computed, packs = 0, 0, 0
        for batch in batches(args):
            lengths = [len(row["tokens"]) for row in batch]
            for rows in itertools.chain(*pack(lengths, trainers, most)):
                n = [lengths[i] for i in rows]
                even = len(n) * few_sizes(max(n))  # as pack_rows lays them out
                real, packs = real + sum(n), packs + 1
                computed += even if even <= sum(n) * 17 / 16 else few_sizes(sum(n))
        cells = f"{args.tokens:,}", f"{most:,}", trainers, f"{packs / trainers / args.steps:.2f}"
        print(f"| {' | '.join(map(str, cells))} | {real / computed:.1%} |")


def child(args, python: str, *command: str) -> dict:
    """What one trainer said, in a process of its own; or why it said nothing."""
    file = args.out / f"{args.shape}-{'-'.join(command)}.json"
    file.unlink(missing_ok=True)
    run = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    run = run if command[0] == "ours" else [python]
    run += [__file__, str(args.out), args.what, args.shape, f"--who={command[0]}"]
    run += [f"--kind={command[-1]}", f"--steps={args.steps}", f"--file={file}"]
    run += [f"--tokens={args.tokens}", f"--micro={args.micro}", f"--lr={args.lr}"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=args.timeout)
    if not file.exists():
        text = [x for x in (done.stdout + done.stderr).splitlines() if "Error" in x]
        return {"failed": (text or ["?"])[-1][:160]}
    return json.loads(file.read_text())


def make_model(args) -> str:
    """A folder of random weights of the shape."""
    from train_step import MODELS
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = args.out / args.shape
    if not folder.exists():
        folder.mkdir(parents=True)
        shape = SMALL if args.shape == "small" else MODELS[args.shape]
        (folder / "config.json").write_text(json.dumps({**shape, "use_cache": False}))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("what", choices=["curve", "speed", "fill"])
    parser.add_argument("shape", nargs="?", default="small")
    parser.add_argument("--peers", default="")
    parser.add_argument("--python", default=sys.executable, help="the Python that has trl")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=32768, help="of a step")
    parser.add_argument("--micro", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--timeout", type=float, default=900)
    for name in ("who", "kind", "file"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "speed" and args.tokens % (args.micro * LONGEST):
        parser.error(f"--tokens: not {args.micro} micro-batches of whole packs of {LONGEST}")
    args.steps = args.steps or {"curve": 20, "speed": 7, "fill": 60}[args.what]
    args.model = make_model(args)
    args.words = json.loads((args.out / args.shape / "config.json").read_text())["vocab_size"]
    if args.what == "fill":
        return fill(args)
    if args.who:
        found = {"ours": ours, "peer": peer}[args.who](args)
        pathlib.Path(args.file).write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)
    kinds = {"curve": "default,ours", "speed": "default,best,liger,compile,both,masters"}
    kinds = (args.peers or kinds[args.what]).split(",")
    runs = {}
    for _ in range(args.rounds):  # of several the one of fewest processor seconds
        tried = {"nanoforge": child(args, sys.executable, "ours")}
        tried |= {f"SFTTrainer, {kind}": child(args, args.python, "peer", kind) for kind in kinds}
        for name, x in tried.items():
            best = runs.setdefault(name, x)
            runs[name] = min(best, x, key=lambda y: y.get("cpu_s", 1e9))
    mine, card = runs["nanoforge"], "cpu"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    print(f"{args.shape}, {args.steps} steps, torch {torch.__version__}, {card}\n")
    print(
        "| trainer | tokens per second | times | processor s | wall s | loss differs | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, x in runs.items():
        if "failed" in x:
            print(f"| {name} | {x['failed']} | | | | | |")
            continue
        apart = max(abs(a - b) for a, b in zip(x["losses"], mine["losses"]))
        apart = f"{apart:.1e}" if args.what == "curve" else ""
        speed = x["tokens_per_second"]
        cells = [name, f"{speed:,.0f}", f"{mine['tokens_per_second'] / max(speed, 1):.2f}"]
        cells += [f"{x['cpu_s']:.1f}", f"{x['wall_s']:.1f}", apart, f"{x.get('peak_gib', 0):.1f}"]
        print(f"| {' | '.join(cells)} |")
    if args.what == "curve":
        print("\nlosses of ours:", " ".join(f"{x:.4f}" for x in mine["losses"]))


if __name__ == "__main__":
    main()
