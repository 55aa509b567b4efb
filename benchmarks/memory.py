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
from types import SimpleNamespace

import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import sft
from report import count_memory

SHAPES = {  # layers, hidden, inner, query heads, key heads of 128; words, and whether they are tied
    "Qwen/Qwen3-1.7B": (28, 2048, 6144, 16, 8, 151936, True),
    "Qwen/Qwen3-8B": (36, 4096, 12288, 32, 8, 151936, False),
    "Qwen/Qwen3-32B": (64, 5120, 25600, 64, 8, 151936, False),
    "meta-llama/Llama-3.1-8B-Instruct": (32, 4096, 14336, 32, 8, 128256, False),
}
NAMES = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads "
NAMES += "vocab_size tie_word_embeddings"
ROOT = pathlib.Path(__file__).parent.parent
GPUS = {"qwen3_1_7b": 2, "qwen3_32b": 32}  # the others: 8
GB, CARD, OVERHEAD = 1e9, 80e9, 4e9  # OVERHEAD: CUDA, NCCL, graphs, fragments


def count(path: pathlib.Path, cfg) -> str:
    """A row of the table."""
    rl = path.parent.name == "grpo"
    shape = dict(zip(NAMES.split(), SHAPES[cfg.model]))
    generators = cfg.num_generators if rl else 0
    shards = GPUS.get(path.stem, 8) - generators
    parts = count_memory(cfg, SimpleNamespace(**shape, head_dim=128), shards, 4, 2)
    p = parts["weights"] * GB / 4 * shards
    layers, k = shape["num_hidden_layers"], shape["num_key_value_heads"] * 128
    keys = shape["num_key_value_heads"]
    trainer = sum(parts.values()) * GB + OVERHEAD
    master = (parts["weights"] + parts["AdamW"]) * GB
    rest = (parts[x] * GB for x in ("gradient", "gathered weights", "activations", "head"))
    cells = [f"{path.parent.name}/{path.stem}", f"{p / GB:.2f}", f"{generators} + {shards}"]
    parts = (master, *rest, trainer)
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
