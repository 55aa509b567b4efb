"""Every split of three and four GPUs: a step and its parts, weights proven, a rank killed.

    python benchmarks/many_gpus.py OUT                      # Qwen3-1.7B: some minutes a split
    python benchmarks/many_gpus.py OUT --only="2 + 2;4 colocated" --no-kill    # about two
    python benchmarks/many_gpus.py OUT --shape=qwen3-8b --config=configs/grpo/qwen3_8b.yaml
    python benchmarks/many_gpus.py OUT --shape=tiny --compile=false         # a CPU, to try it

Random weights of the model's shape and 32 prompts x 8 replies x (128 + 512 tokens), all else from
the configuration. A run begins at age 1. When the checkpoint of its fifth step is there, one of its
ranks gets a SIGKILL; torchrun starts all ranks again, and the run goes on from that checkpoint, now
at age 0 and with its weights proven after each sync (bit-equal on the wire, poison overwritten).
Seconds are medians of steps 3 to 5, and of those after the first of the restart, less what the
first trainer took to prove them. `all else` is what a trainer and an engine did besides, `wait` a
share of the step; where a rank does both its trainer says all. A run is ended by SIGKILL after its
last step: nothing is exported.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import psutil

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

BEFORE, AFTER, WARM, GROUP = 5, 4, 2, 8  # steps before and after the restart; left out; replies
RUNS = {  # ranks, of them generators, ranks of an engine, which rank is killed
    "1 + 2": (3, 1, 1, 1),
    "2 + 2": (4, 2, 1, 0),
    "TP 2 + 2": (4, 2, 2, 1),
    "1 + 3": (4, 1, 1, 3),
    "4 colocated": (4, 0, 1, 2),
}


def step_lines(folder: pathlib.Path) -> list[dict]:
    """The steps in metrics.jsonl, but for a line that is just being written."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [x for x in lines if "reward" in x]


def since_restart(lines: list[dict], before: list[dict]) -> list[dict]:
    """Steps behind the checkpoint that are new, and at age 0: before the kill it was 1."""
    new = [x for x in lines if before and x["step"] >= BEFORE and x not in before]
    return [x for x in new if not x["policy_age_max"]]


def kill_rank(process: psutil.Process, rank: int):
    """SIGKILL for one of torchrun's ranks."""
    [one] = [p for p in process.children() if p.environ().get("RANK") == str(rank)]
    one.kill()


def end(process: psutil.Process):
    """SIGKILL for torchrun and all below it, and wait: the next run needs their memory."""
    every = [process, *process.children(recursive=True)]
    for one in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(every, timeout=60)


def run(args, name: str) -> dict:
    ranks, generators, engine, victim = RUNS[name]
    folder = args.folder / name.replace(" ", "")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    how = {"config": args.config, "model": args.folder / "model", "run_dir": folder / "run"}
    how |= {"task": f"{ROOT}/benchmarks/step_peer.py:listed", "steps": args.steps}
    how |= {"task_data": args.folder / "prompts.json", "prompts_per_step": args.prompts}
    how |= {"group_size": GROUP, "max_prompt_tokens": args.prompt, "max_new_tokens": args.new}
    how |= {"num_generators": generators, "tensor_parallel_size": engine, "max_policy_age": 1}
    how |= {"eval_size": 0, "save_every": BEFORE if args.kill else 0, "sleep": "no"}
    how |= {"gpu_memory_utilization": args.share if not generators else 0.85}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--standalone", "--max-restarts=1", f"{ROOT}/benchmarks/many_gpus_rank.py"]
    command += [*(f"--{k}={v}" for k, v in how.items()), *args.more]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    saved = folder / "run/checkpoints" / f"step-{BEFORE}" / "about.json"
    times, start, before, lines, after, passed = {}, time.monotonic(), [], [], [], 0.0
    with open(folder / "out.log", "w") as out:
        popen = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
        process = psutil.Process(popen.pid)
        while popen.poll() is None and time.monotonic() - start < args.timeout:
            lines, passed = step_lines(folder / "run"), time.monotonic() - start
            if lines:
                times.setdefault("first", passed)
            if args.kill and not before and saved.exists():
                before, times["killed"] = lines, passed
                kill_rank(process, victim)
            if after := since_restart(lines, before):
                times.setdefault("again", passed)
            if len(after) >= AFTER or (len(lines) >= BEFORE and not args.kill):
                break
            time.sleep(0.05)
        code = popen.poll()
        end(process)
    shutil.rmtree(folder / "run/checkpoints", ignore_errors=True)
    found = {"name": name, "ranks": ranks, "times": times, "victim": victim}
    if len(before or lines) >= BEFORE:
        found["age 1"] = parts((before or lines)[WARM:BEFORE], ranks, [0.0])
    if len(after) >= AFTER:
        from topologies import events

        first = generators  # of the trainers; colocated, rank 0
        proofs = [e for e in events(folder / "run") if e["name"] == "check"]
        own = [e["dur"] / 1e6 for e in proofs if e["pid"] == first]
        found["age 0"] = parts(after[1:], ranks, own[1:])
        found["proven"] = len(proofs) >= ranks * AFTER
    if "age 1" not in found or (args.kill and "age 0" not in found):
        logs = [
            p.read_text(errors="replace") for p in (folder / "out.log", *folder.glob("run/log/*"))
        ]
        why = [x.strip() for x in "\n".join(logs).splitlines() if "Error" in x][-1:]
        said = f"{len(lines)} steps, {len(after)} of them after the restart, in {passed:.0f} s"
        found["failed"] = " ".join([said, f"exit code {code}", *why])[:300]
    return found


