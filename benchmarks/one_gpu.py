"""One GPU that generates and trains: memory and seconds of configs/grpo/one_gpu.yaml, with engines
that sleep while the trainer works, and that do not.

    python benchmarks/one_gpu.py OUT [--gigabytes=24] [--only=sleeps]

Qwen3-0.6B's shape with random weights and a tokenizer of its size, on the long-tailed task. The
engine's share is that of a card of so many gigabytes. Memory is the device's, sampled every 0.1 s.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time

import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

QWEN3 = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128)
HEADS = dict(num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True)


def watch(samples: list, done: threading.Event):
    while not done.is_set():
        free, total = torch.cuda.mem_get_info()
        samples.append((time.time(), (total - free) / 2**30))
        time.sleep(0.1)


def peak(samples: list, spans: list[dict], phase: str) -> float:
    """The largest sample, in GiB, inside the spans of that name."""
    mine = [(e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in spans if e["name"] == phase]
    inside = (gib for at, gib in samples for start, end in mine if start <= at <= end)
    return max(inside, default=float("nan"))


def main():
    from long_tail import word_model
    from topologies import events

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--gigabytes", type=float, default=24)
    parser.add_argument("--only", choices=list(ENGINES))
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = word_model(out / "model", 151_936, 2048, weights=False, **QWEN3, **HEADS)
    share = 0.45 * args.gigabytes * 1e9 / torch.cuda.mem_get_info()[1]
    torch.cuda.init()
    mine = None
    print("| engine | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for name, more in ENGINES.items():
        if args.only not in (None, name):
            continue
        folder, samples, done = out / name.replace(" ", "-"), [], threading.Event()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc_per_node=1", "grpo.py", "--config=configs/grpo/one_gpu.yaml"]
        command += [f"--model={model}", "--random_init=true", "--steps=4", f"--run_dir={folder}"]
        command += [f"--task={HERE.parent}/examples/long_tail.py:LongTail", "--save_every=0"]
        command += [
            f"--gpu_memory_utilization={share:.4f}",
            "--check_weights=true",
            "--eval_every=2",
        ]
        mine = mine or torch.cuda.mem_get_info()
        before = (mine[1] - mine[0]) / 2**30  # this process's own context
        thread = threading.Thread(target=watch, args=(samples, done))
        thread.start()
        ended = subprocess.run([*command, *more], cwd=HERE.parent, capture_output=True, text=True)
        done.set()
        thread.join()
        if ended.returncode:
            print(ended.stderr[-3000:])
            continue
        spans = events(folder)
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [x for x in lines if "reward" in x][1:]
        mean = {k: sum(x[k] for x in rows) / len(rows) for k in SECONDS}
        whole = max(gib for _, gib in samples) - before
        cells = [peak(samples, spans, phase) - before for phase in ("collect", "train")]
        cells += [whole, *mean.values()]
        worst = max(x["mismatch_kl"] for x in rows)
        print(
            f"| {name} | " + " | ".join(f"{c:.2f}" for c in cells) + f" | {worst:.5f} |", flush=True
        )


ENGINES = {"sleeps": [], "stays awake": ["--sleep=no"]}
SECONDS = ("step_s", "generate_s", "train_s", "sync_s", "other_trainer_s")
COLUMNS = ("GiB generating", "training", "at most", *SECONDS, "mismatch KL")

if __name__ == "__main__":
    main()
