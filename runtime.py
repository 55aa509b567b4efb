"""From the shell to the loop: settings, ranks and their groups, clocks, signals.

The only file that reads a rank. The others ask the `World` questions with names (`world.trains`,
`world.writes`), and nothing here knows what a model is.
"""

import contextlib
import dataclasses
import datetime
import difflib
import importlib.util
import inspect
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback
from operator import ge, gt, le, lt

import torch
import torch.distributed as dist

import report
from record import Run, is_checkpoint

LONG = datetime.timedelta(hours=24)  # groups never time out by themselves: a long reply is no fault


class UserError(Exception):
    """Something the user can mend. They read its message, one sentence, and no traceback."""


# ---------------------------------------------------------------- settings


def setting_help(config_class) -> dict[str, str]:
    """The comment behind each field of a dataclass, which is also the text of `--help`."""
    found = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(config_class), re.MULTILINE)
    return dict(found)


def settings(config_class, argv: list[str]):
    """Command line over YAML (`--config`) over defaults -> an instance of the flat dataclass.

    A name nobody knows, a wrong type or an unreadable file is a UserError of one sentence.
    """
    import jsonargparse  # 0.3 s: not paid by the ranks' other imports of this file

    how = {"exit_on_error": False, "allow_abbrev": False}
    parser = jsonargparse.ArgumentParser("torchrun SCRIPT", description=config_class.__doc__, **how)
    parser.add_argument("--config", action="config", help="YAML file with settings")
    parser.add_argument("--help-metrics", action=report.HelpMetrics)
    meaning, names = setting_help(config_class), [f.name for f in dataclasses.fields(config_class)]
    for f in dataclasses.fields(config_class):
        about = meaning.get(f.name, "")
        parser.add_argument(f"--{f.name}", type=f.type, default=f.default, help=about)
    try:
        values = parser.parse_args(argv).as_dict()
    except (jsonargparse.ArgumentError, TypeError, OSError) as error:
        text = " ".join(str(error).split())
        said = r"(?:[Uu]nrecognized arguments: --|[Kk]ey '|[Oo]ption '|not accepted: )([\w.]+)"
        if unknown := re.search(said, text):
            near = difflib.get_close_matches(unknown[1], names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; --help lists them all"
            raise UserError(f"there is no setting {unknown[1]!r}{hint}") from None
        raise UserError(text) from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config: this file is not UTF-8 text ({error})") from None
    if empty := [name for name in names if values[name] is None]:  # YAML's null
        raise UserError(f"{empty[0]}: it has no value")
    return config_class(**{name: values[name] for name in names})


LIMITS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}


def limits(cfg, **tables: dict[str, float]):
    """UserError for the first setting beyond its limit; none may be negative, listed or not."""
    numbers = [f.name for f in dataclasses.fields(cfg) if f.type in (int, float)]
    tables["at_least"] = dict.fromkeys(numbers, 0) | tables["at_least"]
    for kind, table in tables.items():
        for name, limit in table.items():
            if not LIMITS[kind](getattr(cfg, name), limit):  # NaN is beyond every limit
                must = f"must be {kind.replace('_', ' ')} {limit}"
                raise UserError(f"{name}={getattr(cfg, name)}: {must}")


def load_symbol(place: str, what: str):
    """`my_file.py:name` -> the object called `name` in that file, which is run once."""
    file, _, name = place.partition(":")
    path = pathlib.Path(file).resolve()
    if not path.exists():
        raise UserError(f"{what}={place}: there is no file {file}")
    key = "user_file_" + re.sub(r"\W", "_", str(path))  # in sys.modules: pickle looks there
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[key])
        except Exception as error:
            del sys.modules[key]
            frames = traceback.extract_tb(error.__traceback__)
            here = [frame.lineno for frame in frames if frame.filename == str(path)]
            line = here[-1] if here else getattr(error, "lineno", "?")  # no frame: a SyntaxError
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{what}={place}: {file}, line {line}: {reason}") from error
    if not name or not hasattr(sys.modules[key], name):
        how = f"write it as {file}:NAME with a NAME that the file defines"
        raise UserError(f"{what}={place}: {how}")
    return getattr(sys.modules[key], name)


# ---------------------------------------------------------------- ranks


