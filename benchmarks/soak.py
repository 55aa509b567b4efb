"""The default run for half an hour, while every few minutes a random rank is killed.

    python benchmarks/soak.py OUT --minutes=30 --every=180

The run has as many steps as fit; torchrun restarts it (--max-restarts=20). Each rank's memory and
open files are read every 5 s from /proc. It prints the slope of each rank's memory between two
kills, in MiB an hour after its first minute, the range of its file handles, and the result, which
has to be that of a run without kills (run beside it with --minutes=0).
"""

import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent


def ranks_of(agent: int) -> dict[int, int]:
    """Rank -> process, of torchrun's children."""
    found = {}
    for pid in pathlib.Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        env = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(x[5:]): int(pid) for x in env if x.startswith(b"RANK=")}
    return found


def measure(pid: int) -> tuple[float, int]:
    """MiB of the process's own memory (RssAnon: without files that are shared), open files."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    own = next(line for line in text.splitlines() if line.startswith("RssAnon:"))
    return int(own.split()[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares, per hour."""
    return statistics.linear_regression(*zip(*points)).slope * 3600


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=180, help="seconds between kills")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=3", "--max-restarts=20", "grpo.py", f"--run_dir={args.out}"]
    command += [f"--steps={args.steps}", "--lr_schedule=constant", "--lr=3e-4"]
    rng, start, lives, kills = random.Random(0), time.monotonic(), {}, []
    with subprocess.Popen(command, cwd=ROOT) as torchrun:
        while torchrun.poll() is None:
            time.sleep(5)
            now = time.monotonic() - start
            try:
                ranks = ranks_of(torchrun.pid)
                for rank, pid in ranks.items():
                    lives.setdefault((rank, pid), []).append((now, *measure(pid)))
            except (OSError, StopIteration):
                continue  # a rank has just gone
            if now > args.minutes * 60:
                torchrun.send_signal(signal.SIGTERM)
                torchrun.wait()
            elif now > args.every * (len(kills) + 1) and len(ranks) == 3:
                rank = rng.choice(sorted(ranks))
                kills.append((round(now), rank))
                os.kill(ranks[rank], signal.SIGKILL)
    print(f"kills (second, rank): {kills}")
    for (rank, pid), points in sorted(lives.items()):
        late = [p for p in points if p[0] > points[0][0] + 60]
        if len(late) > 6:
            mib = slope([(t, m) for t, m, _ in late])
            files = [f for *_, f in late]
            size = f"{late[0][1]:.0f} -> {late[-1][1]:.0f} MiB ({mib:+.0f} MiB/h)"
            print(
                f"rank {rank} ({pid}), {late[-1][0] - late[0][0]:.0f} s: {size}, files {set(files)}"
            )
    lines = [json.loads(x) for x in (args.out / "metrics.jsonl").read_text().splitlines()]
    rewards = [x["reward"] for x in lines if "reward" in x]
    steps = [x["step"] for x in lines if "reward" in x]
    print(f"steps 0 to {steps[-1]}, each once: {steps == list(range(len(steps)))}")
    print(f"reward {rewards[0]:.3f}, last 20 steps {statistics.mean(rewards[-20:]):.3f}")


if __name__ == "__main__":
    main()