def parts(lines: list[dict], ranks: int, proofs: list[float]) -> dict:
    """Medians over steps; shares of a step's seconds, of which a proof took some."""
    middle = {k: statistics.median(x[k] for x in lines) for k in lines[0] if k != "step"}
    proof, apart = statistics.median(proofs), "other_generator_s" in middle
    keep = ("generate_s", "train_s", "sync_s", "mismatch_kl", "tokens")
    out = {k: middle[k] for k in keep} | {"step_s": middle["step_s"] - proof}
    out["tokens_per_gpu"] = middle["tokens"] / out["step_s"] / ranks
    out["other_trainer"] = middle["other_trainer_s"] - proof
    out["other_engine"] = middle["other_generator_s"] - proof if apart else None
    out["idle_trainer"] = middle["idle_trainer_s"] / out["step_s"]
    out["idle_engine"] = middle["idle_generator_s"] / out["step_s"] if apart else None
    return out | {"age": max(x["policy_age_max"] for x in lines)}


def table(runs: list[dict]) -> str:
    columns = ("ranks", "age", "seconds a step", "generate", "train", "sync, ms")
    columns += ("all else: trainers, engines", "trainers wait", "engines wait", "tokens/s a GPU")
    columns += ("mismatch KL", "killed", "next step after, s")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for x in runs:
        for d in (x[k] for k in ("age 1", "age 0") if k in x):
            cells = [x["name"], f"{d['age']:.0f}", f"{d['step_s']:.2f}", f"{d['generate_s']:.2f}"]
            cells += [f"{d['train_s']:.2f}", f"{d['sync_s'] * 1e3:.0f}"]
            both = [d["other_trainer"], d["other_engine"]]
            cells.append(", ".join(f"{v:.2f}" for v in both if v is not None))
            both = [d["idle_trainer"], d["idle_engine"]]
            cells += ["" if v is None else f"{v:.0%}" for v in both]
            cells += [f"{d['tokens_per_gpu']:,.0f}", f"{d['mismatch_kl']:.5f}"]
            if d is x.get("age 0"):
                waited = x["times"]["again"] - x["times"]["killed"]
                cells += [f"rank {x['victim']}", f"{waited:.0f}"]
                cells[1] += ", proven" if x["proven"] else ", NOT PROVEN"
            lines.append(f"| {' | '.join(cells)} |")
        if "failed" in x:
            lines.append(f"| {x['name']} | {x['failed']} |")
    return "\n".join(lines)


def main():
    import torch
    from step_peer import prepare

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", default="qwen3-1.7b", help="of benchmarks/generation.py")
    parser.add_argument("--config", default="configs/grpo/qwen3_1_7b.yaml")
    parser.add_argument("--only", default=";".join(RUNS), help="with semicolons")
    parser.add_argument("--kill", default=True, action=argparse.BooleanOptionalAction)
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one run")
    args, args.more = parser.parse_known_args()
    tiny, args.use, args.steps = args.shape == "tiny", "gpu", 4 * BEFORE
    args.prompts, args.prompt, args.new = (4, 128, 16) if tiny else (32, 128, 512)
    args.cuda, args.folder = torch.cuda.is_available(), args.out.resolve() / args.shape
    args.share = 24e9 / torch.cuda.mem_get_info()[1] if args.cuda else 0.85  # of a colocated engine
    prepare(args)
    runs = []
    for name in args.only.split(";"):
        runs.append(run(args, name))
        (args.out / "many_gpus.json").write_text(json.dumps(runs, indent=1))
        print("\n".join(table(runs[-1:]).splitlines()[2:]), flush=True)
    card = torch.cuda.get_device_name() if args.cuda else "CPU"
    print(f"\n{args.shape}, torch {torch.__version__}, {card}\n\n{table(runs)}")


if __name__ == "__main__":
    main()