class World:
    """Who this rank is, which groups it belongs to, and where its time went.

    Ranks 0..num_generators-1 generate (vLLM's tensor parallelism needs them first), the others
    train. With num_generators=0 every rank does both; with None (sft.py) nobody generates.
    """

    def __init__(self, num_generators=None, tensor_parallel_size=1, trainer_replicas=1):
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            command = f"torchrun --nproc_per_node=3 {os.path.basename(sys.argv[0])}"
            raise UserError(f"torchrun makes the ranks, so type: {command}")
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if (num_generators or 0) < 0 or tensor_parallel_size < 1:
            raise UserError("num_generators must be at least 0, tensor_parallel_size at least 1")
        if num_generators == 1 and self.size == 1:
            num_generators = 0
        first_trainer = num_generators or 0
        if first_trainer >= self.size:
            raise UserError(
                f"num_generators={first_trainer} leaves no rank to train: there are {self.size}"
            )
        if num_generators and num_generators % tensor_parallel_size:
            sizes = f"num_generators={num_generators}, tensor_parallel_size={tensor_parallel_size}"
            raise UserError(
                f"{sizes}: tensor_parallel_size ranks make an engine, and must divide the former"
            )
        if num_generators == 0 and tensor_parallel_size > 1:
            raise UserError(
                "tensor_parallel_size above 1 needs ranks of its own: set num_generators as well"
            )
        self.colocated = num_generators == 0
        trainers = self.trainer_ranks = list(range(first_trainer, self.size))
        self.first_trainer, self.num_trainers = first_trainer, len(trainers)
        shard, left = divmod(self.num_trainers, max(trainer_replicas, 1))
        if trainer_replicas < 1 or left:
            raise UserError(
                f"trainer_replicas={trainer_replicas} must divide the {self.num_trainers} trainers"
            )
        # Consecutive ranks hold the shards of one copy of the model, so they can be of one node.
        self.shards = [trainers[i : i + shard] for i in range(0, len(trainers), shard)]
        self.trains, self.writes = self.rank >= first_trainer, self.rank == first_trainer
        self.trainer_index = self.rank - first_trainer
        generators = trainers if self.colocated else list(range(first_trainer))
        self.generator_ranks = generators  # none in sft.py
        self.generates = self.rank in self.generator_ranks
        # An engine is a block of ranks that step together; only its first rank speaks for it.
        t = tensor_parallel_size
        self.engines = [generators[i : i + t] for i in range(0, len(generators), t)]
        self.engine_ranks = next((e for e in self.engines if self.rank in e), [])
        self.engine = self.engines.index(self.engine_ranks) if self.engine_ranks else -1
        # Who brings rows to `gather`: the first rank of each engine; without engines the first
        # trainer.
        alone = self.writes and num_generators is None
        self.leads = self.rank == self.engine_ranks[0] if self.engine_ranks else alone

        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if self.cuda else torch.device("cpu")
        self.stopping = False  # a signal came: finish what must not be torn, save, leave
        # Seconds since the start, each in one phase; since the last gather, (name, start, end).
        self.clock: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []
        self.since_epoch = time.time() - time.monotonic()  # a clock that is set back moves nothing
        self.phase, self.border = "start", time.monotonic() + self.since_epoch
        self.due = self.saves = False  # a checkpoint by the clock: for the writer, for everyone
        self.write = None  # of a checkpoint, in a thread beside the phases: a Future
        self.buckets = None  # how weights travel: planned by the first sync
        self.meanwhile = None  # run_until(done): what a generator does while it waits for others

    def connect(self):
        """Open the groups, in one order on every rank, before an engine is built. Collective."""
        if self.cuda:
            if self.colocated:  # freed memory goes back page by page: a waking engine needs it
                os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
            torch.cuda.set_device(self.device)
        backend, device_backend, where = "gloo", "gloo", {}
        if self.cuda:
            backend, device_backend = "cpu:gloo,cuda:nccl", "nccl"
        if self.restart != "0" and self.size == int(os.environ["LOCAL_WORLD_SIZE"]):
            # torchrun's store still has the addresses of ranks that died: a name of its own. (On
            # several nodes the counts of restarts may differ.)
            master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*master, is_master=False, timeout=LONG)
            where = {"store": dist.PrefixStore(f"restart {self.restart}", store)}
            where |= {"rank": self.rank, "world_size": self.size}
        # No device_id: an eagerly bound NCCL splits communicators, which takes every rank.
        dist.init_process_group(backend, timeout=LONG, **where)
        self.store = dist.distributed_c10d._get_default_store()

        def group(name, ranks, backend):
            return dist.new_group(ranks, backend=backend, timeout=LONG, group_desc=name)

        def own(name, blocks, backend):  # a group for each block; every rank makes them all
            made = {tuple(ranks): group(name, ranks, backend) for ranks in blocks}
            return next((made[ranks] for ranks in made if self.rank in ranks), None)

        everyone = list(range(self.size))
        self.control = group("control", everyone, "gloo")  # tables, headers, objects
        self.arrivals = group("arrivals", everyone, "gloo")  # non-blocking barriers, nothing else
        self.trainers = group("trainers", self.trainer_ranks, device_backend)
        self.savers = group("savers", self.trainer_ranks, "gloo")  # checkpoints, beside training
        self.mesh = [self.trainers]  # FSDP's group; with copies of the model HSDP's two
        if len(self.shards) > 1:
            same_shard = [list(ranks) for ranks in zip(*self.shards)]
            self.mesh = [own("mesh", b, device_backend) for b in (same_shard, self.shards)]
        weights = sorted({*self.generator_ranks, self.first_trainer})
        apart = bool(self.generator_ranks) and not self.colocated
        self.carries_weights = apart and self.rank in weights
        self.weights = group("weights", weights, device_backend)
        self.engine_group = own("engine", self.engines, "gloo")
        self.attempt = self.agree(time.time_ns())  # counters of an earlier one are not gone on with

    def arrive(self, name: str):
        """Wait for every rank; a generator goes on with its rows until all are here. Collective."""
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

    def count(self, name: str) -> int:
        """0, 1, 2, ... over all ranks: an atomic counter in torchrun's store."""
        return self.store.add(f"nanoforge/{self.attempt}/{name}", 1) - 1

    def writing(self) -> bool:
        """Whether something is being written that a signal should not cut short."""
        write = self.write  # once: the main thread may put None there meanwhile
        return self.phase in ("save", "export") or bool(write and not write.done())

    def has_failed(self) -> bool:
        """Whether some rank has said that it failed; False too if the store is gone."""
        with contextlib.suppress(Exception):
            return self.store.check([f"nanoforge/{self.attempt}/failures"])
        return False

    def lap(self, name: str | None = None):
        """The time since the last lap or border of a phase was spent on `name`, else on the phase:
        each second stands once in `clock`.
        """
        now, name = time.monotonic() + self.since_epoch, name or self.phase
        self.clock[name] = self.clock.get(name, 0.0) + now - self.border
        report.note_engine(self.spans, name, self.border, now)
        self.border = now

    @contextlib.contextmanager
    def span(self, name: str):
        """A phase, for `clock` (less the phases inside it) and the spans that become trace.json."""
        self.lap()
        before, self.phase, start = self.phase, name, self.border
        yield
        self.lap()
        self.phase = before  # not after an exception: its message names the phase it happened in
        self.spans.append((name, start, self.border))

    def close(self):
        """Leave together, so that nobody's group dies under another's last message."""
        if dist.is_initialized():
            dist.barrier(group=self.control)
            dist.destroy_process_group()


