"""The whole GRPO step beside TRL's GRPOTrainer: the same weights, prompts, lengths and settings.

    python benchmarks/step_peer.py OUT cpu --python=PEER     # processor seconds of a step
    python benchmarks/step_peer.py OUT gpu                   # one GPU: seconds of a step
    python benchmarks/step_peer.py OUT gpu --gpus=2          # two
    python benchmarks/step_peer.py OUT gpu --shape=tiny --python=PEER     # a CPU, to try it

Each trainer runs in a process of its own, turn and turn about. PEER is the Python that has trl
(default: this one). Both get the same prompts in the same order, one update a batch, a constant
rate, AdamW and its clip alike, no KL and no correction of the engine's log-probs.

`cpu`: the tiny model on sum_digits, 16 prompts x 8 replies that write a sum out (at most 34
tokens), fp32, one thread. Ours on 1, 1 + 1 and 1 + 2 ranks; TRL with transformers' generate.
`gpu`: Qwen3-1.7B's shape, random weights, 32 prompts x 8 replies x (128 + 512 tokens), bf16; TRL
with vLLM in its process. Its rows have one length: it pads nothing, and sdpa needs no mask.

    plain, liger   weights and AdamW in bf16 (ours in fp32), sdpa, without and with Liger's kernels
    compile        plain with torch_compile
    awake          liger; vLLM keeps its memory while the trainer works
    masters        liger; weights and AdamW in fp32 as ours, autocast to bf16
    vllm           for a CPU: vLLM in its process, with a patch that ours needs there too

A peer out of memory tries fewer rows at once, at last checkpointing. Processor seconds are those of
all processes of a trainer. The first WARM steps are left out. OUT/step_peer.json has every run.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time

import psutil

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WARM, GROUP = 2, 8
OURS = {  # ranks, settings
    "1 rank": (1, ["--num_generators=0"]),
    "skipped": (1, ["--num_generators=0", "--equal_rewards=skip"]),
    "1 + 1": (2, []),
    "1 + 2": (3, []),
    "sleeps": (1, ["--num_generators=0", "--compile=true"]),
    "awake": (1, ["--num_generators=0", "--compile=true", "--sleep=no"]),
    "2 colocated": (2, ["--num_generators=0", "--compile=true", "--sleep=no"]),
    "1 + 1, age 0": (2, ["--compile=true"]),
    "1 + 1, age 1": (2, ["--compile=true", "--max_policy_age=1"]),
}
PEERS = {
    "plain": {},
    "liger": {"use_liger_kernel": True},
    "compile": {"torch_compile": True},
    "awake": {"use_liger_kernel": True, "vllm_enable_sleep_mode": False},
    "masters": {"use_liger_kernel": True, "bf16": True, "model_init_kwargs": {"dtype": "float32"}},
    "vllm": {"use_vllm": True},
}
PARTS = ("generate_s", "train_s", "sync_s")


def worth(text: str, answer: str = "") -> float:
    """The reward of a reply: 1 for the right sum; of random words their length."""
    return float(text.strip().rpartition("#")[2] == answer) if answer else len(text) / 1000


def listed(cfg):
    """Our task: the prompts of `task_data` in their order."""
    from tasks import Task

    class Listed(Task):
        def correct(self, episode) -> float:
            return worth(episode.text, episode.problem.get("answer", ""))

        def problem(self, step, slot, attempt=0) -> dict:
            return self.train[step * self.cfg.prompts_per_step + slot]

    task, Listed.train = Listed(cfg), json.loads(pathlib.Path(cfg.task_data).read_text())
    task.heldout = task.train[:1]
    return task


def peer(args):
    """GRPOTrainer in this process; a line in args.file after each step."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    spent = {}

    def now() -> float:
        if args.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(name: str, function):
        def call(*given, **named):
            start, made = now(), function(*given, **named)
            spent[name] = spent.get(name, 0.0) + now() - start
            return made

        return call

    def reward(completions, completion_ids, answer=None, **_) -> list[float]:
        found = list(map(worth, completions, answer or [""] * len(completions)))
        spent.update(reward=statistics.mean(found), tokens=sum(map(len, completion_ids)))
        return found

    class Ticks(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.at = now()

        def on_step_end(self, *_, **__):
            before, self.at = self.at, now()
            line = {"sync_s": 0.0, **spent, "step_s": self.at - before}
            line["generate_s"] -= line["sync_s"]
            line["train_s"] = line["step_s"] - line["generate_s"] - line["sync_s"]
            if os.environ.get("RANK", "0") == "0":  # all ranks have as many rows
                line["tokens"] *= args.gpus
                with open(args.file, "a") as f:
                    f.write(json.dumps(line) + "\n")
            spent.clear()

    rows = int(args.rows)
    how = {"output_dir": str(args.folder / "trl"), "max_steps": args.steps, "seed": 0}
    how |= {"learning_rate": args.lr, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    how |= {"adam_beta2": 0.95, "optim": "adamw_torch_fused", "max_grad_norm": 1.0}
    how |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    how |= {"num_generations": GROUP, "max_completion_length": args.new, "epsilon_high": 0.28}
    how |= {"shuffle_dataset": False, "vllm_importance_sampling_correction": False, "bf16": False}
    how |= {"per_device_train_batch_size": rows, "use_cpu": not args.cuda, "report_to": "none"}
    how |= {"gradient_accumulation_steps": args.prompts * GROUP // rows // args.gpus}
    how |= {"dataloader_pin_memory": args.cuda, "gradient_checkpointing": args.checkpointing}
    how |= {"use_vllm": args.cuda, "vllm_enable_sleep_mode": args.cuda}
    how |= {"vllm_gpu_memory_utilization": args.share or 0.3}
    how |= {"vllm_max_model_length": args.prompt + args.new}
    how |= {"model_init_kwargs": {"dtype": "bfloat16" if args.cuda else "float32"}}
    how |= PEERS[args.kind] | json.loads(args.more or "{}")
    no_end = {"ignore_eos": True} if how["use_vllm"] else {"min_new_tokens": args.new}
    how["generation_kwargs"] = no_end if args.use == "gpu" else None
    if how["use_vllm"] and not args.cuda:
        from engine import ENVIRONMENT, keep_linear_weights

        os.environ |= ENVIRONMENT
        keep_linear_weights()
    data = Dataset.from_list(json.loads((args.folder / "prompts.json").read_text()))
    trainer = GRPOTrainer(str(args.folder / "model"), reward, GRPOConfig(**how), data)
    trainer._generate_single_turn = timed("generate_s", trainer._generate_single_turn)
    if how["use_vllm"]:
        made = trainer.vllm_generation
        made.sync_weights = timed("sync_s", made.sync_weights)
    trainer.add_callback(Ticks())
    trainer.train()


# ---------------------------------------------------------------- from outside


def processor_seconds(root: int) -> float:
    """Of a process and of all below it, those that have ended included."""
    total, first = 0.0, psutil.Process(root)
    for process in (first, *first.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user, system, and those of what has ended
    return total


def watch(command: list[str], file: pathlib.Path, args) -> dict:
    """Run to the end: what it wrote of its steps, and processor seconds when it did."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "false"} | ({} if args.cuda else {"OMP_NUM_THREADS": "1"})
    start, marks, log = time.monotonic(), [(0, 0.0, 0.0)], file.with_suffix(".log")
    ended = False
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
        while process.poll() is None:
            done = file.read_text().count('"step_s"') if file.exists() else 0
            if done > marks[-1][0]:
                marks.append((done, time.monotonic() - start, processor_seconds(process.pid)))
            if time.monotonic() - start > args.timeout:
                ended, ranks = True, psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                time.sleep(15)
                for one in (process, *ranks):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            time.sleep(0.02)
    lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    lines = [x for x in lines if "step_s" in x]
    if len(lines) < args.steps:
        logs = [path.read_text(errors="replace") for path in (log, *file.parent.glob("log/*"))]
        why = [x.strip() for x in "\n".join(logs).splitlines() if "Error" in x][-1:]
        if ended:
            why = [f"{len(lines)} steps in --timeout={args.timeout:g} s", *why]
        why = why or [f"exit code {process.returncode}"]
        full = any("out of memory" in text for text in logs)
        return {"failed": "out of memory" if full else "; ".join(why)[:160]}
    (n, wall, cpu), (m, wall_end, cpu_end) = next(x for x in marks if x[0] >= WARM), marks[-1]
    found = {k: statistics.median(x[k] for x in lines[WARM:]) for k in (*PARTS, "tokens", "reward")}
    found |= {"wall_s": (wall_end - wall) / (m - n), "cpu_s": (cpu_end - cpu) / (m - n)}
    if args.cuda:
        found["wall_s"] = statistics.median(x["step_s"] for x in lines[WARM:])
    return found | {"steps": lines, "marks": marks, "whole_s": time.monotonic() - start}


def ours(args, kind: str, folder: pathlib.Path) -> dict:
    ranks, more = OURS[kind]
    how = {"model": args.folder / "model", "task": f"{__file__}:listed", "steps": args.steps}
    how |= {"task_data": args.folder / "prompts.json", "prompts_per_step": args.prompts}
    how |= {"group_size": GROUP, "max_prompt_tokens": args.prompt, "max_new_tokens": args.new}
    how |= {"max_turns": 1, "lr": args.lr, "lr_schedule": "constant", "eval_size": 0}
    how |= {"save_every": 0, "tokens_per_microbatch": args.tokens, "run_dir": folder}
    how |= {"gpu_memory_utilization": args.share or 0.3}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--standalone", "grpo.py", *(f"--{k}={v}" for k, v in how.items()), *more]
    return watch([*command, *args.ours.split()], folder / "metrics.jsonl", args)


def theirs(args, kind: str, folder: pathlib.Path) -> dict:
    """With fewer rows at once, and at last checkpointing, until it fits."""
    sizes = args.rows.split(",")
    for rows, checkpointing in [*((n, []) for n in sizes), (sizes[0], ["--checkpointing"])]:
        file = folder / f"{rows}{'-'.join(checkpointing)}.jsonl"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"]
        command = [args.python, *(launch if args.gpus > 1 else []), __file__, str(args.out)]
        command += [args.use, f"--shape={args.shape}", f"--gpus={args.gpus}"]
        command += [f"--steps={args.steps}", f"--rows={rows}", f"--file={file}"]
        command += [f"--kind={kind}", f"--more={args.more}", *checkpointing]
        found = {**watch(command, file, args), "rows": " ".join([rows, *checkpointing])}
        if found.get("failed") != "out of memory":
            break
        print(f"GRPOTrainer, {kind}: {found['rows']} rows at once do not fit", flush=True)
    return found


def prepare(args):
    """The model and the prompts of both sides, in args.folder."""
    import torch
    from default_runs import torchrun
    from generation import SHAPES
    from long_tail import word_model
    from transformers import AutoConfig, AutoModelForCausalLM

    import grpo
    import tasks

    model, n, rng = args.folder / "model", args.prompts * args.steps, random.Random(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.use == "gpu":
        words, sizes = SHAPES[args.shape]
        numbers = [[str(rng.randrange(words - 2)) for _ in range(args.prompt)] for _ in range(n)]
        made = [{"prompt": " ".join(text)} for text in numbers]
        if not model.exists():
            torch.manual_seed(0)
            word_model(model, words, 4096, weights=False, **sizes)
            config = AutoConfig.from_pretrained(model)
            with torch.device("cuda" if args.cuda else "cpu"):  # random numbers are quick there
                lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            lm.save_pretrained(model)
            del lm
            torch.cuda.empty_cache()
    else:
        task = tasks.load_task(grpo.Config(task="sum_digits", prompts_per_step=n))
        made = [{**x, "answer": x["answer"][1:]} for x in (task.problem(0, i) for i in range(n))]
        if not model.exists():
            (data := args.folder / "sums.jsonl").write_text("\n".join(map(written, task.train)))
            how = [f"--data={data}", "--max_tokens=48", "--steps=350", "--save_every=0"]
            torchrun(1, "sft.py", *how, f"--run_dir={args.folder}/sft")
            model.symlink_to(args.folder / "sft/model")
    (args.folder / "prompts.json").write_text(json.dumps(made))


def written(problem: dict) -> str:
    """A demonstration: `314=` and its sum written out, 3+1=4+4=8#8."""
    first, *digits = map(int, problem["prompt"][:-1])
    text, total = str(first), first
    for digit in digits:
        total += digit
        text += f"+{digit}={total}"
    return json.dumps({"prompt": problem["prompt"], "completion": f"{text}#{total}"})


def table(runs: list[dict]) -> str:
    """Medians over the rounds; times: of what the first trainer took in the same round."""
    columns = ("trainer", "seconds a step", "times", "processor s a step", "times", "generate")
    columns += ("train", "sync", "tokens a step", "reward", "rows at once")
    lines, first = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"], {}
    first |= {x["round"]: x for x in reversed(runs)}
    for name in dict.fromkeys(x["name"] for x in runs):
        every = [x for x in runs if x["name"] == name]
        good = [x for x in every if "failed" not in x]
        cells = [] if good else [every[0]["failed"]]
        for key in ("wall_s", "cpu_s", *PARTS, "tokens", "reward") if good else ():
            values = [x[key] for x in good]
            cells.append(f"{statistics.median(values):,.{0 if key == 'tokens' else 3}f}")
            if key in ("wall_s", "cpu_s"):
                cells[-1] += f" ({min(values):.3f} to {max(values):.3f})" * (len(values) > 1)
                times = [x[key] / first[x["round"]].get(key, math.nan) for x in good]
                cells.append(f"{statistics.median(times):.2f}")
        cells += [good[0].get("rows", "")] if good else [""] * (len(columns) - 2)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("use", choices=["cpu", "gpu"])
    parser.add_argument("--shape", default="qwen3-1.7b", help="of gpu: of benchmarks/generation.py")
    parser.add_argument("--python", default=sys.executable, help="the Python that has trl")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one run")
    parser.add_argument("--gpus", type=int, default=1)
    for name in ("steps", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=0)
    texts = {
        "mine": "of OURS, with semicolons; none: -",
        "peers": "of PEERS",
        "kind": "",
        "file": "",
    }
    texts |= {"ours": "more settings of ours", "more": "more of the peer's, as JSON"}
    texts |= {"rows": "the peer's at once; what to try next"}
    for name, text in texts.items():
        parser.add_argument(f"--{name}", default="", help=text or argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    cpu, args.out, args.cuda = args.use == "cpu", args.out.resolve(), torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if args.cuda else 0
    tiny, large = cpu or args.shape == "tiny", memory > 100e9
    args.share = 32e9 / memory if memory else 0.0  # an engine's, for all rows at once
    args.folder = args.out / ("cpu" if cpu else args.shape)
    args.prompts = 16 if cpu else 4 if tiny else 32
    args.prompt, args.new = (8, 34) if cpu else (128, 16 if tiny else 512)
    args.rows = args.rows or ("128" if cpu else "32" if tiny else "32,16,8" if large else "16,8")
    args.tokens = 4096 if tiny else 640 * (32 if large else 26)
    args.lr, args.steps = 1e-4 if cpu else 1e-6, args.steps or (12 if cpu else 5)
    if args.kind:
        peer(args)
        sys.stdout.flush()
        os._exit(0)
    prepare(args)
    two = "2 colocated;1 + 1, age 0;1 + 1, age 1" if args.gpus == 2 else "awake"
    mine = args.mine or ("1 rank;skipped;1 + 1;1 + 2" if cpu else two)
    peers, runs = args.peers or ("plain" if cpu else "plain;liger"), []
    for i in range(args.rounds or (3 if cpu else 1)):
        both = ("nanoforge", ours, mine), ("GRPOTrainer", theirs, peers)
        for who, run, kind in ((w, r, k) for w, r, ks in both for k in ks.split(";") if k != "-"):
            folder = args.folder / f"{who}-{kind.replace(' ', '')}-{i}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            runs.append({"name": f"{who}, {kind}", "round": i, **run(args, kind, folder)})
            (args.out / "step_peer.json").write_text(json.dumps(runs, indent=1))
            print(table(runs[-1:]).splitlines()[-1], flush=True)
    card = torch.cuda.get_device_name() if args.cuda else "CPU"
    print(f"\n{args.use}, {args.shape}, {args.steps} steps, torch {torch.__version__}, {card}\n")
    print(table(runs))


if __name__ == "__main__":
    main()
