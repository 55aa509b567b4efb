"""Uneven work: replies with a long tail, at ages 0, 1 and 4, beside plain LLM.generate.

    python benchmarks/long_tail.py OUT                  # CPU, 2 cores: 6 minutes
    python benchmarks/long_tail.py OUT --model=FOLDER --rows 32x8 --max_new_tokens=1024 ...   # GPU
    ... --alone --warm=3 --only="1 + 1, age 0;2 colocated, age 0"     # without the peer; some runs

LLM.generate gets prompts and lengths as a run had them, a batch at a time, in as many places and
with log-probs: what an engine does when nothing has to be synchronised. Ours count twice, over the
seconds in which an engine stepped and over the whole step. Then where the seconds of each side
go, and how far apart two engines finish when they take prompts from one counter, and dealt out.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

LARGE = ["--prompts_per_step=32", "--max_num_seqs=16"]  # more rows than two engines have places
RUNS = {  # name -> ranks, settings
    "1 + 1, age 0": (2, ["--num_generators=1"]),
    "1 + 1, age 1": (2, ["--num_generators=1", "--max_policy_age=1"]),
    "1 + 1, age 4": (2, ["--num_generators=1", "--max_policy_age=4"]),
    "1 colocated, age 0": (1, ["--num_generators=0"]),
    "1 colocated, age 1": (1, ["--num_generators=0", "--max_policy_age=1", "--sleep=no"]),
    "2 + 1, one counter": (3, ["--num_generators=2", *LARGE]),
    "2 + 1, dealt out": (3, ["--num_generators=2", "--deterministic=true", *LARGE]),
    "2 colocated, age 0": (2, ["--num_generators=0", "--sleep=no"]),  # only where asked for
}


def word_model(folder: pathlib.Path, words: int, positions: int, weights=True, **sizes):
    """A Qwen3 of random weights and so many words, one of which ends a reply: limits do, nearly
    always. Returns its folder.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    words = ["<pad>", "<eos>", *map(str, range(words - 2))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    tokens.save_pretrained(folder)
    config = Qwen3Config(vocab_size=len(words), max_position_embeddings=positions, **sizes)
    config.update({"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0})
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    if weights:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


TINY = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, head_dim=32)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)


def settings(args) -> list[str]:
    prompts, group = args.rows.split("x")
    given = [f"--model={args.model}", f"--task={HERE.parent}/examples/long_tail.py:LongTail"]
    given += [f"--prompts_per_step={prompts}", f"--group_size={group}", f"--steps={args.steps}"]
    given += ["--max_prompt_tokens=8", f"--max_new_tokens={args.max_new_tokens}", "--max_turns=1"]
    return [*given, "--eval_size=0", "--save_rollouts=true", "--lr=1e-4", *args.more]


def plain(args, folder: pathlib.Path) -> float:
    """Tokens per second of LLM.generate on the batches of a run. Runs in a process of its own."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import time

    import torch
    import vllm

    from engine import keep_linear_weights
    from report import load_rollouts

    if not torch.cuda.is_available():
        keep_linear_weights()
    llm = vllm.LLM(
        model=str(args.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        max_model_len=8 + args.max_new_tokens,
        max_num_seqs=args.places,
        enforce_eager=not torch.cuda.is_available(),
        enable_chunked_prefill=torch.cuda.is_available(),
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    )
    tokens = seconds = 0
    for step in range(args.steps):
        table = load_rollouts(folder / f"rollouts/{step}")
        first = table.mask.int().argmax(1)
        prompts = [{"prompt_token_ids": t[:n].tolist()} for t, n in zip(table.tokens, first)]
        params = [
            vllm.SamplingParams(
                max_tokens=int(n), ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False
            )
            for n in table.sampled
        ]
        start = time.perf_counter()
        made = llm.generate(prompts, params, use_tqdm=False)
        seconds += time.perf_counter() - start
        tokens += sum(len(m.outputs[0].token_ids) for m in made)
    return tokens / seconds


def judge(folder: pathlib.Path, warm: int) -> dict:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [x for x in lines if "reward" in x][warm:]  # starts and compilations are in the first

    def total(*names):
        return sum(x.get(n, 0.0) for x in rows for n in names)

    tokens, steps = total("tokens"), total("step_s")
    theirs = total("generate_s", "idle_generator_s", "other_generator_s")
    theirs = theirs if "other_generator_s" in rows[0] else steps
    parts = ("train_s", "idle_trainer_s", "sync_s", "other_trainer_s")
    whole = [x for x in lines if "reward" in x]  # engines step in it, too, once they are built
    return {
        "stepping": sum(x["tokens"] for x in whole) / sum(x["generate_s"] for x in whole),
        "whole": tokens / steps,
        "generators": [total(n) / theirs for n in ("generate_s", "idle_generator_s")],
        "trainers": [total(n) / steps for n in parts],
        "mean": tokens / len(rows),
        "reward": sum(x["reward"] for x in rows) / len(rows),
    }


def main():
    from default_runs import torchrun
    from topologies import engines_apart

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--rows", default="8x4")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument(
        "--warm", type=int, default=1, help="first steps left out, but of the first column"
    )
    parser.add_argument("--only", default=";".join(list(RUNS)[:-1]))
    parser.add_argument("--plain", type=pathlib.Path)
    parser.add_argument("--alone", action="store_true", help="without LLM.generate")
    parser.add_argument("--places", type=int, default=256)
    args, args.more = parser.parse_known_args()
    if args.warm >= args.steps:
        parser.error(f"--warm={args.warm} leaves nothing of --steps={args.steps}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = bool(args.model)
    args.model = args.model or str(word_model(out / "model", 2048, 1024, **TINY))
    if args.plain:
        print(f"tokens per second: {plain(args, args.plain)}")
        return
    lines, peer = [], {}
    for name in args.only.split(";"):
        ranks, more = RUNS[name]
        folder = out / name.replace(" ", "").replace(",", "-")
        torchrun(ranks, "grpo.py", *settings(args), *more, f"--run_dir={folder}")
        engines = ranks if "colocated" in name else ranks - 1
        places = 16 if more[-2:] == LARGE else 256
        if (
            places not in peer and not args.alone
        ):  # the peer's batches are those of the first run of that shape
            again = [sys.executable, __file__, str(out), f"--plain={folder}", f"--places={places}"]
            again += [*sys.argv[2:], *([] if given else [f"--model={args.model}"])]
            said = subprocess.run(again, check=True, capture_output=True, text=True).stdout
            peer[places] = float(said.rpartition(": ")[2])
            print(f"LLM.generate, {places} places: {peer[places]:,.0f} tokens/s", flush=True)
        d = judge(folder, args.warm)
        share = "" if args.alone else f"{d['stepping'] / engines / peer[places]:.0%}"
        busy, idle = (f"{x:.0%}" for x in d["generators"])
        train, wait, sync, other = (f"{x:.0%}" for x in d["trainers"])
        apart = f"{engines_apart(folder, 1):.2f}" if engines > 1 else ""
        lines.append(
            f"| {name} | {d['stepping']:,.0f} | {share} | {d['whole']:,.0f} | {busy} | {idle} "
            f"| {train} | {wait} | {sync} | {other} | {apart} | {d['reward']:.3f} |"
        )
        print(lines[-1], flush=True)
    print(
        "| run | tokens/s while stepping | of LLM.generate, per engine | tokens/s in all "
        "| engines: step | wait | trainers: train | wait | sync | other | engines end apart, s "
        "| reward |\n|" + "---|" * 12
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
