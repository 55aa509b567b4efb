"""Kernels of a trainer's step by themselves: attention on short packed rows, the head by its chunk.

    python benchmarks/short_rows.py     # one GPU, a minute

Rows of 32,768 tokens with lengths like Alpaca's (`sft_peer.rows`), and the heads of Qwen3-0.6B and
1.7B: 16 of queries, 8 of keys and values, 128 wide; bf16. Attention: `flash` is what model.py calls
on uneven rows; `efficient` torch's other packed kernel; `flex` flex_attention, compiled, in blocks
of 128 tokens; `cuDNN` rows padded to multiples of 64 or 128, a call for each width. "Apart": how
far the output and the gradients of queries, keys and values are from flash's, in their norm. Head:
`head_logprobs` of 21,632 tokens and 151,936 words, forward and backward, by the words whose logits
exist at once.
"""

import functools
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from sft_peer import rows  # noqa: E402

from model import head_logprobs  # noqa: E402

HEADS, KV_HEADS, WIDE, TOKENS, LAYERS, WORDS = 16, 8, 128, 32768, 28, 151_936
aten, SCALE = torch.ops.aten, WIDE**-0.5


def lengths_of_rows() -> list[int]:
    """As many rows as fit, and one more that fills up."""
    lengths = []
    for row in rows(1000):
        if sum(lengths) + len(row["tokens"]) > TOKENS:
            return [*lengths, TOKENS - sum(lengths)] if sum(lengths) < TOKENS else lengths
        lengths.append(len(row["tokens"]))


def packed(lengths: list[int], starts: torch.Tensor) -> dict:
    longest = max(lengths)
    span = starts, starts, longest, longest

    def flash(q, k, v):
        return aten._flash_attention_forward(q, k, v, *span, 0.0, True, False, scale=SCALE)[0]

    def efficient(q, k, v):
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        how = (None, *span, 0.0, 1, True)
        return aten._efficient_attention_forward(q[None], k[None], v[None], *how, scale=SCALE)[0][0]

    return {"flash": flash, "efficient": efficient}


def flex(lengths: list[int], block: int = 128):
    """Which blocks see which follows from where rows begin: the mask of all pairs is never made."""
    counts = torch.tensor(lengths)
    row, first = torch.arange(len(lengths)).repeat_interleave(counts), counts.cumsum(0) - counts
    n = TOKENS // block
    least = first[row][::block] // block  # (n,) the first block that a block of queries sees
    seen = torch.arange(n) - least + 1
    which = (least[:, None] + torch.arange(n)).clamp(max=n - 1)
    row = row.cuda()

    def mask(b, h, q, k):
        return (row[q] == row[k]) & (q >= k)

    seen, which = (x[None, None].int().cuda() for x in (seen, which))
    size = {"BLOCK_SIZE": block, "mask_mod": mask, "seq_lengths": (TOKENS, TOKENS)}
    blocks = BlockMask.from_kv_blocks(seen, which, None, None, **size)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(q, k, v, block_mask=blocks, scale=SCALE, enable_gqa=True)
        return out[0].transpose(0, 1)

    return call


def buckets(lengths: list[int], starts: torch.Tensor, step: int):
    """Rows of about one width side by side, gathered and put back; what is padded goes nowhere."""
    plan, n = [], torch.tensor(lengths)
    wide = (n + step - 1) // step * step
    for w in wide.unique().tolist():
        of_width = (wide == w).nonzero().flatten()
        slot = torch.arange(w)
        at = starts.cpu()[of_width][:, None] + slot
        at = torch.where(slot < n[of_width, None], at, TOKENS).flatten().cuda()
        plan.append((len(of_width), w, at))

    def call(q, k, v):
        q, k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (q, k, v))
        out = q.new_zeros(TOKENS + 1, HEADS, WIDE)
        for count, w, at in plan:
            a, b, c = (x[at].view(count, w, -1, WIDE).transpose(1, 2) for x in (q, k, v))
            cudnn = aten._scaled_dot_product_cudnn_attention
            part = cudnn(a, b, c, None, True, 0.0, True, False, scale=SCALE)[0]
            out = out.index_copy(0, at, part.transpose(1, 2).reshape(-1, HEADS, WIDE))
        return out[:TOKENS]

    return call


def head_alone(hidden, head, words, chunk):
    return head_logprobs(hidden, head, words, 1.0, chunk)[0]


def both(call, inputs, grad) -> tuple:
    """The output, and the gradient of each input."""
    out = call(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad))


def milliseconds(function, *given, times: int = 10) -> float:
    for _ in range(3):
        function(*given)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        function(*given)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def main():
    if not torch.cuda.is_available():
        sys.exit("benchmarks/short_rows.py needs a GPU: it times nothing but kernels")
    torch.manual_seed(0)
    lengths = lengths_of_rows()
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().cuda()
    made = [torch.randn(TOKENS, h, WIDE).cuda().bfloat16() for h in (HEADS, KV_HEADS, KV_HEADS)]
    inputs, grad = [x.requires_grad_() for x in made], torch.randn(TOKENS, HEADS, WIDE).cuda()
    grad, base = grad.bfloat16(), None
    kinds = packed(lengths, starts) | {"flex": flex(lengths)}
    kinds |= {f"cuDNN, {step}": buckets(lengths, starts, step) for step in (64, 128)}
    print(f"{len(lengths)} rows, torch {torch.__version__}, {torch.cuda.get_device_name()}\n")
    columns = "attention", "forward, ms", "with backward", f"that of {LAYERS} layers", "apart"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, call in kinds.items():
        found = both(call, inputs, grad)
        base = base or found
        pairs = [(x.float(), y.float()) for x, y in zip(found, base)]
        apart = " ".join(f"{float((x - y).norm() / y.norm()):.0e}" for x, y in pairs)
        with torch.no_grad():
            forward = milliseconds(call, *inputs)
        whole = milliseconds(both, call, inputs, grad)
        cells = name, f"{forward:.2f}", f"{whole:.2f}", f"{whole * LAYERS:.0f}", apart
        print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| words at once | hidden size 1,024, ms | 2,048, ms |\n|---|---|---|")
    words = torch.randint(WORDS, (21632,), device="cuda")
    for chunk in (512, 1024, 2048, 4096, 8192, 16384):
        cells = []
        for size in (1024, 2048):
            hidden, head = torch.randn(21632, size).cuda(), torch.randn(WORDS, size).cuda() * 0.02
            made = [x.bfloat16().requires_grad_() for x in (hidden, head)]
            logprobs = functools.partial(head_alone, words=words, chunk=chunk)
            cells.append(f"{milliseconds(both, logprobs, made, torch.ones(21632).cuda()):.1f}")
        print(f"| {chunk:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
