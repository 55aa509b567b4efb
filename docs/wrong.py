"""What goes wrong: each experiment of docs/wrong.md, run and drawn.

    python docs/wrong.py OUT                       # all of them: a minute each on two cores
    python docs/wrong.py OUT --only=shift,fresh    # some
    python docs/wrong.py OUT --draw                # from what is in OUT, to docs/wrong.png

An experiment is a diff in the page. It is applied to a copy of the code in a temporary folder, and
the copy is run there with the experiment's settings; so is the code as it is. A run that OUT has is
not made again.
"""

import argparse
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import tasks
from examples.calculator import Calculator
from report import read_lines

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs/wrong.md"
PARTS = ("*.py", "examples", "docs/*.py", "assets")  # of the code that a copy needs


class Repeated(tasks.Task):
    """Sixteen prompts that each step asks again, each longer than a block of the engine's cache."""

    def __init__(self, cfg):
        super().__init__(cfg)
        rng = random.Random("repeated")
        self.train = [{"prompt": "".join(rng.choices("0123456789", k=150))} for _ in range(16)]
        self.heldout, self.rewards = self.train[:1], [self.variety]

    def variety(self, episode: tasks.Episode) -> float:
        """Share of the ten digits that the reply has."""
        return len(set(episode.text) & set("0123456789")) / 10


class Generous(Calculator):
    """The calculator, but each reply has ten more: a right one 11, a wrong one 10."""

    def correct(self, episode: tasks.Episode) -> float:
        return super().correct(episode) + 10


@dataclass
class Experiment:
    name: str
    diff: str
    settings: list[str]  # of both runs
    sft: bool  # the changed code first makes the model, as `sft.py` made the shipped one
    watch: str  # the metric that gives it away


def experiments(page: str) -> dict[str, Experiment]:
    """A paragraph that begins with a bold name, and the diff below it."""
    found = {}
    for name, about, diff in re.findall(
        r"^\*\*(\w+)\.\*\* (.*?)```diff\n(.*?)```", page, re.M | re.S
    ):
        settings = re.search(r"With `([^`]*)`", about)
        watch = re.search(r"Watch `(\w+)`", about)[1]
        settings = settings[1].split() if settings else []
        found[name] = Experiment(name, diff, settings, "First `sft.py`" in about, watch)
    return found


def copy_code(folder: pathlib.Path, diff: str = ""):
    """The code in another folder, with a diff applied to it."""
    for pattern in PARTS:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, target)
    if diff:
        command = ["git", "apply", "--unidiff-zero", "-"]  # finds a line that has moved
        subprocess.run(command, cwd=folder, input=diff, text=True, check=True)


def torchrun(folder: pathlib.Path, ranks: int, *words: str) -> str:
    """A script in a copy of the code, to its end -> what it said where it failed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command, env = [*launcher, f"--nproc_per_node={ranks}", *words], {"OMP_NUM_THREADS": "1"}
    env |= os.environ
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return "\n".join(x for x in done.stderr.splitlines() if x.startswith("nanoforge:"))


def run(out: pathlib.Path, diff: str, settings: list[str], sft: bool = False, ranks: int = 3):
    """grpo.py with a diff applied, to its end or its failure, unless `out` has it."""
    if (out / "done").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        copy_code(pathlib.Path(folder), diff)
        if sft:
            torchrun(folder, 2, "sft.py", f"--run_dir={folder}/sft", "--eval_size=0")
            settings = [*settings, f"--model={folder}/sft/model"]
        kept = [f"--run_dir={out}", "--save_every=0", "--eval_every=0", "--log_samples=0"]
        said = torchrun(folder, ranks, "grpo.py", *kept, *settings)
    print(f"{out.name}: {said or 'ran to its end'}", flush=True)
    (out / "done").write_text(said)


def place(out: pathlib.Path, settings: list[str]) -> pathlib.Path:
    """Where the run of the unchanged code with these settings is."""
    name = "-".join(["right", *(x.removeprefix("--").replace("/", "_") for x in settings)])
    return (out / name).resolve()


def steps_of(folder: pathlib.Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [x for x in read_lines(path) if "reward" in x] if path.exists() else []


def draw(out: pathlib.Path, found: list[Experiment], path: pathlib.Path):
    """Each experiment: its reward, below it what gives it away; grey is the code as it is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    columns = min(5, len(found))
    blocks = -(-len(found) // columns)
    size = (2.5 * columns, 3.3 * blocks)
    figure, axes = plt.subplots(2 * blocks, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for i, e in enumerate(found):
        block, column = divmod(i, columns)
        for row, metric in enumerate(("reward", e.watch)):
            axis = axes[2 * block + row, column]
            axis.set_visible(True)
            for folder, style in ((place(out, e.settings), "0.6"), (out / e.name, "C3")):
                rows = steps_of(folder)
                axis.plot([r["step"] for r in rows], [r[metric] for r in rows], color=style)
            axis.tick_params(labelsize=6)
            axis.grid(alpha=0.2)
            axis.set_ylabel(metric, fontsize=7)
            if row == 0:
                axis.set_title(e.name, fontsize=9)
                axis.set_ylim(0 if axis.get_ylim()[1] < 2 else None, None)
            elif e.watch.startswith(("mismatch", "ratio")):
                axis.set_yscale("log")
    figure.tight_layout(pad=0.6)
    figure.savefig(path, dpi=90)
    Image.open(path).convert("RGB").quantize(32).save(path, optimize=True)


def table(out: pathlib.Path, found: list[Experiment]) -> str:
    """First step, and mean of the last five, of the reward and of what gives it away."""
    lines = ["| experiment | reward, last 5 | as it is | watched | last 5 | as it is |"]
    lines.append("|" + "---|" * 6)
    for e in found:
        runs = [steps_of(f)[-5:] for f in (out / e.name, place(out, e.settings))]
        mean = lambda rows, k: f"{sum(r[k] for r in rows) / max(len(rows), 1):.3g}"  # noqa: E731
        cells = [mean(rows, k) for k in ("reward", e.watch) for rows in runs]
        lines.append(
            f"| {e.name} | {cells[0]} | {cells[1]} | `{e.watch}` | {cells[2]} | {cells[3]} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--steps", type=int, default=0, help="fewer than the default's, to try")
    parser.add_argument("--draw", action="store_true", help="draw docs/wrong.png")
    args = parser.parse_args()
    found, out = experiments(PAGE.read_text()), args.out.resolve()
    chosen = [found[name] for name in args.only.split(",")] if args.only else list(found.values())
    fewer = [f"--steps={args.steps}"] if args.steps else []
    for e in chosen:
        run(place(out, e.settings), "", e.settings + fewer)
        run(out / e.name, e.diff, e.settings + fewer, e.sft)
    print(table(out, chosen))
    if args.draw:
        draw(out, chosen, ROOT / "docs/wrong.png")


if __name__ == "__main__":
    main()
