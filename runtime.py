"""From the shell to the loop: settings, ranks and their groups, clocks, signals. The only file that
reads a rank: others ask `World` by name (`world.trains`). Nothing here knows what a model is."""

import contextlib
import dataclasses
import datetime
import difflib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import threading
import time
import traceback
from operator import ge, gt, le, lt

import torch
import torch.distributed as dist

import report
from heartbeat import HEART, connect_store
from record import Run, is_checkpoint

LONG = datetime.timedelta(hours=24)  # groups never time out by themselves: a long reply is no fault


class UserError(Exception):
    """Something the user can mend. They read its message, one sentence, and no traceback."""


def setting_help(config_class) -> dict[str, str]:
    """The comment behind each field of a dataclass, which is also the text of `--help`."""
    source = "".join(inspect.getsource(c) for c in config_class.__mro__[-2::-1])  # a base's first
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))


def settings(config_class, argv: list[str]):
    """Command line over YAML (`--config`) over defaults -> an instance of the flat dataclass. A
    name nobody knows, a wrong type or an unreadable file is a UserError of one sentence."""
    import jsonargparse  # 0.3 s: not paid by the ranks' other imports of this file

    how = {"exit_on_error": False, "allow_abbrev": False}
    parser = jsonargparse.ArgumentParser("torchrun SCRIPT", description=config_class.__doc__, **how)
    parser.add_argument("--config", action="config", help="YAML file with settings")
    parser.add_argument("--help-metrics", action=report.HelpMetrics)
    meaning, plain = setting_help(config_class), config_class()
    for f in dataclasses.fields(config_class):
        about = meaning.get(f.name, "")
        parser.add_argument(f"--{f.name}", type=f.type, default=getattr(plain, f.name), help=about)
    # The file first, wherever it stands: jsonargparse takes what comes last.
    at = next((i for i, x in enumerate(argv) if x.partition("=")[0] == "--config"), len(argv))
    end = at + (2 if argv[at:] and argv[at] == "--config" else 1)
    try:
        values = parser.parse_args([*argv[at:end], *argv[:at], *argv[end:]]).as_dict()
    except (jsonargparse.ArgumentError, TypeError, OSError) as error:
        text = " ".join(str(error).split())
        said = r"(?:[Uu]nrecognized arguments: --|[Kk]ey '|[Oo]ption '|not accepted: )([\w.]+)"
        if unknown := re.search(said, text):
            near = difflib.get_close_matches(unknown[1], meaning, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; --help lists them all"
            raise UserError(f"there is no setting {unknown[1]!r}{hint}") from None
        raise UserError(text) from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config: this file is not UTF-8 text ({error})") from None
    values = {f.name: values[f.name] for f in dataclasses.fields(config_class)}
    if empty := [name for name, value in values.items() if value is None]:  # YAML's null
        raise UserError(f"{empty[0]}: it has no value")
    return config_class(**values)


LIMITS = {"at least": ge, "above": gt, "at most": le, "below": lt}


def limits(cfg):
    """UserError for the first setting beyond what its comment names; none may be negative."""
    for name, meaning in setting_help(type(cfg)).items():
        value, said = getattr(cfg, name), re.findall(rf"({'|'.join(LIMITS)}) ([\d.]+)", meaning)
        for kind, limit in [("at least", "0"), *said] if isinstance(value, (int, float)) else ():
            if not LIMITS[kind](value, float(limit)):  # NaN is beyond every limit
                raise UserError(f"{name}={value}: must be {kind} {limit} ({meaning})")


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
            at = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
            line = at[-1].lineno if at else getattr(error, "lineno", "?")  # none: a SyntaxError
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{what}={place}: {file}, line {line}: {reason}") from error
    if not name or not hasattr(sys.modules[key], name):
        raise UserError(f"{what}={place}: write {file}:NAME with a NAME that the file defines")
    return getattr(sys.modules[key], name)


class World:
    """Who this rank is, its groups, its time. Ranks below num_generators generate (first, as vLLM's
    tensor parallelism needs), others train. With 0 each does both, with None (sft.py) all train."""

    def __init__(self, num_generators=None, tensor_parallel_size=1, trainer_replicas=1):
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            command = f"torchrun --nproc_per_node=3 {os.path.basename(sys.argv[0])}"
            raise UserError(f"torchrun makes the ranks, so type: {command}")
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        self.rank, self.size, self.local_rank = (int(os.environ[name]) for name in names)
        if num_generators == 1 and self.size == 1:
            num_generators = 0
        first, t = num_generators or 0, tensor_parallel_size
        trainers = self.trainer_ranks = list(range(first, self.size))
        shard, left = divmod(n := len(trainers), max(trainer_replicas, 1))
        wrong = {
            "num_generators must be at least 0, tensor_parallel_size 1": first < 0 or t < 1,
            f"{num_generators=} leaves no rank to train: there are {self.size}": not trainers,
            f"{tensor_parallel_size=} needs ranks of its own: num_generators": t > 1 and not first,
            f"{tensor_parallel_size=} ranks make an engine: {num_generators=}": t > 0 and first % t,
            f"{trainer_replicas=} must divide the {n} trainers": trainer_replicas < 1 or left,
        }
        if why := [why for why, found in wrong.items() if found]:
            raise UserError(why[0])
        self.first_trainer, self.num_trainers = first, n
        self.colocated = num_generators == 0
        # Consecutive ranks hold the shards of one copy of the model, so they can be of one node.
        self.shards = [trainers[i : i + shard] for i in range(0, len(trainers), shard)]
        self.trains, self.writes = self.rank >= first, self.rank == first
        self.trainer_index = self.rank - first
        generators = trainers if self.colocated else list(range(first))  # none in sft.py
        self.generator_ranks, self.generates = generators, self.rank in generators
        # An engine is a block of ranks that step together; only its first rank speaks for it.
        self.engines = [generators[i : i + t] for i in range(0, len(generators), t)]
        self.engine = self.rank // t if self.generates else -1
        self.engine_ranks = self.engines[self.engine] if self.generates else []
        self.leads = self.rank in ([e[0] for e in self.engines] or [first])  # has rows for `gather`
        roles = ["generator"] * first + ["trainer"] * len(trainers)
        HEART.names = [f"rank {r} ({role})" for r, role in enumerate(roles)]

        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if self.cuda else torch.device("cpu")
        self.stopping = False  # a signal came: finish what must not be torn, save, leave
        self.clock: dict[str, float] = {}  # seconds since the start, each in one phase
        self.spans: list[tuple[str, float, float]] = []  # since the last gather: name, start, end
        self.since_epoch = time.time() - time.monotonic()  # a clock that is set back moves nothing
        self.store, self.border = HEART.store, time.monotonic() + self.since_epoch
        self.restart = HEART.attempt  # 0 at first, then torchrun's restarts
        self.due = self.saves = False  # a checkpoint by the clock: for the writer, for everyone
        self.write = None  # of a checkpoint, in a thread beside the phases: a Future
        self.buckets = None  # how weights travel: planned by the first sync
        self.meanwhile = lambda done: None  # what a generator does until others have arrived

    def connect(self):
        """Open the groups, in one order on every rank, before an engine is built. Collective."""
        if self.cuda:
            if self.colocated:  # freed memory goes back page by page: a waking engine needs it
                os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
            torch.cuda.set_device(self.device)
        backend, who = "nccl" if self.cuda else "gloo", {}
        if self.size == len(HEART.local):  # one node: nobody else listens in
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} | os.environ
        if self.store:  # which outlives a restart, with the addresses of ranks that died
            who = {"store": dist.PrefixStore(HEART.key("torch"), connect_store(LONG))}
            who |= {"rank": self.rank, "world_size": self.size}
        # No device_id: an eagerly bound NCCL splits communicators, which takes every rank.
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.cuda else "gloo", timeout=LONG, **who)
        self.store = self.store or dist.distributed_c10d._get_default_store()

        def group(name, kind, *blocks):  # this rank's; every rank makes those of all blocks
            made = [dist.new_group(ranks, LONG, kind, group_desc=name) for ranks in blocks]
            return next((g for g in made if g is not dist.GroupMember.NON_GROUP_MEMBER), None)

        everyone, weights = range(self.size), {*self.generator_ranks, self.first_trainer}
        self.control = group("control", "gloo", everyone)  # tables, headers, objects
        self.arrivals = group("arrivals", "gloo", everyone)  # non-blocking barriers, nothing else
        self.trainers = group("trainers", backend, self.trainer_ranks)
        self.savers = group("savers", "gloo", self.trainer_ranks)  # checkpoints, beside training
        self.mesh = [self.trainers]  # FSDP's group; with copies of the model HSDP's two
        if len(self.shards) > 1:
            self.mesh = [group("mesh", backend, *b) for b in (zip(*self.shards), self.shards)]
        self.weights = group("weights", backend, weights)
        self.carries_weights = self.rank in weights and not self.colocated
        self.engine_group = group("engine", "gloo", *self.engines)

    def arrive(self, name: str):
        """Wait for every rank; a generator goes on with its rows until all are here. Collective."""
        with self.span(f"arrive {name}"):
            work = dist.barrier(group=self.arrivals, async_op=True)
            self.meanwhile(work.is_completed)
            HEART.waits = True
            work.wait()

    def agree(self, value):
        """The first trainer's value, on every rank. Collective."""
        dist.broadcast_object_list(box := [value], src=self.first_trainer, group=self.control)
        return box[0]

    def count(self, name: str) -> int:
        """0, 1, 2, ... over all ranks: an atomic counter in torchrun's store."""
        return self.store.add(HEART.key(name), 1) - 1

    def writing(self) -> bool:
        """Whether something is being written that a signal should not cut short."""
        write = self.write  # once: the main thread may put None there meanwhile
        return HEART.phase in ("save", "export") or bool(write and not write.done())

    def has_failed(self) -> bool:
        """Whether some rank has said that it failed; False too if the store is gone."""
        with contextlib.suppress(Exception):
            return self.store.check([HEART.key("failures")])
        return False

    def lap(self, name: str | None = None):
        """What passed since the last lap or border of a phase is `name`'s, else the phase's."""
        now, name = time.monotonic() + self.since_epoch, name or HEART.phase
        self.clock[name] = self.clock.get(name, 0.0) + now - self.border
        report.note_engine(self.spans, name, self.border, now)
        self.border, HEART.moved = now, True

    @contextlib.contextmanager
    def span(self, name: str):
        """A phase, for `clock` (less the phases inside it) and the spans that become trace.json."""
        self.lap()
        before, start = HEART.phase, self.border
        HEART.enter(name)
        yield
        self.lap()
        HEART.enter(before)  # not after an exception: its message names the phase it happened in
        self.spans.append((name, start, self.border))

    def close(self):
        """Leave together, so that nobody's group dies under another's last message."""
        dist.barrier(group=self.control)
        dist.destroy_process_group()


