"""Why asynchrony works: who did what when at age 0 and at age 1, and what it costs.

    torchrun --nproc_per_node=3 grpo.py --run_dir=runs/age0
    torchrun --nproc_per_node=3 grpo.py --run_dir=runs/age1 --max_policy_age=1
    python docs/asynchrony.py runs/age0 runs/age1       # docs/asynchrony.png, and a table

The timeline is trace.json's, of steps in the middle of each run; the curves are metrics.jsonl's.
"""

import argparse
import json
import pathlib
import statistics
import sys

import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from report import read_lines

# Span -> what it is called here. What is inside another span is drawn over it.
NAMES = {"collect": "generate", "train": "train", "sync": "sync", "gather": "gather"}
NAMES |= {"arrive sync": "wait", "arrive gather": "wait", "save": "save"}
COLORS = {"generate": "C0", "train": "C1", "sync": "C2", "gather": "C4", "wait": "0.85"}
COLORS |= {"save": "C5", "arrive, rows go on": "#a6cee3"}


def spans(folder: pathlib.Path) -> tuple[dict[int, str], list[tuple[int, str, float, float]]]:
    """rank -> its role; (rank, name, start, end) of the spans that are drawn, in seconds."""
    text = (folder / "trace.json").read_text()
    events = json.loads(text.rstrip().rstrip(",") + "]")
    roles = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    age = yaml.safe_load((folder / "config.yaml").read_text())["max_policy_age"]
    rows = []
    for e in (e for e in events if e["ph"] == "X" and e["name"] in NAMES):
        name = NAMES[e["name"]]
        if name == "wait" and age and roles[e["pid"]].startswith("generator"):
            name = "arrive, rows go on"  # while the trainers are not yet there
        rows.append((e["pid"], name, e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6))
    return roles, sorted(rows, key=lambda r: r[2] - r[3])  # the longest first


def steps_of(folder: pathlib.Path) -> list[dict]:
    return [x for x in read_lines(folder / "metrics.jsonl") if "reward" in x]


def middle(rows: list, steps: int) -> tuple[float, float]:
    """Start and end of `steps` steps around the middle of the run, by the last rank's syncs."""
    last = max(rank for rank, *_ in rows)
    starts = sorted(start for rank, name, start, _ in rows if rank == last and name == "sync")
    first = max(0, (len(starts) - steps) // 2)
    return starts[first], starts[min(first + steps, len(starts) - 1)]


def table(folders: list[pathlib.Path]) -> str:
    """Medians over the steps after the first, which holds the start."""
    names = ["step_s", "generate_s", "train_s", "sync_s", "idle_generator_s", "idle_trainer_s"]
    names += ["policy_age", "policy_age_max", "mismatch_kl", "ratio_max", "tokens_per_second"]
    lines = ["| run | " + " | ".join(f"`{n}`" for n in names) + " | reward, last 5 |"]
    lines.append("|" + "---|" * (len(names) + 2))
    for folder in folders:
        steps = steps_of(folder)
        cells = [f"{statistics.median(s[n] for s in steps[1:]):.3g}" for n in names]
        reward = statistics.mean(s["reward"] for s in steps[-5:])
        lines.append(f"| {folder.name} | " + " | ".join(cells) + f" | {reward:.3f} |")
    return "\n".join(lines)


def draw(folders: list[pathlib.Path], path: pathlib.Path, steps: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 1.5 * len(folders) + 2.4))
    grid = figure.add_gridspec(len(folders) + 1, 3, height_ratios=[1.3] * len(folders) + [2])
    taken = [(folder, *spans(folder)) for folder in folders]
    limits = [middle(rows, steps) for _, _, rows in taken]
    width = max(end - start for start, end in limits)
    for k, ((folder, roles, rows), (origin, end)) in enumerate(zip(taken, limits, strict=True)):
        axis = figure.add_subplot(grid[k, :])
        for rank, name, start, stop in rows:
            if stop > origin and start < origin + width:
                bar = [(start - origin, stop - start)]
                axis.broken_barh(bar, (rank - 0.4, 0.8), facecolors=COLORS[name])
        axis.axvline(end - origin, color="k", linewidth=1)
        axis.set(yticks=list(roles), yticklabels=list(roles.values()), xlim=(0, width))
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.set_title(f"{folder.name}: {steps} steps end at the line", fontsize=9, loc="left")
    axis.set_xlabel("seconds", fontsize=8)
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(patches, COLORS, ncols=len(COLORS), fontsize=8, loc="upper right", frameon=False)
    for k, name in enumerate(("reward", "policy_age", "mismatch_kl")):
        axis = figure.add_subplot(grid[len(folders), k])
        for folder in folders:
            rows = steps_of(folder)
            axis.plot([r["step"] for r in rows], [r[name] for r in rows], label=folder.name)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.2)
        if name == "mismatch_kl":
            axis.set_yscale("log")
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=pathlib.Path, help="run folders, one per age")
    parser.add_argument("--steps", type=int, default=3, help="in the timeline")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    print(table(args.folders))
    draw(args.folders, args.out / "asynchrony.png", args.steps)


if __name__ == "__main__":
    main()
