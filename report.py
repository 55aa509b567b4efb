"""A run folder drawn: the curves of metrics.jsonl as a PNG.

python report.py runs/grpo
"""

import json
import pathlib
import sys


def curves(folder: pathlib.Path):
    """Draw reward (or loss) per step and held-out accuracy with its standard error: curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows, evals = ([x for x in lines if ("eval_reward" in x) == kind] for kind in (False, True))
    key = "reward" if "reward" in rows[-1] else "loss"
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    axis.plot([r["step"] for r in rows], [r[key] for r in rows], label=f"{key} (sampled)")
    if evals:
        step, mean, error = ([e[k] for e in evals] for k in ("step", "eval_reward", "eval_stderr"))
        axis.errorbar(step, mean, error, marker="o", capsize=2, label="held-out accuracy (greedy)")
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
