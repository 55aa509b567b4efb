"""Every loss on the default task, and the ablations that teach: what they learn, over seeds.

    python benchmarks/learning.py OUT                       # all; resumes where it stopped
    python benchmarks/learning.py OUT --only=grpo,stale     # names or groups below
    python benchmarks/learning.py OUT --draw docs/learning.png

Each run is `torchrun --nproc_per_node=3 grpo.py` with the settings of its row. Prints the table of
benchmarks/RESULTS.md. Two runs at a time on two cores: no time in it means anything.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
STALE = {"max_policy_age": 4, "lr": 1e-3, "lr_schedule": "constant"}
RUNS = {  # group -> name -> settings that differ from the default
    "losses": {
        name: {"loss": name}
        for name in ("grpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "reinforce")
    },
    "4 updates a batch": {  # where the ratio leaves 1 and clips act
        f"{name} x 4": {"loss": name, "minibatches": 4, "lr": 3e-4}
        for name in ("grpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "reinforce")
    },
    "length": {
        "token mean": {"aggregation": "token"},
        "sequence mean": {"aggregation": "sequence"},
        "fixed": {"aggregation": "fixed"},
    },
    "advantage": {
        "mean and std": {"advantage": "mean_std"},
        "mean": {"advantage": "mean"},
        "leave one out": {"advantage": "leave_one_out"},
    },
    "stale": {
        "on-policy": {**STALE, "max_policy_age": 0},
        "age 4, ratio of 1": {**STALE, "old_policy": "trainer"},
        "age 4, truncated": {**STALE, "old_policy": "trainer", "correction": "truncate"},
        "age 4, true ratio": STALE,
    },
}


def torchrun(folder: pathlib.Path, settings: dict, seed: int):
    """One run to its end, unless its folder holds it already."""
    if not (folder / "model").exists():
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        options = [f"--{k}={v}" for k, v in settings.items()]
        subprocess.run(
            [*launcher, "--nproc_per_node=3", "grpo.py", f"--run_dir={folder}", f"--seed={seed}"]
            + ["--eval_every=0", *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            check=True,
        )
    return read(folder)


def read(folder: pathlib.Path) -> dict:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "reward" in r]
    return {
        "reward": [r["reward"] for r in steps],
        "length": [r["length"] for r in steps],
        "ess": [r["ess"] for r in steps],
        "accuracy": [r["eval_reward"] for r in rows if "eval_reward" in r][-1],
    }


def table(found: dict) -> str:
    lines = ["| group | run | seeds | reward, last 5 steps: mean, lowest, highest "]
    lines[0] += "| mean of all steps | steps to 0.9, median | greedy accuracy, mean | ess, mean |"
    lines.append("|" + "---|" * 8)
    for (group, name), runs in found.items():
        last = [statistics.mean(r["reward"][-5:]) for r in runs]
        whole = statistics.mean(statistics.mean(r["reward"]) for r in runs)
        first = [next((i for i, x in enumerate(r["reward"]) if x >= 0.9), 10**6) for r in runs]
        steps = statistics.median(first)
        lines.append(
            f"| {group} | {name} | {len(runs)} "
            f"| {statistics.mean(last):.3f}, {min(last):.3f}, {max(last):.3f} | {whole:.3f} "
            f"| {'never' if steps >= 10**6 else f'{steps:.0f}'} "
            f"| {statistics.mean(r['accuracy'] for r in runs):.3f} "
            f"| {statistics.mean(statistics.mean(r['ess']) for r in runs):.3f} |"
        )
    return "\n".join(lines)


def draw(found: dict, path: pathlib.Path):
    """A panel per group: mean over seeds, the band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(group for group, _ in found))
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.4), sharey=True)
    for axis, group in zip(axes if len(groups) > 1 else [axes], groups):
        for (of, name), runs in found.items():
            if of != group:
                continue
            steps = list(zip(*(r["reward"] for r in runs)))
            at = range(len(steps))
            axis.plot(at, [statistics.mean(s) for s in steps], label=name, linewidth=1.5)
            axis.fill_between(at, [min(s) for s in steps], [max(s) for s in steps], alpha=0.12)
        axis.set(title=group, xlabel="step", ylim=(0, 1.02))
        axis.legend(fontsize=7, loc="lower right")
        axis.grid(alpha=0.2)
    (axes if len(groups) == 1 else axes[0]).set_ylabel("sampled reward")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--draw", type=pathlib.Path)
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else []
    out = args.out.resolve()
    plan = {
        (group, name): settings
        for group, runs in RUNS.items()
        for name, settings in runs.items()
        if not wanted or group in wanted or name in wanted
    }
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs, seeds = {}, range(args.seeds)
        for seed in seeds:
            for settings in plan.values():
                folder = out / place(settings, seed)
                if folder not in jobs:
                    jobs[folder] = pool.submit(torchrun, folder, settings, seed)
        found = {
            key: [jobs[out / place(settings, seed)].result() for seed in seeds]
            for key, settings in plan.items()
        }
    print(table(found))
    if args.draw:
        draw(found, args.draw)


def place(settings: dict, seed: int) -> str:
    """Equal settings are one run, whatever they are called."""
    own = {"loss": "grpo", "aggregation": "token", "advantage": "mean_std"}
    own = own if settings.get("loss", "grpo") == "grpo" else {}
    told = {k: v for k, v in settings.items() if own.get(k) != v}
    return "-".join([*(f"{k}={v}" for k, v in told.items()), f"seed={seed}"])


if __name__ == "__main__":
    main()
