"""How close a training step is to the limit of the card: floors, then whole steps of the trainer.

    torchrun --nproc_per_node=1 benchmarks/train_step.py OUT qwen3-0.6b-16k qwen3-1.7b-2k
    torchrun --nproc_per_node=2 benchmarks/train_step.py OUT llama3-8b-8k
    torchrun --nproc_per_node=1 benchmarks/train_step.py OUT llama3-8b-8k-half llama3-8b-8k-quarter

The half and the quarter are Llama-3-8B with 16 and 8 of its 32 layers, on one GPU: the same layers
at the same sizes, without what two GPUs must tell each other. They differ by the time of 8 layers.

Random weights of the model's shape, bf16 compute over fp32 master weights, FSDP2, every token but a
row's first trained, AdamW and clip included. MFU = (6 x parameters x tokens + causal attention at
half: 6 x layers x heads x head size x sum of squared lengths) / seconds / 989e12 FLOP/s / GPUs.
Floors are each operation alone, in its fastest form that was found, at the step's sizes.
Writes OUT/<row>.json.
"""

import argparse
import gc
import json
import os
import pathlib
import statistics
import sys
import time
from types import SimpleNamespace

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import losses
import sft
from model import head_logprobs, pack_rows, packed_attention
from rollouts import Rollouts, gather
from runtime import World
from trainer import Trainer

PEAK = 989e12  # dense bf16 FLOP/s of H100 and H200 SXM, by their data sheet
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936}
QWEN3 |= {"head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True}
QWEN3 |= {"max_position_embeddings": 40960, "rope_theta": 1000000, "use_cache": False}
LLAMA3 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256}
LLAMA3 |= {"num_key_value_heads": 8, "tie_word_embeddings": False, "rope_theta": 500000}
LLAMA3 |= {"max_position_embeddings": 8192, "use_cache": False}


def shape(base: dict, hidden: int, ffn: int, layers: int, heads: int) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn}
    return {**base, **sizes, "num_hidden_layers": layers, "num_attention_heads": heads}


MODELS = {
    "tiny": shape({**QWEN3, "vocab_size": 1000}, 128, 256, 2, 8),
    "qwen3-0.6b": shape(QWEN3, 1024, 3072, 28, 16),
    "qwen3-1.7b": shape(QWEN3, 2048, 6144, 28, 16),
    "qwen3-4b": shape(QWEN3, 2560, 9728, 36, 32),
    "llama3-8b": shape(LLAMA3, 4096, 14336, 32, 32),
    "llama3-8b-half": shape(LLAMA3, 4096, 14336, 16, 32),
    "llama3-8b-quarter": shape(LLAMA3, 4096, 14336, 8, 32),
}
ROWS = {  # lengths of the documents of one micro-batch, micro-batches of a step, checkpointing
    "tiny": ("tiny", [64] * 4, 2, "selective"),
    "qwen3-0.6b-16k": ("qwen3-0.6b", [16384], 1, "none"),
    "qwen3-1.7b-2k": ("qwen3-1.7b", [2048] * 8, 1, "none"),
    "qwen3-1.7b-2k-x4": ("qwen3-1.7b", [2048] * 8, 4, "none"),
    "qwen3-1.7b-uneven": ("qwen3-1.7b", [2048, 1748, 1448, 1148, 848, 548, 248] * 2, 1, "none"),
    "qwen3-4b-2k": ("qwen3-4b", [2048] * 8, 1, "selective"),
    "qwen3-4b-2k-x4": ("qwen3-4b", [2048] * 8, 4, "selective"),
    "llama3-8b-8k": ("llama3-8b", [8192] * 2, 1, "selective"),
    "llama3-8b-8k-half": ("llama3-8b-half", [8192] * 2, 1, "selective"),
    "llama3-8b-8k-quarter": ("llama3-8b-quarter", [8192] * 2, 1, "selective"),
}


def seconds(run, repeats: int = 10) -> float:
    """Median time of a call, by the device's own clock where it has one."""
    cuda, times = torch.cuda.is_available(), []
    for _ in range(repeats + 3):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _i in range(2))
            start.record()
        before = time.perf_counter()
        run()
        if cuda:
            end.record()
            torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 if cuda else time.perf_counter() - before)
    return statistics.median(times[3:])


# ---------------------------------------------------------------- floors


