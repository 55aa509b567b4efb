"""Packed against padded rows on a CPU, forward and backward of the default run's tiny model.

    python benchmarks/packing_cpu.py [rounds]

The same rows in the same micro-batches, turn and turn about: processor seconds of the best rounds
(of which other work takes the least) and the median of the rounds' ratios. Padded: transformers'
own forward (sdpa) over right-padded rows, with the same head over the wanted tokens. Both begin
with tokens, lengths and mask, and give (B, T) log-probs and entropy; that they agree is checked.
"""

import functools
import pathlib
import random
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from model import Policy, head_logprobs, pack_rows

ROOT = pathlib.Path(__file__).parent.parent
LENGTHS = {
    "a batch of the default run": [14 + i * 7 % 27 for i in range(125)] + [72] * 3,
    "one long row": [20 + i % 10 for i in range(127)] + [250],
    "equal rows": [32] * 128,
}


def packed(policy, tokens, length, mask):
    return policy(pack_rows(tokens, length, mask))


def padded(lm, tokens, length, mask):
    hidden = lm.model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    wanted = mask.flatten().nonzero().flatten()  # never a row's first token here
    before, targets = hidden.index_select(0, wanted - 1), tokens.take(wanted)
    found = head_logprobs(before, lm.lm_head.weight, targets, 1.0, 4096)
    blank = found[0].new_zeros(tokens.numel())
    return [blank.index_copy(0, wanted, x).view(tokens.shape) for x in found]


def batches(lengths: list[int], rows: int, in_order: bool) -> list[tuple]:
    """Micro-batches (tokens, length, mask) of so many rows, all but the prompt's 8 wanted."""
    g, out = torch.Generator().manual_seed(0), []
    lengths = sorted(lengths) if in_order else lengths
    for first in range(0, len(lengths), rows):
        length = torch.tensor(lengths[first : first + rows])
        place = torch.arange(int(length.max()))
        real = place < length[:, None]
        tokens = torch.randint(3, 28, real.shape, generator=g) * real
        out.append((tokens, length, real & (place >= 8)))
    return out


def main(rounds: int = 21):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = ROOT / "assets/calculator"
    load = functools.partial(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
    policy = Policy(load(attn_implementation="packed"), 1.0, 4096)
    lm = load(attn_implementation="sdpa")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| rows | rows of a micro-batch | tokens | packed s | padded s | ratio |")
    print("|---|---|---|---|---|---|")
    for name, lengths in LENGTHS.items():
        for rows, in_order in ((128, False), (8, False), (8, True), (1, False)):
            micro, times = batches(lengths, rows, in_order), {packed: [], padded: []}
            turn = [(packed, policy), (padded, lm)]
            for each in micro:
                for ours, theirs in zip(*(run(model, *each) for run, model in turn)):
                    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            for _ in range(rounds):
                random.shuffle(turn)  # who is first finds other things in the caches
                for run, model in turn:
                    start = time.process_time()
                    for each in micro:
                        run(model, *each)[0].sum().backward()
                    times[run].append(time.process_time() - start)
            a, b = min(times[packed]), min(times[padded])
            ratio = statistics.median(x / y for x, y in zip(times[packed], times[padded]))
            kind = f"{rows}, by length" if in_order else str(rows)
            cells = [name, kind, str(sum(lengths)), f"{a:.3f}", f"{b:.3f}", f"{ratio:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