def make_world(cfg) -> World:
    names = ("num_generators", "tensor_parallel_size", "trainer_replicas")
    return World(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)})


# ---------------------------------------------------------------- start and end


def watch_signals(world: World, run: Run):
    """SIGTERM and Ctrl-C set `world.stopping`: the loop ends between two steps, with a checkpoint.

    A thread reads the signal from a pipe, because a main thread that is inside a collective never
    comes back to Python. If the loop has not ended after `stop_seconds` (a long step, or its peer
    is gone), the thread ends the process; a checkpoint or an export that has begun is awaited.
    torchrun has a limit of its own: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, 30 seconds.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch():
        os.read(read_end, 1)
        world.stopping = True
        end = time.monotonic() + run.cfg.stop_seconds
        while not world.has_failed() and (time.monotonic() < end or world.writing()):
            time.sleep(0.1)
        with contextlib.suppress(Exception):
            run.finish()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="signals").start()


def launch(main, config_class, check):
    """Everything around `main(cfg, world, run)`: settings, ranks, logs, and how it ends.

    `check(cfg, world)` raises UserError for settings that cannot work together. It runs before
    anything is loaded.
    """
    rank = int(os.environ.get("RANK", 0))
    world = run = None
    try:
        cfg = settings(config_class, sys.argv[1:])
        world = make_world(cfg)
        check(cfg, world)
        if problem := report.problem(cfg):
            raise UserError(problem)
        if cfg.resume not in ("no", "auto") and not is_checkpoint(pathlib.Path(cfg.resume)):
            raise UserError(f"resume={cfg.resume}: not a checkpoint; give its folder, auto or no")
    except UserError as error:
        if rank == 0:
            print(f"nanoforge: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # rank 0 says it, once; torchrun ends the others when it has left
        os._exit(2)
    try:
        world.connect()
        run = Run(cfg, world)
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
    """One sentence on the screen, from the first rank that failed; each traceback in its log."""
    traceback.print_exc()
    others = 0  # failed before
    with contextlib.suppress(Exception):
        others = world.count("failures")
    with contextlib.suppress(Exception):
        run.finish()
    if others:
        return  # a consequence of the first failure, such as a lost connection
    role = "generator" if world.generates and not world.trains else "trainer"
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    where = f" (log: {run.log_file})" if run else ""
    what = what.splitlines()[0]
    line = f"nanoforge: rank {world.rank} ({role}) stopped in {world.phase}: {what}{where}"
    if run:
        run.say(f"\n{line}")  # the writer's bar may have left its line open
        run.screen.flush()
    else:
        print(line, file=sys.stderr, flush=True)