def products(model: dict, tokens: int, device) -> float:
    """Seconds of the layers' matrix products: forward, and both gradients."""
    d, ffn = model["hidden_size"], model["intermediate_size"]
    head = model.get("head_dim", d // model["num_attention_heads"])
    q, kv = head * model["num_attention_heads"], head * model["num_key_value_heads"]
    total = 0.0
    for n, k, times in ((q, d, 1), (kv, d, 2), (d, q, 1), (ffn, d, 2), (d, ffn, 1)):
        x, w, g = (
            torch.randn(s, device=device, dtype=torch.bfloat16)
            for s in ((tokens, k), (n, k), (tokens, n))
        )
        total += times * seconds(lambda x=x, w=w, g=g: (x @ w.T, g @ w, g.T @ x))
    return total * model["num_hidden_layers"]


def attention(model: dict, lengths: list[int], device, kind: str) -> float:
    """Seconds of attention in all layers, forward and backward."""
    heads, kv = model["num_attention_heads"], model["num_key_value_heads"]
    size = model.get("head_dim", model["hidden_size"] // heads)
    mask = torch.ones(len(lengths), max(lengths), dtype=torch.bool)
    pack = pack_rows(mask.long(), torch.tensor(lengths), mask, device)
    form = pack.tokens.shape
    q, k, v = (
        torch.randn(*form, h, size, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, kv, kv)
    )
    grad = torch.randn(*form, heads, size, device=device, dtype=torch.bfloat16)
    aten, at = torch.ops.aten, (pack.starts, pack.starts, pack.longest, pack.longest)

    def flat():
        return (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))

    def flash_repeated():
        a, b, c = flat()
        b, c = (x.repeat_interleave(heads // kv, dim=1) for x in (b, c))
        return aten._flash_attention_forward(a, b, c, *at, 0.0, True, False, scale=size**-0.5)[0]

    def flash():
        return aten._flash_attention_forward(*flat(), *at, 0.0, True, False, scale=size**-0.5)[0]

    def ours():
        return packed_attention(None, q, k, v, None, scaling=size**-0.5, pack=pack)[0].flatten(0, 1)

    run = {"flash, repeated": flash_repeated, "flash": flash, "ours": ours}[kind]
    one = seconds(lambda: torch.autograd.grad(run(), (q, k, v), grad.flatten(0, 1)))
    return one * model["num_hidden_layers"]


def head(model: dict, tokens: int, device, chunk: int) -> tuple[float, float]:
    """Seconds of the head, and its peak memory in GB beyond inputs and their gradients."""
    h, w = (
        torch.randn(
            n, model["hidden_size"], device=device, dtype=torch.bfloat16, requires_grad=True
        )
        for n in (tokens, model["vocab_size"])
    )
    targets = torch.randint(model["vocab_size"], (tokens,), device=device)
    grad = torch.randn(tokens, device=device)

    def run():
        logprobs, _ = head_logprobs(h, w, targets, 1.0, chunk)
        return torch.autograd.grad(logprobs, (h, w), grad)

    one = seconds(run, 5)
    if device.type != "cuda":
        return one, 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    gradients = (h.numel() + w.numel()) * 2
    return one, (torch.cuda.max_memory_allocated() - before - gradients) / 1e9


def floors(row: str, chunk: int, device) -> dict:
    name, lengths, _, _ = ROWS[row]
    model, tokens, out = MODELS[name], sum(lengths), {}
    out["products"] = products(model, tokens, device)
    for kind in ("ours", "flash", "flash, repeated"):
        try:
            out[f"attention: {kind}"] = attention(model, lengths, device, kind)
        except Exception as error:
            out[f"attention: {kind}"] = f"{type(error).__name__}: {str(error)[:200]}"
    out["head"], out["head_memory_gb"] = head(model, tokens, device, chunk)
    return out


# ---------------------------------------------------------------- steps


def batch(lengths: list[int], vocabulary: int) -> Rollouts:
    """Rows of random tokens, all but the first trained, with what RL has besides."""
    n, t = len(lengths), max(lengths)
    length = torch.tensor(lengths)
    mask = (torch.arange(t) < length[:, None]) & (torch.arange(t) > 0)
    guess = -torch.log(torch.tensor(float(vocabulary)))
    return Rollouts(
        index=torch.arange(n),
        reply=torch.zeros(n, dtype=torch.int64),
        length=length,
        sampled=mask.sum(1),
        weight=torch.ones(n),
        share=torch.ones(n),
        finished=torch.ones(n, dtype=torch.bool),
        reward=torch.zeros(n),
        tokens=torch.randint(vocabulary, (n, t)),
        mask=mask,
        logprobs=(guess + 0.1 * torch.randn(n, t)) * mask,
        version=torch.zeros(n, t, dtype=torch.int32),
        advantage=torch.randn(n, 1) * mask,
    )


def flops(parameters: int, model: dict, lengths: list[int]) -> float:
    heads, layers = model["num_attention_heads"], model["num_hidden_layers"]
    size = model.get("head_dim", model["hidden_size"] // heads)
    attention = 6 * layers * heads * size * sum(n * n for n in lengths)
    return 6 * parameters * sum(lengths) + attention


def measure(row: str, world, out: pathlib.Path, args) -> dict:
    name, lengths, micro, kind = ROWS[row]
    model, folder = MODELS[name], out / name
    if world.local_rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model))
    torch.distributed.barrier(group=world.control)
    same = {"model": str(folder), "random_init": True, "lr": 1e-5, "lr_schedule": "constant"}
    same |= {"compile": args.compile, "activation_checkpointing": args.checkpointing or kind}
    same |= {"head_chunk": args.chunk, "tokens_per_microbatch": sum(lengths)}
    cfg = grpo.Config(**same)
    grpo.find_loss(cfg)
    with world.device:  # random numbers are made there, in no time
        trainer = Trainer(cfg, world)
    parameters = sum(p.numel() for p in trainer.policy.parameters())
    every = lengths * micro * world.num_trainers
    found = {"row": row, "gpus": world.num_trainers, "parameters": parameters, "tokens": sum(every)}
    found["settings"] = {k: str(v) for k, v in same.items()}
    for kind, loss, divisor in (
        ("sft", sft.sft_loss, None),
        ("rl", losses.policy_loss(losses.LOSSES[cfg.loss]), losses.divisor),
    ):
        rows = batch(every, model["vocab_size"]) if world.leads else Rollouts()
        rows = gather(rows, world, cfg.tokens_per_microbatch)
        times, numbers = [], SimpleNamespace()
        for i in range(args.warmup + args.steps):
            if i == args.warmup and world.cuda:
                torch.cuda.reset_peak_memory_stats()
            before = time.perf_counter()
            numbers = trainer.step(rows, loss, divisor)
            if world.cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
        one = statistics.median(times[args.warmup :])
        done = flops(parameters, model, every) / world.num_trainers
        found[kind] = {"seconds": one, "first": times[0], "all": times[args.warmup :]}
        found[kind] |= {"tokens_per_second_per_gpu": sum(every) / one / world.num_trainers}
        found[kind] |= {"mfu": done / one / PEAK, "loss": numbers["loss"]}
        if world.cuda:
            found[kind]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if args.profile and world.writes:
        found["profile"] = profile(lambda: trainer.step(rows, loss, divisor), out / f"{row}.txt")
    found["update"] = seconds(lambda: (trainer.update(), None), 3) if with_gradients(trainer) else 0
    return found


def with_gradients(trainer) -> bool:
    """Something for the optimizer to be timed with."""
    for p in trainer.policy.parameters():
        p.grad = torch.full_like(p, 1e-4)
    return True


def profile(step, path: pathlib.Path) -> float:
    """The kernels of one step by their time -> path; seconds in which the GPU ran any."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    table = found.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90
    )
    path.write_text(table)
    found.export_chrome_trace(str(path.with_suffix(".trace.json.gz")))
    busy, end = 0.0, 0.0
    spans = [
        (e.time_range.start, e.time_range.end)
        for e in found.events()
        if str(e.device_type) == "DeviceType.CUDA" and not e.is_user_annotation
    ]
    for a, b in sorted(spans):
        busy, end = busy + max(b - max(a, end), 0), max(end, b)
    return busy / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction)
    parser.add_argument("--floors", default=True, action=argparse.BooleanOptionalAction)
    parser.add_argument("--profile", default=False, action=argparse.BooleanOptionalAction)
    parser.add_argument("--checkpointing", default="", help="instead of the row's own")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    world = World(None)
    world.connect()
    for row in args.rows:
        found = {"device": torch.cuda.get_device_name() if world.cuda else "cpu"}
        found |= {"torch": torch.__version__}
        if args.floors:
            found["floors"] = floors(row, args.chunk, world.device)
            print(json.dumps(found["floors"], indent=1), flush=True)
        found |= measure(row, world, args.out, args)
        if world.writes:
            (args.out / f"{row}.json").write_text(json.dumps(found, indent=1))
            print(summary(found), flush=True)
        torch.compiler.reset()  # else a row's sizes are variables to the next one's functions
        gc.collect()  # the trainer: FSDP's modules know each other
        torch.cuda.empty_cache()
    world.close()


def summary(found: dict) -> str:
    lines = [f"{found['row']} on {found['gpus']} x {found['device']}, torch {found['torch']}"]
    for kind in ("sft", "rl"):
        x = found[kind]
        text = (
            f"  {kind}: {x['seconds'] * 1e3:.1f} ms, MFU {x['mfu']:.1%}, first {x['first']:.1f} s"
        )
        rate = f"{x['tokens_per_second_per_gpu']:,.0f} tok/s per GPU"
        lines.append(f"{text}, {rate}, peak {x.get('peak_gib', 0):.1f} GiB, loss {x['loss']:.3f}")
    lines.append(
        f"  update alone {found['update'] * 1e3:.1f} ms; busy {found.get('profile', 0):.3f} s"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
