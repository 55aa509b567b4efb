"""The default run on every topology, at every age: what is trained, what it learns, who waits.

    python benchmarks/topologies.py OUT              # 7 topologies x ages 0, 1, 3: 40 minutes
    python benchmarks/topologies.py OUT --only="2 + 1,TP 2 + 1" --ages 0 --steps 3

Every run proves its weights after each sync, and is then read back: each group of the task's own
order trained exactly once, no token older than the limit. Prints the table of RESULTS.md, and exits
with 1 if a row of it is wrong. Goes on where it stopped.
"""

import argparse
import json
import pathlib
import sys
from types import SimpleNamespace

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from default_runs import ROOT, judge, torchrun
from transformers import AutoTokenizer

from examples.calculator import Calculator
from report import load_rollouts

TOPOLOGIES = {  # name -> ranks, settings
    "1 colocated": (1, {"num_generators": 0}),
    "2 colocated": (2, {"num_generators": 0}),
    "1 + 1": (2, {"num_generators": 1}),
    "1 + 2": (3, {"num_generators": 1}),
    "2 + 1": (3, {"num_generators": 2}),
    "TP 2 + 1": (3, {"num_generators": 2, "tensor_parallel_size": 2}),
    "2 x TP 2 + 2": (6, {"num_generators": 4, "tensor_parallel_size": 2}),
}
AGES = (0, 1, 3)
PROMPTS, GROUP = 16, 8  # of the default


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def events(folder: pathlib.Path) -> list[dict]:
    """trace.json, whose closing bracket is optional."""
    return json.loads((folder / "trace.json").read_text().rstrip().rstrip(",") + "]")


def engines_apart(folder: pathlib.Path, tp: int) -> float:
    """Mean seconds between the first and the last engine that has its part of a batch."""
    collects: dict[int, list[float]] = {}  # first rank of an engine -> ends, by batch
    for e in events(folder):
        if e["name"] == "collect" and e["pid"] % tp == 0:
            collects.setdefault(e["pid"], []).append((e["ts"] + e["dur"]) / 1e6)
    ends = [max(at) - min(at) for at in zip(*collects.values())][1:]  # the first has a start-up
    return sum(ends) / max(len(ends), 1)


def read_back(folder: pathlib.Path, steps: int, age: int, ranks: int, tp: int) -> dict:
    """What a run's tables, trace and metrics say about the promises of the loop."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
    task = Calculator(SimpleNamespace(seed=0, prompts_per_step=PROMPTS))
    once, ages, mixed, rows = True, [], 0, 0
    for step in range(steps):
        table = load_rollouts(folder / f"rollouts/{step}")
        expected = [(step * 2**32 + s, r) for s in range(PROMPTS) for r in range(GROUP)]
        once &= list(zip(table.index.tolist(), table.reply.tolist())) == expected
        for i, (index, _) in enumerate(expected):
            prompt = tokenizer.encode(task.problem(step, index & 0xFFFFFFFF)["prompt"])
            once &= table.tokens[i, : len(prompt)].tolist() == prompt
            versions = table.version[i][table.mask[i]]
            ages += [int(step - versions.max()), int(step - versions.min())]
            mixed, rows = mixed + int(versions.min() < versions.max()), rows + 1
    proofs = sum(e["name"] == "check" for e in events(folder))
    return {
        "once": bool(once),
        "in_age": min(ages) >= 0 and max(ages) <= age,
        "oldest": max(ages),
        "mixed": mixed / rows,
        "proven": proofs == ranks * (steps + 1),
        "apart_s": engines_apart(folder, tp),
    }


def measure(out: pathlib.Path, name: str, age: int, steps: int, *more: str) -> dict:
    ranks, settings = TOPOLOGIES[name]
    folder = out / f"{name.replace(' ', '')}-age{age}"
    watch = folder / "metrics.jsonl"
    args = [*flags(settings), f"--max_policy_age={age}", f"--steps={steps}", f"--run_dir={folder}"]
    args += ["--check_weights=true", "--save_rollouts=true", *more]
    _, seconds = torchrun(ranks, "grpo.py", *args, watch=watch)
    tp = settings.get("tensor_parallel_size", 1)
    found = {"name": name, "age": age, "steps": steps, "seconds": seconds}
    lines = [json.loads(line) for line in watch.read_text().splitlines()]
    step_s = sum(x["step_s"] for x in lines[1:] if "reward" in x) / max(steps - 1, 1)
    read = read_back(folder, steps, age, ranks, tp)
    return found | judge(folder) | {"step_s": step_s} | read


def table(done: list[dict]) -> str:
    lines = [
        "| ranks | age | each group once, within its age, weights proven | oldest | rows of two "
        "versions | reward: first, last 5 steps | accuracy after | step s | generators wait "
        "| trainers wait | engines end apart, s |",
        "|" + "---|" * 11,
    ]
    for d in done:
        kept = "yes" if d["once"] and d["in_age"] and d["proven"] else "NO"
        lines.append(
            f"| {d['name']} | {d['age']} | {kept} | {d['oldest']} | {d['mixed']:.0%} "
            f"| {d['reward_first']:.2f}, {d['reward_last5']:.3f} | {d['accuracy_after']:.3f} "
            f"| {d['step_s']:.2f} | {d['idle_generator']:.0%} | {d['idle_trainer']:.0%} "
            f"| {d['apart_s']:.2f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--only", default=",".join(TOPOLOGIES))
    parser.add_argument("--ages", type=int, nargs="*", default=list(AGES))
    parser.add_argument("--steps", type=int, default=46)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out.resolve() / "topologies.jsonl"
    done = [json.loads(x) for x in results.read_text().splitlines()] if results.exists() else []
    for name in args.only.split(","):
        for age in args.ages:
            if any((d["name"], d["age"], d["steps"]) == (name, age, args.steps) for d in done):
                continue
            found = measure(results.parent, name, age, args.steps)
            done.append(found)
            with open(results, "a") as f:
                f.write(json.dumps(found) + "\n")
            print(table([found]).splitlines()[-1], flush=True)
    done = [d for d in done if d["steps"] == args.steps]
    print(table(done))
    wrong = [f"{d['name']}, age {d['age']}: {why}" for d in done for why in faults(d, done)]
    print("\n".join(wrong or ["All as promised."]))
    sys.exit(bool(wrong))


def faults(d: dict, done: list[dict]) -> list[str]:
    """What a run does not keep of the promises of the loop."""
    synchronous = next((o for o in done if (o["name"], o["age"]) == (d["name"], 0)), None)
    apart = "colocated" not in d["name"]
    promises = {
        "each group trained once": d["once"],
        "no token older than its age": d["in_age"],
        "weights proven on every rank after every sync": d["proven"],
        "rows of two versions, exactly where there is an age": (d["mixed"] > 0) == (d["age"] > 0),
    }
    if d["steps"] >= 46:
        promises["learned"] = d["reward_last5"] >= 0.9
    if d["steps"] >= 46 and apart and d["age"] and synchronous:
        less = d["idle_trainer"] <= 0.7 * synchronous["idle_trainer"]
        promises["trainers wait at least 30% less than at age 0"] = less
    return [name for name, kept in promises.items() if not kept]


if __name__ == "__main__":
    main()
