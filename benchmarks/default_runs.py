"""The default run, many times: {warm starts} x {RL seeds} x {policy ages}. Does it always learn,
and how fast?

    python benchmarks/default_runs.py OUT           # 3 warm starts, 5 seeds, ages 0 and 1
    python benchmarks/default_runs.py OUT --seeds 1 --warm 1

Each run is the README's command. Prints one line a run and the table of benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent


def torchrun(ranks: int, *args: str, watch: pathlib.Path | None = None) -> tuple[float, float]:
    """Run to the end. Returns (seconds until `watch` has its first step, seconds in all)."""
    start, first = time.monotonic(), 0.0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*launcher, f"--nproc_per_node={ranks}", *args],
        cwd=ROOT,
        env=env,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None:
            if watch and not first and watch.exists() and '"reward"' in watch.read_text():
                first = time.monotonic() - start
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(args)} failed: see its log folder")
    return first, time.monotonic() - start


def judge(folder: pathlib.Path) -> dict:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [x for x in lines if "reward" in x]
    evals = {x["step"]: x["eval_reward"] for x in lines if "eval_reward" in x}
    busy = rows[1:]  # the first step holds the start of the engine

    def total(*names):
        return sum(x[n] for x in busy for n in names)

    apart = "other_generator_s" in busy[0]  # else the ranks do both, and have one clock
    generators = ("generate_s", "idle_generator_s", "other_generator_s") if apart else ("step_s",)
    share = {
        "idle_generator": total("idle_generator_s") / total(*generators),
        "idle_trainer": total("idle_trainer_s") / total("step_s"),
    }
    return {
        "reward_first": rows[0]["reward"],
        "reward_last5": sum(x["reward"] for x in rows[-5:]) / len(rows[-5:]),
        "accuracy_before": evals[min(evals)],
        "accuracy_after": evals[max(evals)],
        **share,
        "mismatch_max": max(x["mismatch_max"] for x in rows if x["policy_age_max"] == 0),
        "rewards": [round(x["reward"], 3) for x in rows],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--ages", type=int, nargs="*", default=[0, 1])
    args = parser.parse_args()
    out = args.out.resolve()
    models = [ROOT / "assets/calculator"]
    for seed in range(1, args.warm):
        models.append(out / f"warm{seed}/model")
        if not models[-1].exists():
            _, seconds = torchrun(2, "sft.py", f"--seed={seed}", f"--run_dir={out}/warm{seed}")
            print(f"warm start {seed}: {seconds:.0f} s", flush=True)
    results = out / "default_runs.jsonl"
    done = [json.loads(x) for x in results.read_text().splitlines()] if results.exists() else []
    for seed in range(args.seeds):
        for warm, model in enumerate(models):
            for age in args.ages:
                name = f"w{warm}s{seed}a{age}"
                if any(d["name"] == name for d in done):
                    continue
                options = [f"--model={model}", f"--seed={seed}", f"--max_policy_age={age}"]
                watch = out / name / "metrics.jsonl"
                first, seconds = torchrun(
                    3, "grpo.py", *options, f"--run_dir={out}/{name}", watch=watch
                )
                found = {"name": name, "warm": warm, "seed": seed, "age": age}
                found |= {"first_step_s": first, "seconds": seconds, **judge(out / name)}
                done.append(found)
                with open(results, "a") as f:
                    f.write(json.dumps(found) + "\n")
                shown = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
                print(name, shown, flush=True)
    print(table(done))


def table(done: list[dict]) -> str:
    lines = [
        "| warm start | age | reward at first | last 5 steps, by seed | lowest | accuracy before "
        "| accuracy after, lowest | idle trainers | first step s | all s |",
        "|" + "---|" * 10,
    ]
    for warm, age in sorted({(d["warm"], d["age"]) for d in done}):
        runs = [d for d in done if (d["warm"], d["age"]) == (warm, age)]
        mean = lambda k: sum(d[k] for d in runs) / len(runs)  # noqa: B023, E731
        last = [d["reward_last5"] for d in runs]
        cells = [
            "shipped" if warm == 0 else f"seed {warm}",
            str(age),
            f"{mean('reward_first'):.2f}",
            " ".join(f"{x:.3f}" for x in last),
            f"{min(last):.3f}",
            f"{mean('accuracy_before'):.3f}",
            f"{min(d['accuracy_after'] for d in runs):.3f}",
            f"{mean('idle_trainer'):.0%}",
            f"{max(d['first_step_s'] for d in runs):.0f}",
            f"{max(d['seconds'] for d in runs):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    good = sum(d["reward_last5"] >= 0.95 for d in done)
    lowest = min(d["reward_last5"] for d in done)
    lines.append(f"\n{good} of {len(done)} runs reach 0.95; the lowest ends at {lowest:.3f}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