def watch(world: World, run: Run):
    """SIGTERM and Ctrl-C set `world.stopping`: the loop ends between two steps, with a checkpoint;
    or, after `stop_seconds` (a long step, a peer that is gone), this thread ends the process when
    nothing is being written. torchrun's own limit: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, 30 seconds."""

    def stop():
        world.stopping, end = True, time.monotonic() + run.cfg.stop_seconds
        while not (dead := HEART.dead()) and not world.has_failed():
            if time.monotonic() > end and not world.writing():
                break
            time.sleep(0.1)
        HEART.say(dead)  # if a rank is, that is why torchrun tells this one to stop
        with contextlib.suppress(Exception):
            if world.writes and HEART.phase != "the loop" and not dead and not world.has_failed():
                limit = f"stop_seconds={run.cfg.stop_seconds:g} after the signal"
                run.say(f"\ncut short in {HEART.phase}, {limit}: this step is not saved")
            run.finish(says=not world.has_failed())
        HEART.exit()

    slow = ("start", "the loop", "build engine", "save", "export")
    HEART.limit = lambda phase: run.cfg.start_seconds if phase in slow else run.cfg.stuck_seconds
    HEART.logs, HEART.screen, HEART.told_to_stop = run.log_file.parent, run.screen, stop


def launch(main, config_class, check):
    """Everything around `main(cfg, world, run)`: settings, ranks, logs, and how it ends. Before
    anything is loaded `check(cfg, world)` raises UserError for settings that do not go together."""
    world = run = None
    try:
        cfg = settings(config_class, sys.argv[1:])
        names = ("num_generators", "tensor_parallel_size", "trainer_replicas")
        world = World(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)})
        check(cfg, world)
        if problem := report.problem(cfg):
            raise UserError(problem)
        if cfg.resume not in ("no", "auto") and not is_checkpoint(pathlib.Path(cfg.resume)):
            raise UserError(f"resume={cfg.resume}: not a checkpoint; give its folder, auto or no")
    except Exception as error:
        HEART.say(f"nanoforge: {error if isinstance(error, UserError) else repr(error)}")
        HEART.exit(2)
    try:
        world.connect()
        run = Run(cfg, world)
        watch(world, run)
        main(cfg, world, run)
        run.finish()
        world.close()
    except BaseException as error:
        say_what_failed(error, world, run)
        HEART.exit()
    HEART.exit(0)


def say_what_failed(error: BaseException, world: World, run: Run | None):
    """One sentence on the screen, about the first rank that failed; each traceback in its log. A
    lost connection is the echo of another's end: a dead rank of this node is named instead."""
    traceback.print_exc()
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    line, dead = HEART.line(world.rank, HEART.phase, what.splitlines()[0]), ""
    echo = re.search(r"gloo|nccl|connection|peer", what, re.IGNORECASE)
    end = time.monotonic() + (2 if len(HEART.local) == world.size else 25) * bool(echo)
    while time.monotonic() < end and not dead and not world.has_failed():
        time.sleep(0.1)
        dead = HEART.dead()
    if run:  # not for ever: a sink's network may be what is down
        ending = threading.Thread(target=run.finish, args=(not world.has_failed(),), daemon=True)
        ending.start(), ending.join(10)
    HEART.say(dead or line)
