"""TRL's own tools on the default task, beside the default run: two curves of reward.

    python benchmarks/tools_peer.py OUT --python=PEER --rounds=3     # CPU, 2 cores: 5 minutes

PEER is the Python that has trl (default: this one). Both begin with assets/calculator and see the
same prompts in the same order, 16 x 8 replies of at most 40 tokens and four turns, AdamW, its
clip and a rate that falls alike, no KL. Ours is one rank, `grpo.py --num_generators=0`. TRL's
GRPOTrainer gets a tool, and what its tools need of a tokenizer: a chat template that writes a call
as the model does, `[63*11]`, and a parser for it; vLLM in its process, in fp32 as ours, ends a
turn behind `]`, with the patch that ours needs on a CPU, too. A call that cannot be computed ends
a reply of ours; TRL answers it, with `=`. Processor seconds are those of all processes.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import sys
import time

from step_peer import WARM, watch

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MODEL, PROMPTS, GROUP = ROOT / "assets/calculator", 16, 8
# TRL tries a template with a tool of a longer name, whose name and arguments must come out.
TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{% if call.function.name == 'calculate' %}
{{- '[' }}{{ call.function.arguments.expression }}]
{%- else %}{{ call.function.name }}{{ call.function.arguments }}{% endif %}
{%- endfor %}{% endfor %}"""


def task(args):
    import grpo
    import tasks

    return tasks.load_task(grpo.Config(steps=args.steps, seed=args.seed))


def peer(args):
    """GRPOTrainer in this process; a line in args.file after each step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from engine import ENVIRONMENT, keep_linear_weights
    from examples import calculator

    os.environ |= ENVIRONMENT
    keep_linear_weights()
    import vllm

    build = vllm.LLM.__init__
    vllm.LLM.__init__ = lambda self, *a, **k: build(self, *a, **{**k, "dtype": "float32"})
    tokenizer, game, spent = AutoTokenizer.from_pretrained(MODEL), task(args), {}

    def calculate(expression: str) -> str:
        """The value of an expression.

        Args:
            expression: integers joined by + - * ( )
        """
        result = calculator.calculate(expression)
        return "=" if result is None else f"={result}"

    def parse(ids, prefix=None, tools=None) -> dict:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found = {"role": "assistant", "content": text}
        if call := re.fullmatch(r"(.*)\[([^\[\]]*)\]", text):
            function = {"name": "calculate", "arguments": {"expression": call[2]}}
            found |= {"content": call[1], "tool_calls": [{"type": "function"}]}
            found["tool_calls"][0]["function"] = function
        return found

    tokenizer.chat_template, tokenizer.parse_response = TEMPLATE, parse
    tokenizer.response_template = {"set": "so that TRL does not look for one"}

    def reward(completions, completion_ids, answer, **_) -> list[float]:
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        ends = [re.fullmatch(r"[^#]*#(-?\d+)", text) for text in texts]
        found = [float(end is not None and int(end[1]) == a) for end, a in zip(ends, answer)]
        spent["reward"] = statistics.mean(found)
        spent["calls"] = statistics.mean(text.count("=") for text in texts)
        return found

    class Ticks(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.at = time.perf_counter()

        def on_step_end(self, *_, **__):
            before, self.at = self.at, time.perf_counter()
            line = {"step_s": self.at - before, "generate_s": 0.0, "train_s": 0.0, "sync_s": 0.0}
            with open(args.file, "a") as f:
                f.write(json.dumps({**line, "tokens": 0, **spent}) + "\n")

    how = {"output_dir": str(args.out / "trl"), "max_steps": args.steps, "seed": args.seed}
    how |= {"learning_rate": 6.5e-4, "lr_scheduler_type": "linear", "weight_decay": 0.0}
    how |= {"adam_beta2": 0.95, "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "bf16": False}
    how |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    how |= {"num_generations": GROUP, "max_completion_length": 40, "epsilon_high": 0.28}
    how |= {"max_tool_calling_iterations": 3, "shuffle_dataset": False, "report_to": "none"}
    how |= {"per_device_train_batch_size": PROMPTS * GROUP, "gradient_accumulation_steps": 1}
    how |= {"use_cpu": True, "dataloader_pin_memory": False, "gradient_checkpointing": False}
    how |= {"use_vllm": True, "vllm_enable_sleep_mode": False, "vllm_max_model_length": 72}
    how |= {"vllm_gpu_memory_utilization": 0.3, "vllm_importance_sampling_correction": False}
    how |= {"model_init_kwargs": {"dtype": "float32"}}
    how |= {"generation_kwargs": {"stop_token_ids": tokenizer.encode("]")[-1:]}}
    slots = [game.problem(step, i) for step in range(args.steps) for i in range(PROMPTS)]
    rows = [{"prompt": [{"role": "user", "content": x["prompt"]}], "answer": x["answer"]}
            for x in slots]  # fmt: skip
    more = {"tools": [calculate], "processing_class": tokenizer, "callbacks": [Ticks()]}
    GRPOTrainer(str(MODEL), reward, GRPOConfig(**how), Dataset.from_list(rows), **more).train()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--python", default=sys.executable, help="the Python that has trl")
    parser.add_argument("--steps", type=int, default=46)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="of both, with seeds one up")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one run")
    parser.add_argument("--file", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out, args.cuda = args.out.resolve(), False
    args.out.mkdir(parents=True, exist_ok=True)
    if args.file:
        peer(args)
        sys.stdout.flush()
        os._exit(0)
    marks, ours, theirs = range(0, args.steps, 5), args.out / "ours", args.out / "theirs.jsonl"
    columns = ["trainer", "seed", "processor s a step", *(f"from step {k}" for k in marks)]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for seed in range(args.seed, args.seed + args.rounds):
        theirs.unlink(missing_ok=True)
        shutil.rmtree(ours, ignore_errors=True)
        ours.mkdir()
        same = [f"--seed={seed}", f"--steps={args.steps}"]
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "grpo.py"]
        command += ["--num_generators=0", "--save_every=0", "--eval_size=0", f"--run_dir={ours}"]
        runs = {"nanoforge": watch([sys.executable, *command, *same], ours / "metrics.jsonl", args)}
        command = [args.python, __file__, str(args.out), f"--file={theirs}", *same]
        runs["GRPOTrainer"] = watch(command, theirs, args)
        (args.out / f"tools_peer-{seed}.json").write_text(json.dumps(runs, indent=1))
        for name, found in runs.items():
            cells = [name, seed, found.get("failed") or f"{found['cpu_s']:.3f}"]
            rewards = [x["reward"] for x in found.get("steps", [])]
            cells += [f"{statistics.mean(rewards[k : k + 5]):.3f}" for k in marks if rewards]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\nmeans over five steps; processor seconds without the first {WARM} steps")


if __name__ == "__main__":
    main()
