"""What a run leaves behind: its folder, its lines on the screen, its checkpoints' names."""

import gc
import itertools
import os
import pathlib
import shutil
import threading
import time

import report
from heartbeat import HEART


class Run:
    """The run folder. Every rank has one (its log); only the first trainer writes the rest."""

    def __init__(self, cfg, world):
        self.cfg, self.world, self.bar, self.started = cfg, world, None, time.time()
        self.folder, self.last_save = pathlib.Path(cfg.run_dir), time.time()
        self.clocks: dict[int, dict] = {}  # rank -> its clock at the last step
        self.rows: list[dict] = []  # the lines of metrics.jsonl that the end table needs
        self.evals: dict[int, tuple[float, float]] = {}  # version -> mean and standard error
        self.partial: dict[int, list[float]] = {}  # version -> rewards of the problems so far
        self.tokens = 0  # since this start: a resumed run's earlier lines have other seconds
        self.finished, self.finishing = False, threading.Lock()  # a signal's thread may finish too
        self.screen = os.fdopen(os.dup(2), "w", buffering=1)
        self.restarted = world.restart > 0 and world.store.check(["nanoforge/folder"])  # came here
        self.checkpoint = world.agree(self.choose_checkpoint() if world.writes else None)
        world.store.set("nanoforge/folder", "chosen")
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        self.log_file = self.folder / "log" / f"rank{world.rank}.log"
        log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)  # torch's, vLLM's and our own chatter, C++ included
        self.live = report.Live(self)
        if world.writes:
            report.write_config(self.folder, cfg, world.size)

    def choose_checkpoint(self) -> str | None:
        """Where this run starts from. An earlier run that it does not go on is set aside. A restart
        by torchrun goes on in its folder, before its first checkpoint from the given one."""
        given = None if self.cfg.resume in ("no", "auto") else self.cfg.resume
        restarted, newest = self.restarted, latest_checkpoint(self.folder)
        if newest and (restarted or self.cfg.resume == "auto"):
            return newest
        if self.cfg.resume == "auto":
            self.say(f"resume=auto: no checkpoint in {self.folder}, starting at step 0")
        inside = given and self.folder.resolve() in pathlib.Path(given).resolve().parents
        if not restarted and not inside and (self.folder / "config.yaml").exists():
            kept = (pathlib.Path(f"{self.folder}.{k}") for k in itertools.count(1))
            kept = next(path for path in kept if not path.exists())
            self.folder.rename(kept)
            self.say(f"{self.folder} held an earlier run: it is now {kept}")
        return given

    def say(self, text: str):
        """A line for the person at the screen."""
        if self.bar is not None:
            self.bar.clear()
        self.screen.write(text + "\n")

    def truncate(self, start: int):
        """Forget the lines of steps that will be done again, and set their checkpoints aside."""
        for path in self.folder.glob("checkpoints/step-*"):
            if step_of(path) > start:
                path.rename(path.with_name(f"aside-{time.time_ns()}-{path.name}"))
        for path in [p for p in self.folder.glob("rollouts/*") if int(p.name) >= start]:
            shutil.rmtree(path)
        report.forget(self, start)

    def resume(self, trainer) -> int:
        """Load the checkpoint to start from; returns the first step. One that cannot be loaded is
        named, and the one before it here is taken, or the run stops. Collective."""
        began = self.checkpoint or self.restarted
        while self.checkpoint:
            path = pathlib.Path(self.checkpoint).resolve()  # `best` is a link
            own, problem = path.parent.parent == self.folder.resolve(), None
            if self.world.writes:
                problem = trainer.problem(path) or (self.unjudged(path) if own else "")
            if not (problem := self.world.agree(problem)):
                trainer.load(path)
                break
            before = latest_checkpoint(self.folder, step_of(path)) if own else None
            self.checkpoint = self.world.agree(before)
            if not self.checkpoint:  # from step 0 it would write over the run that is here
                raise ValueError(f"{path}: {problem}; --resume=no sets aside what is here")
            if self.world.writes:
                self.say(f"{path}: {problem}; going on from {self.checkpoint}")
        start = self.world.agree(trainer.version)
        if self.world.writes and began:
            self.truncate(start)
        gc.collect(), HEART.enter("the loop")  # what loading left goes, before `log` freezes all
        return start

    def unjudged(self, path: pathlib.Path) -> str:
        """Whether the evaluation of the version before, which goes on beside the step that follows,
        was lost with the run. The checkpoint before, if there is one, makes it again."""
        version, cfg, metrics = step_of(path) - 1, self.cfg, self.folder / "metrics.jsonl"
        judges = getattr(cfg, "eval_samples", 0) and cfg.eval_size and cfg.eval_every
        wanted = self.checkpoint == cfg.resume or (path / "stopped").exists()
        if wanted or not judges or version % judges:
            return ""
        lines = report.read_lines(metrics) if metrics.exists() else []
        judged = version in {x["step"] for x in lines if "eval_reward" in x}
        judged = judged or not latest_checkpoint(self.folder, version + 1)
        return "" if judged else f"version {version} was not yet judged"

    def save(self, trainer, step: int):
        """Every `save_every` steps and `save_minutes`. Collective over trainers."""
        trainer.saved(wait=False)
        if self.world.saves or self.cfg.save_every and step % self.cfg.save_every == 0:
            self.last_save = time.time()
            trainer.save(self.folder / "checkpoints", self.prune)
        minutes = (time.time() - self.last_save) / 60
        self.world.due = 0 < self.cfg.save_minutes <= minutes  # `gather` tells the others

    def prune(self):
        """The newest checkpoints stay, and the best by what was held out: `best` points at it."""
        place = self.folder / "checkpoints"
        found = sorted(filter(is_checkpoint, place.glob("step-*")), key=step_of)
        scores = {r["step"] + 1: -r["eval_loss"] for r in self.rows if "eval_loss" in r}
        scores |= {version: mean for version, (mean, _) in self.evals.copy().items()}
        judged = [path for path in found if step_of(path) in scores]
        best = max(judged, key=lambda path: scores[step_of(path)], default=None)
        if best:
            (link := place / "new-best").unlink(missing_ok=True)
            link.symlink_to(best.name)
            link.rename(place / "best")
        for path in found[: -self.cfg.keep_checkpoints] if self.cfg.keep_checkpoints else ():
            if path != best:
                shutil.rmtree(path.rename(path.with_name(f"partial-{path.name}")))

    def stopped(self, trainer, step: int, rollouts):
        """The run was told to stop: everything that was learned is saved. Collective."""
        self.log(step, {}, rollouts)  # evaluations that ended meanwhile
        with self.world.span("save"):
            if trainer.version > 0:
                mark = self.folder / f"checkpoints/step-{step}/stopped"  # for `unjudged`
                trainer.save(self.folder / "checkpoints", lambda: (mark.touch(), self.prune()))
                trainer.saved()
            self.world.agree(None)
        if self.world.writes:
            resume = "--resume=auto goes on from there" if trainer.version else "nothing to save"
            self.say(f"\nstopped before step {step}; {resume}")

    def log(self, step: int, metrics: dict, rollouts):
        """Write one step: metrics, samples, evaluations, spans of all ranks. No collective."""
        if not gc.isenabled():  # what is there now stays: it need never be looked through again
            gc.freeze(), gc.enable()
        self.live.before(step + 1)
        report.log(self, step, metrics, rollouts)

    def finish(self, says: bool = True):
        """The bar's end and the table that a person reads; not behind a failure that was said."""
        with self.finishing:
            if not self.world.writes or not self.rows or self.finished:
                return
            self.finished = True
            if self.bar is not None:
                self.bar.close()
                self.bar = None
            if says:
                self.say(report.end_table(self))
            self.live.close()


def is_checkpoint(folder: pathlib.Path) -> bool:
    return (folder / "about.json").exists()  # written last


def step_of(checkpoint: pathlib.Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def latest_checkpoint(run_folder: pathlib.Path, before: float = float("inf")) -> str | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted(filter(is_checkpoint, run_folder.glob("checkpoints/step-*")), key=step_of)
    return next((str(p) for p in found[::-1] if step_of(p) < before), None)
