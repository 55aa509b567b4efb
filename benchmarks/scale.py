"""How far it goes: many gloo ranks on one machine, and a model of cost for more.

    python benchmarks/scale.py paper                    # the tables of scale.md, from formulas
    python benchmarks/scale.py connect 8 16 32 64       # groups alone: seconds and sockets a rank
    python benchmarks/scale.py run OUT 16 32            # the default task on so many ranks

`connect` and `run` are checks of behaviour, on two cores: their seconds are mostly Python's.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

GROUPS = 3  # gloo groups of all ranks: the default one, control, arrivals
ROUND = 30e-6  # seconds that a small message takes between nodes, over TCP
SMALL = 10e-6  # seconds of processor time to send or receive one
STORE = 25_000  # requests a second that torchrun's store answers (one thread)
FAULTS = 419 / 54 / 16_384  # unexpected interruptions, per GPU and day (arXiv 2407.21783, 3.3.4)
NODE = 50e9  # bytes a second into a node of 8 GPUs (400 Gbit/s)


def paper():
    """A step of a 32B model (bf16 on its way), 1,024 rows of 4,000 tokens, 128 prompts."""
    rows, tokens, prompts, weights = 1024, 4000, 128, 64e9
    sizes = (8, 64, 512, 1024, 4096)
    lines = {
        "ranks per engine: engines + trainers": [],
        "barriers (2): seconds": [],
        "headers and sizes, rings (2): seconds": [],
        "all-to-all (2): messages a rank": [],
        "all-to-all: seconds": [],
        "small columns: MB into a rank": [],
        "token columns: MB out of an engine": [],
        "what ranks tell the writer: MB": [],
        "weights: seconds on the wire": [],
        "store: requests a step": [],
        "store: seconds of it": [],
        "sockets of a rank, not lazy": [],
        "sockets of a rank, lazy": [],
        "addresses at start, not lazy: GB through the store": [],
        "addresses at start, lazy: MB": [],
        "chance of a fault a day": [],
    }
    for ranks in sizes:
        engines = max(ranks // 2 // 8, 1)
        generators = engines * 8 if ranks > 8 else 4
        store = prompts + engines
        values = [
            f"{generators // engines}: {engines} + {ranks - generators}",
            f"{2 * math.ceil(math.log2(ranks)) * ROUND:.4f}",
            f"{2 * (ranks - 1) * ROUND:.3f}",
            f"{2 * (ranks - 1):,}",
            f"{2 * 2 * (ranks - 1) * SMALL:.3f}",
            f"{rows * 9 * 8 / 1e6:.2f}",
            f"{rows / engines * tokens * 20 / 1e6:.1f}",
            f"{ranks * 2e3 / 1e6:.2f}",
            f"{weights / NODE:.1f}",
            f"{store}",
            f"{store / STORE:.3f}",
            f"{GROUPS * (ranks - 1):,}",
            f"{ranks - 1:,}",
            f"{GROUPS * ranks * ranks * ranks * 64 / 1e9:,.2f}",
            f"{GROUPS * ranks * ranks * 64 / 1e6:,.1f}",
            f"{1 - math.exp(-FAULTS * ranks):.1%}",
        ]
        for line, value in zip(lines.values(), values, strict=True):
            line.append(value)
    print("| ranks | " + " | ".join(f"{n:,}" for n in sizes) + " |\n|" + "---|" * (len(sizes) + 1))
    for name, line in lines.items():
        print(f"| {name} | " + " | ".join(line) + " |")


RANK = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from runtime import World
start = time.time()
world = World(2)
world.connect()
world.arrive("all")
took = time.time() - start
from rollouts import Rollouts, gather
for _ in range(3):
    begin = time.time()
    gather(Rollouts(), world, 64)
sockets = sum(os.path.exists(p) and os.readlink(p).startswith("socket")
              for p in (f"/proc/self/fd/{{f}}" for f in os.listdir("/proc/self/fd")))
if world.rank == 0:
    print(json.dumps([took, time.time() - begin, sockets]))
world.close()
sys.stdout.flush()
os._exit(0)
"""


def launch(ranks: int, *command: str, lazy: bool = True) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_GLOO_LAZY_INIT": str(int(lazy))}
    whole = [*launcher, f"--nproc_per_node={ranks}", *command]
    done = subprocess.run(whole, cwd=HERE.parent, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def connect(sizes: list[int]):
    print("| ranks | lazy | all groups, seconds | an empty gather, s | sockets of rank 0 |")
    print("|" + "---|" * 5)
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(RANK.format(root=str(HERE.parent)))
        script.flush()
        for ranks in sizes:
            for lazy in (True, False):
                took, gather, sockets = json.loads(launch(ranks, script.name, lazy=lazy))
                print(f"| {ranks} | {lazy} | {took:.1f} | {gather:.3f} | {sockets} |", flush=True)


def memory() -> float:
    """GB of all grpo.py processes here; what they share is counted once (PSS)."""
    total = 0
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if b"grpo.py" in (path / "cmdline").read_bytes():
                rollup = (path / "smaps_rollup").read_text()
                total += int(rollup.partition("\nPss:")[2].split()[0])  # kB
        except (OSError, IndexError):
            continue
    return total / 2**20


def run(out: pathlib.Path, sizes: list[int]):
    from topologies import GROUP, PROMPTS, read_back

    print(
        "| ranks | engines + trainers | each group once, in its age, weights proven | to the first "
        "step, s | step, s | sync, s | trainers wait | GB in all | reward of 3 steps |\n|"
        + "---|"
        * 9
    )
    for ranks in sizes:
        engines, folder = ranks // 8, out.resolve() / str(ranks)
        args = [f"--num_generators={engines}", "--max_policy_age=1", "--steps=3", "--eval_size=16"]
        args += ["--check_weights=true", "--save_rollouts=true", f"--run_dir={folder}"]
        args += [
            f"--prompts_per_step={PROMPTS}",
            f"--group_size={GROUP}",
            f"--trainer_replicas={COPIES}",
        ]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_GLOO_LAZY_INIT": "1"}
        command = [*launcher, f"--nproc_per_node={ranks}", "grpo.py", *args]
        start, most = time.time(), 0.0
        with subprocess.Popen(command, cwd=HERE.parent, env=env, stderr=subprocess.DEVNULL) as job:
            while job.poll() is None:
                most = max(most, memory())
                time.sleep(2)
        if job.returncode:
            raise SystemExit(f"{ranks} ranks failed: see {folder}/log")
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [x for x in lines if "reward" in x]
        read = read_back(folder, 3, 1, ranks, 1)
        kept = "yes" if read["once"] and read["in_age"] and read["proven"] else "NO"
        first, rewards = rows[0]["step_s"], ", ".join(f"{x['reward']:.2f}" for x in rows)
        mean = {k: sum(x[k] for x in rows[1:]) / 2 for k in ("step_s", "sync_s", "idle_trainer_s")}
        print(
            f"| {ranks} | {engines} + {ranks - engines} | {kept} | {first:.0f} "
            f"| {mean['step_s']:.1f} | {mean['sync_s']:.2f} "
            f"| {mean['idle_trainer_s'] / mean['step_s']:.0%} | {most:.0f} "
            f"| {rewards} |",
            flush=True,
        )
        print(f"{time.time() - start:.0f} s in all", file=sys.stderr)


COPIES = 2  # of the model: HSDP, half of the trainers each

if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["paper"]
    if what == "paper":
        paper()
    elif what == "connect":
        connect([int(n) for n in rest])
    else:
        run(pathlib.Path(rest[0]), [int(n) for n in rest[1:]])
