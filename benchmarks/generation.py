"""Generation inside the loop beside plain LLM.generate: tokens a second, rows from their first
token to their reward and into the table.

    python benchmarks/generation.py OUT                   # Qwen3-1.7B's shape, one GPU: 6 minutes
    python benchmarks/generation.py OUT --shape=tiny --rows 16 32 --new=32       # a CPU, to try it

Prompts of 128 tokens, eight replies to each, 512 new tokens each, random weights (speed does not
depend on them), CUDA graphs. The peer is vLLM as it comes, in a process of its own and without
anything of ours: no log-probs, the sampled token's (`logprobs=0`), and, for the fewest rows, those
in flat form. Ours is Generator.collect: admission, the loop around the engine's steps, rewards and
the table; version borders between batches. Best of the repeats for both. The floor is memory's:
each step reads the weights once and the cache of every row. Writes OUT/generation.json.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

QWEN3 = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, head_dim=128)
QWEN3 |= dict(num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True)
SHAPES = {"qwen3-1.7b": (151_936, QWEN3)}
LARGE = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)
LARGE |= dict(num_attention_heads=32, tie_word_embeddings=False)
SHAPES["qwen3-8b"] = (151_936, {**QWEN3, **LARGE})
SHAPES["tiny"] = (2048, {**QWEN3, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
SHAPES["tiny"][1].update(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
PROMPT, GROUP = 128, 8
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second, by their data sheets


def prompts(n: int, words: int) -> list[list[int]]:
    """n lists of token ids, each eight times."""
    rng = random.Random(0)
    unique = [[rng.randrange(2, words) for _ in range(PROMPT)] for _ in range(n // GROUP)]
    return [p for p in unique for _ in range(GROUP)]


def note(args, part: str, found: dict, what: str, speed: float):
    """Said and written as it comes: a run that is cut short has told what it knew."""
    import torch

    found[what] = speed
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name()
    print(f"{what}: {speed:,.0f} tokens/s", flush=True)
    (args.out / f"{part}.json").write_text(json.dumps(found))


def plain(args, model: pathlib.Path, words: int):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import torch
    import vllm

    cuda = torch.cuda.is_available()
    llm = vllm.LLM(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16" if cuda else "float32",
        max_model_len=PROMPT + args.new,
        max_num_seqs=max(args.rows),
        gpu_memory_utilization=0.85,
        enforce_eager=not cuda,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    )
    kinds = {"no log-probs": {}, "log-probs": {"logprobs": 0}}
    kinds["flat log-probs"] = {"logprobs": 0, "flat_logprobs": True}
    kinds = {k: kinds[k] for k in args.kinds.split(",")}
    found = {}
    for n in args.rows:
        asked = [{"prompt_token_ids": p} for p in prompts(n, words)]
        for kind, how in kinds.items():
            if kind.startswith("flat") and n > args.rows[0]:
                continue
            one = {"max_tokens": args.new, "ignore_eos": True, "detokenize": False, **how}
            params, best = vllm.SamplingParams(temperature=1.0, **one), 0.0
            for _ in range(args.repeats):
                llm.reset_prefix_cache()
                start = time.perf_counter()
                made = llm.generate(asked, params, use_tqdm=False)
                seconds = time.perf_counter() - start
                best = max(best, sum(len(m.outputs[0].token_ids) for m in made) / seconds)
            note(args, "plain", found, f"{n} {kind}", best)


def loop(args, model: pathlib.Path, words: int):
    import torch
    from transformers import AutoTokenizer

    import grpo
    from generator import Generator
    from runtime import World
    from tasks import Task

    class Numbers(Task):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.rewards = [self.length]
            texts = [" ".join(str(t - 2) for t in p) for p in prompts(max(args.rows) * 8, words)]
            self.train = [{"prompt": text} for text in texts[::GROUP]]
            self.heldout = self.train[:1]

        def length(self, episode) -> float:
            return float(len(episode.text))

    cfg = grpo.Config(model=str(model), group_size=GROUP, max_num_seqs=max(args.rows), steps=1000)
    cfg.max_prompt_tokens, cfg.max_new_tokens, cfg.max_turns = PROMPT, args.new, 1
    cfg.sleep, cfg.eval_size, cfg.num_generators = "no", 0, 0
    world, found, step = World(0), {}, 0
    world.connect()
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = Generator(cfg, world, Numbers(cfg), tokenizer)
    # The peer lets a row go on behind its EOS; of 151,936 words one is EOS, so one row in 300 ends.
    for n in args.rows:
        cfg.prompts_per_step, best = n // GROUP, 0.0
        for _ in range(args.repeats):
            generator.new_version()  # as a sync does, without other weights
            start = time.perf_counter()
            table = generator.collect(step)
            best, step = (
                max(best, int(table.sampled.sum()) / (time.perf_counter() - start)),
                step + 1,
            )
            assert len(table) == n and int(table.mask.sum()) == int(table.sampled.sum())
        note(args, "loop", found, f"{n} loop", best)
    if args.profile:
        import cProfile
        import pstats

        cfg.prompts_per_step = args.rows[0] // GROUP
        generator.new_version()
        with cProfile.Profile() as profile:
            generator.collect(step)
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)
        if torch.cuda.is_available():
            generator.new_version()
            with torch.profiler.profile() as profile:
                generator.collect(step + 1)
            order = {"sort_by": "cuda_time_total", "row_limit": 16, "max_name_column_width": 60}
            print(profile.key_averages().table(**order))
    world.close()


def floor(rows: int, new: int, sizes: dict, words: int, card: str) -> float:
    """Tokens a second if a step only read its weights and cache, at the card's bandwidth."""
    bandwidth = next((b for name, b in BANDWIDTH.items() if name in card), float("nan"))
    d, ffn, layers = (sizes[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, kv = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    size = sizes["head_dim"]
    weights = layers * (2 * heads * size * d + 2 * kv * size * d + 3 * d * ffn) + words * d
    cache = rows * (PROMPT + new / 2) * layers * 2 * kv * size
    return rows / (2 * (weights + cache) / bandwidth)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--kinds", default="no log-probs,log-probs,flat log-probs", help="of LLM.generate"
    )
    parser.add_argument("--part", choices=["plain", "loop"])
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if unknown := {*args.kinds.split(",")} - {"no log-probs", "log-probs", "flat log-probs"}:
        parser.error(f"--kinds: there is no {unknown.pop()!r}")
    args.out = out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    words, sizes = SHAPES[args.shape]
    if args.part:
        part = {"plain": plain, "loop": loop}[args.part]
        part(args, out / "model", words)
        sys.stdout.flush()
        os._exit(0)
    from long_tail import word_model

    word_model(out / "model", words, PROMPT + args.new, weights=False, **sizes)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    for part, first in (("loop", launch), ("plain", [])):
        command = [sys.executable, *first, __file__, *sys.argv[1:], f"--part={part}"]
        subprocess.run(command, check=True)
    found = {}
    for part in ("plain", "loop"):
        found |= json.loads((out / f"{part}.json").read_text())
    (out / "generation.json").write_text(json.dumps(found, indent=2))
    kinds = ("no log-probs", "log-probs", "flat log-probs", "loop")
    print(f"card: {found.get('card', 'CPU')}, tokens/s; floor by bandwidth")
    print("| rows | " + " | ".join(kinds) + " | of log-probs | of none | floor, share |")
    print("|---" * (len(kinds) + 4) + "|")
    for n in args.rows:
        speeds = [found.get(f"{n} {k}", 0.0) for k in kinds]
        least = floor(n, args.new, sizes, words, found.get("card", ""))
        cells = [f"{s:,.0f}" if s else "" for s in speeds]
        cells += [f"{speeds[3] / s:.1%}" if s else "" for s in (max(speeds[1:3]), speeds[0])]
        print(f"| {n} | " + " | ".join(cells) + f" | {least:,.0f}, {speeds[3] / least:.0%} |")


if __name__ == "__main__":
    main()
