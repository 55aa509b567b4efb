"""Weight sync: from the trainers' arrival to the last rank's leaving, less the engine step then in
progress, while the engine is busy with 256 rows; beside plain NCCL broadcasts of as many bytes.

    torchrun --nproc_per_node=2 benchmarks/sync.py OUT qwen3-1.7b apart       # 1 + 1
    torchrun --nproc_per_node=2 benchmarks/sync.py OUT qwen3-8b colocated     # FSDP2 over 2
    torchrun --nproc_per_node=2 benchmarks/sync.py OUT tiny apart             # a CPU, to try it

Random weights of the model's shape, fp32 in the trainer and bf16 in the engine. A sync begins when
its last rank has arrived and the engine's steps, the queued one too, have ended on the GPU; it ends
when every rank's GPU has done all of it. The first sync, in which NCCL connects and vLLM's loaders
are written down, is shown alone. The last is proven: bit-equal on the wire, poison overwritten.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from generation import SHAPES
from long_tail import word_model
from transformers import AutoTokenizer

import grpo
import weights
from generator import Generator
from runtime import World
from tasks import Task
from trainer import Trainer


class Endless(Task):
    """Rows that go on to their last token: 256 of them are always running."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.nothing]
        self.train = [{"prompt": " ".join(str(i * k % 97) for k in range(64))} for i in range(64)]
        self.heldout = self.train[:1]

    def nothing(self, episode) -> float:
        return 0.0


def now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.monotonic()


def keep_busy(device: torch.device, seconds: float):
    """As training would: an idle card lowers its clocks."""
    x, until = torch.randn(4096, 4096, device=device).bfloat16(), time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(20 if device.type == "cuda" else 0):
            x @ x
        now(device.type == "cuda")


def wire(world, size: int, dtype: torch.dtype, colocated: bool) -> float:
    """Seconds of plain broadcasts (colocated: all-gathers) of so many bytes, 1 GiB each."""
    step = min(size, 2**30) // dtype.itemsize
    flat, best = torch.zeros(step, dtype=dtype, device=world.device), float("inf")
    part = flat.chunk(world.size)[world.rank].clone()
    for _ in range(4):
        dist.barrier(group=world.control)
        start = now(world.cuda)
        for _ in range(round(size / (step * dtype.itemsize))):
            if colocated:
                dist.all_gather_into_tensor(flat, part, group=world.trainers)
            else:
                dist.broadcast(flat, src=world.first_trainer, group=world.weights)
        best = min(best, now(world.cuda) - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("topology", choices=["apart", "colocated"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--eager", action="store_true", help="no CUDA graphs: the engine starts sooner"
    )
    parser.add_argument("--bucket_mb", type=int, default=grpo.Config.sync_bucket_mb)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    colocated = args.topology == "colocated"
    words, sizes = SHAPES[args.shape]
    model = args.out.resolve() / args.shape
    if os.environ["RANK"] == "0":
        word_model(model, words, 4096, weights=False, **sizes)
    cfg = grpo.Config(model=str(model), random_init=True, prompts_per_step=32, max_num_seqs=256)
    cfg.max_prompt_tokens, cfg.max_turns, cfg.max_policy_age = 64, 1, 50
    cfg.steps, cfg.eval_size, cfg.sleep, cfg.enforce_eager = 1000, 0, "no", args.eager
    cfg.num_generators, cfg.sync_bucket_mb = (0 if colocated else 1), args.bucket_mb
    cfg.gpu_memory_utilization, cfg.max_new_tokens = 0.5, 2048 if torch.cuda.is_available() else 512
    world = World(cfg.num_generators)
    world.connect()
    dist.barrier(group=world.control)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with world.device:  # random weights are made there, in no time
        trainer = Trainer(cfg, world, tokenizer)
    generator = Generator(cfg, world, Endless(cfg), tokenizer)
    size = sum(p.numel() for _, p in weights.parameters(trainer)) if world.trains else 0
    size = world.agree(size) * generator.dtype.itemsize

    idle, arrive = {}, world.arrive

    def arrive_and_finish_steps(name):
        arrive(name)
        idle["at"] = now(world.cuda)  # the step that was in progress has ended

    world.arrive = arrive_and_finish_steps
    seconds, longest = [], [0.0, 0.0]
    for k in range(args.repeats + 1):
        if world.trains and not colocated:
            keep_busy(world.device, 1.0 if world.cuda else 0.3)
        elif colocated and k:
            until = time.monotonic() + (1.0 if world.cuda else 0.3)
            generator.run_until(lambda until=until: time.monotonic() > until)
        last = k == args.repeats
        if last and world.cuda and args.profile:
            profile = torch.profiler.profile()
            profile.start()
        if world.cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        arrived = time.monotonic()
        weights.sync(trainer, generator, world)
        left = now(world.cuda)
        extra = torch.cuda.max_memory_allocated() - before if world.cuda else 0
        if last and world.cuda and args.profile:
            profile.stop()
            print(
                profile.key_averages().table(
                    sort_by="cuda_time_total", row_limit=14, max_name_column_width=60
                )
            )
        told = [None] * world.size
        busy = len(generator.rows) if world.generates else 0
        dist.all_gather_object(told, (arrived, idle["at"], left, extra, busy), group=world.control)
        start = max(max(t[0] for t in told if t[0]), max(t[1] for t in told))
        seconds.append(max(t[2] for t in told) - start)
        if k:  # in the first, vLLM's loaders run
            longest = [max(a, t[3]) for a, t in zip(longest, told)]
    generator.cfg.check_weights = True
    weights.sync(trainer, generator, world)
    plain = wire(world, size, generator.dtype, colocated)
    found = {"shape": args.shape, "topology": args.topology, "bytes": size, "busy": busy}
    found |= {
        "first_s": seconds[0],
        "seconds": seconds[1:],
        "plain_s": plain,
        "extra_bytes": longest,
    }
    found["card"] = torch.cuda.get_device_name() if world.cuda else "CPU"
    if world.rank == 0:
        ms, median = [x * 1e3 for x in seconds[1:]], statistics.median(seconds[1:])
        name = f"{args.shape}-{args.topology}-{args.bucket_mb}"
        (args.out / f"sync-{name}.json").write_text(json.dumps(found))
        cells = [args.shape, f"{args.topology}, buckets of {args.bucket_mb} MiB"]
        cells += [f"{size / 1e9:.2f} GB", f"{median * 1e3:.1f} ({min(ms):.1f} to {max(ms):.1f}) ms"]
        cells += [
            f"plain {plain * 1e3:.1f} ms, {size / plain / 1e9:.0f} GB/s, {plain / median:.0%}"
        ]
        cells += [f"first {seconds[0]:.2f} s", f"extra {max(longest) / 2**30:.2f} GiB"]
        cells += [f"{max(t[4] for t in told)} rows", found["card"]]
        print("| " + " | ".join(cells) + " |", flush=True)
    world.close()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
