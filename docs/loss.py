"""What the loss does: each loss and its push on the log-prob, drawn against the ratio.

    python docs/loss.py                         # docs/loss.png, and the numbers of docs/loss.md
    python docs/loss.py --loss=grpo,my_file.py:my_loss

Drawn from the functions in losses.py (or a file of yours), with each loss's own clip: one sampled
token, which the old policy gave the log-prob -1 and the present one -1 + log(ratio).
"""

import argparse
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import losses
from rollouts import Rollouts

OLD = -1.0  # log-prob of the token under the policy that sampled it


def settings(name: str) -> grpo.Config:
    cfg = grpo.Config(loss=name)
    grpo.find_loss(cfg)
    return cfg


def values(name: str, ratio: torch.Tensor, advantage: float):
    """Ratios (N,) -> the loss of a token with each, and its push: minus the derivative of the loss
    by the log-prob of the present policy. (N,) each.
    """
    cfg, n = settings(name), len(ratio)
    rows = Rollouts.blank(1, 1)
    rows.logprobs, rows.advantage = torch.full((1, 1), OLD), torch.full((1, 1), advantage)
    rows.mask, rows.weight, rows.share = ~rows.mask, rows.weight + 1, rows.share + 1
    rows.logprobs = rows.logprobs.to(ratio.dtype)
    loss, push = torch.zeros(n), torch.zeros(n)
    for i, r in enumerate(ratio):
        logprob = (OLD + r.log()).view(1, 1).requires_grad_()
        value, _ = grpo.find_loss(cfg)(logprob, rows, cfg)
        loss[i], push[i] = value.detach(), -torch.autograd.grad(value, logprob)[0][0, 0]
    return loss, push


def table(names: list[str]) -> str:
    """The push at a few ratios."""
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 4.0], dtype=torch.float64)
    lines = ["| loss | A | " + " | ".join(f"{r:g}" for r in ratio) + " |"]
    lines.append("|" + "---|" * (len(ratio) + 2))
    for name in names:
        for advantage in (1.0, -1.0):
            push = values(name, ratio, advantage)[1]
            cells = " | ".join(f"{p + 0.0:.2f}" for p in push)
            lines.append(f"| `{name}` | {advantage:+g} | {cells} |")
    return "\n".join(lines)


def draw(names: list[str], path: pathlib.Path):
    """A column for each loss: the loss, and below it the push, for A = 1 and A = -1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratio = torch.linspace(0.02, 6.0, 400, dtype=torch.float64)
    size = (1.9 * len(names), 4)
    how = {"sharex": True, "sharey": "row", "squeeze": False}
    figure, axes = plt.subplots(2, len(names), figsize=size, **how)
    for column, name in enumerate(names):
        for advantage, color in ((1.0, "C0"), (-1.0, "C3")):
            for axis, curve in zip(axes[:, column], values(name, ratio, advantage), strict=True):
                axis.plot(ratio, curve, color=color, label=f"A = {advantage:+g}")
                axis.axvline(1, color="0.8", linewidth=0.8, zorder=0)
                axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes[0, column].set_title(name, fontsize=10)
        axes[1, column].set_xlabel("ratio")
    axes[0, 0].set_ylabel("loss of the token")
    axes[1, 0].set_ylabel("push on its log-prob")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[1, 0].set_ylim(-6.2, 6.2)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", default=",".join(losses.LOSSES), help="names, or file.py:loss")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    names = args.loss.split(",")
    print(table(names))
    draw(names, args.out / "loss.png")


if __name__ == "__main__":
    main()
