"""What each shipped configuration takes of a GPU's memory, counted on paper: a Markdown table.

    python benchmarks/memory.py > benchmarks/memory.md

A trainer holds, in bytes of P parameters over S shards: fp32 weights 4 P/S, AdamW 8 P/S, gradient
4 P/S, which stays from a step's second micro-batch on (with one it grows as activations go); the
bf16 weights of the head and of two layers (a trainer alone: of all). Activations are what a layer
keeps of a token in bf16, in elements: full d; selective 2d + 2h + 2k + 2f, by the inputs and
outputs of its products and attention (hidden size d, queries h, keys k, inner size f). Head: logits
of `head_chunk` words, fp32 and bf16, and the fp32 gradient of the hidden states.
"""

import pathlib
import sys

import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import sft

SHAPES = {  # layers, hidden, inner, query heads, key heads of 128; words, and whether they are tied
    "Qwen/Qwen3-1.7B": (28, 2048, 6144, 16, 8, 151936, True),
    "Qwen/Qwen3-8B": (36, 4096, 12288, 32, 8, 151936, False),
    "Qwen/Qwen3-32B": (64, 5120, 25600, 64, 8, 151936, False),
    "meta-llama/Llama-3.1-8B-Instruct": (32, 4096, 14336, 32, 8, 128256, False),
}
ROOT = pathlib.Path(__file__).parent.parent
GPUS = {"qwen3_1_7b": 2, "qwen3_32b": 32}  # the others: 8
GB, CARD, OVERHEAD = 1e9, 80e9, 4e9  # OVERHEAD: CUDA, NCCL, graphs, fragments


def count(path: pathlib.Path, cfg) -> str:
    """A row of the table."""
    rl = path.parent.name == "grpo"
    layers, d, f, heads, keys, words, tied = SHAPES[cfg.model]
    h, k, n = heads * 128, keys * 128, cfg.tokens_per_microbatch
    layer, embedding = d * (2 * h + 2 * k) + 3 * d * f, words * d
    p = layers * layer + embedding * (1 if tied else 2)
    gpus = GPUS.get(path.stem, 8)
    generators = cfg.num_generators if rl else 0
    shards = gpus - generators
    master, gradient = 12 * p / shards, 4 * p / shards
    gathered = 2 * (p if shards == 1 else embedding * (1 if tied else 2) + 2 * layer)
    kept = {"full": d, "selective": 2 * (d + h + k + f), "none": 4 * d + 3 * h + 4 * k + 3 * f}
    activations = 2 * n * layers * kept[cfg.activation_checkpointing]
    if cfg.activation_checkpointing == "full":
        activations += 2 * n * kept["none"]  # the layer that is made again
    head = n * (6 * cfg.head_chunk + 4 * d)
    trainer = master + gathered + gradient + activations + head + OVERHEAD
    cells = [f"{path.parent.name}/{path.stem}", f"{p / GB:.2f}", f"{generators} + {shards}"]
    parts = (master, gradient, gathered, activations, head, trainer)
    cells += [f"{x / GB:.1f}" for x in parts]
    if rl:
        weights = 2 * p / cfg.tensor_parallel_size
        token = 4 * layers * k / min(cfg.tensor_parallel_size, keys)
        cache = CARD * cfg.gpu_memory_utilization - weights - OVERHEAD
        longest = cfg.max_prompt_tokens + cfg.max_new_tokens
        cells += [f"{weights / GB:.1f}", f"{cache / GB:.0f}", f"{cache / token / longest:,.0f}"]
    else:
        cells += ["", "", ""]
    return f"| {' | '.join(cells)} |"


def main():
    print("# Memory of the shipped configurations, on paper\n")
    print("By `python benchmarks/memory.py`, in GB (1e9 bytes) of one GPU of 80 GB.")
    print("".join(f"\n{line}" for line in __doc__.split("\n\n")[2].splitlines()))
    print(
        "\nMeasured on one GPU, torch's peaks were 0 to 5% above these sums (less the 4 GB in them"
    )
    print("for all else, and with one micro-batch a step less the gradient): RESULTS.md, section")
    print('"A trainer close to the limit of the card".\n')
    columns = (
        "config, parameters 1e9, generators + trainers, weights and AdamW, gradient, gathered bf16,"
    )
    columns += (
        " activations, head, trainer at its peak, engine's weights, its cache, longest rows in it"
    )
    print(f"| {' | '.join(columns.split(', '))} |\n{'|---' * 12}|")
    for path in sorted(ROOT.glob("configs/*/*.yaml")):
        cfg = (grpo if path.parent.name == "grpo" else sft).Config(
            **yaml.safe_load(path.read_text())
        )
        if cfg.model in SHAPES:
            print(count(path, cfg))


if __name__ == "__main__":
    main()
