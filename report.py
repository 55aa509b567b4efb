"""How a run is shown: bar, end table, trace, curves of metrics.jsonl; tables kept on disk.

python report.py runs/grpo
"""

import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rollouts import Rollouts


def read_lines(path: pathlib.Path) -> list[dict]:
    """The objects of a .jsonl file. A last line without its end was torn by a kill: left out."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def judged_by(row: dict) -> str:
    """What the held-out reward of a run is, by one of its rows: several functions have a sum."""
    return "reward" if any(name.startswith("reward/") for name in row) else "accuracy"


def save_rollouts(table: Rollouts, path: pathlib.Path):
    """All columns as one safetensors file (`load_rollouts` reads a folder of them)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {f"rewards/{k}": v for k, v in table.rewards.items()}
    save_file({k: v.contiguous() for k, v in {**table.columns(), **named}.items()}, path)


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
    table = Rollouts()
    for name, values in columns.items():
        if name.startswith("rewards/"):
            table.rewards[name.removeprefix("rewards/")] = values[order]
        else:
            setattr(table, name, values[order])
    return table


def postfix(row: dict, evals: dict[int, tuple[float, float]]) -> dict[str, str]:
    """What stands behind the progress bar, by the last row and the latest held-out result."""
    shown = {k: f"{row[k]:.3f}" for k in ("reward", "loss") if k in row}
    if evals:
        name = "accuracy" if judged_by(row) == "accuracy" else "eval_reward"
        shown[name] = f"{evals[max(evals)][0]:.3f}"
    return {**shown, "tok/s": f"{row['tokens_per_second']:.0f}"}


def end_table(folder: pathlib.Path, rows: list[dict], evals: dict, tokens: float, seconds: float):
    """The lines that a person reads when a run has ended."""
    key = "reward" if "reward" in rows[-1] else "loss"
    values = [r[key] for r in rows]
    last = sum(values[-5:]) / len(values[-5:])
    lines = [("steps", f"{rows[0]['step']} to {rows[-1]['step']}")]
    lines.append((key, f"{values[0]:.3f} at first, {last:.3f} in the last 5 steps"))
    if evals:
        ends = evals[min(evals)], evals[max(evals)]
        before, after = (f"{mean:.3f} +- {error:.3f}" for mean, error in ends)
        lines.append((f"held-out {judged_by(rows[-1])}", f"{before} before, {after} after"))
    speed = f"{tokens / seconds:,.0f} tokens per second"
    lines.append(("time", f"{seconds / 60:.1f} minutes, {speed}"))
    lines.append(("results", f"{folder}/ (curves.png, metrics.jsonl, samples.jsonl)"))
    width = max(len(name) for name, _ in lines)
    return "\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines)


def append_spans(path: pathlib.Path, role: str, rank: int, spans: list[tuple[str, float, float]]):
    """A rank's (name, start, end) in the Chrome trace format, whose last bracket is optional."""
    events = [{"name": "process_name", "ph": "M", "args": {"name": f"{role} {rank}"}}]
    for name, start, end in spans:  # in microseconds
        events.append({"name": name, "ph": "X", "ts": start * 1e6, "dur": (end - start) * 1e6})
    with open(path, "a") as f:
        f.write("[\n" if f.tell() == 0 else "")
        f.writelines(json.dumps({**e, "pid": rank, "tid": 0}) + ",\n" for e in events)


def curves(folder: pathlib.Path):
    """Draw reward (or loss) per step, and held-out results with their error: curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_lines(folder / "metrics.jsonl")
    rows, evals = ([x for x in lines if ("eval_reward" in x) == kind] for kind in (False, True))
    key = "reward" if "reward" in rows[-1] else "loss"
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    axis.plot([r["step"] for r in rows], [r[key] for r in rows], label=f"{key} (sampled)")
    if evals:
        step, mean, error = ([e[k] for e in evals] for k in ("step", "eval_reward", "eval_stderr"))
        axis.errorbar(
            step, mean, error, marker="o", capsize=2, label=f"held-out {judged_by(rows[-1])}"
        )
    if heldout := [r for r in rows if "eval_loss" in r]:
        axis.plot(
            [r["step"] for r in heldout],
            [r["eval_loss"] for r in heldout],
            "o-",
            label="held-out loss",
        )
    top = max(r[key] for r in rows)
    axis.set(xlabel="step", ylim=(0, 1.02) if key == "reward" and top <= 1 else (0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(folder / "curves.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    curves(pathlib.Path(sys.argv[1]))
