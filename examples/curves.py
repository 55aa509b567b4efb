"""curves.png, which each run draws at its end. To draw others edit it, then

python examples/curves.py runs/grpo
"""

import json
import pathlib
import sys


def curves(folder: pathlib.Path):
    """Draw reward (or loss) per step, and held-out results with their error: curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = (folder / "metrics.jsonl").read_text()  # a last line without its end was torn by a kill
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    rows, evals = ([x for x in lines if ("eval_reward" in x) == kind] for kind in (False, True))
    key = "reward" if "reward" in rows[-1] else "loss"
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    axis.plot([r["step"] for r in rows], [r[key] for r in rows], label=f"{key} (sampled)")
    if evals:
        points = ([e[k] for e in evals] for k in ("step", "eval_reward", "eval_stderr"))
        axis.errorbar(*points, marker="o", capsize=2, label=f"held-out {key}")
    if heldout := [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]:
        axis.plot(*zip(*heldout), "o-", label="held-out loss")
    top = max(r[key] for r in rows)
    axis.set(xlabel="step", ylim=(0, 1.02) if key == "reward" and top <= 1 else (0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(folder / "curves.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    curves(pathlib.Path(sys.argv[1]))
