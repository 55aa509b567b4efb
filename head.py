"""The head: log-probs and entropy of chosen tokens, without the logits of a whole vocabulary.

The words go by in chunks. Products of full size make (K, chunk) logits; one pass over them folds
them into the softmax, and in the backward, where they are made again, turns them into a gradient.
A word's weights get theirs in one product over all tokens.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # without a GPU
    triton = None


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in at least float32, also from bf16 inputs: logits must not be rounded to bf16."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor):
    """total += a @ b, in total's type."""
    if a.is_cuda and a.dtype != total.dtype:  # within the product: no pass over the total
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += matmul_fp32(a, b)


def by_row(kernel, logits, *args):
    """A program for each row, which it reads once."""
    block = triton.next_power_of_2(logits.shape[1])
    kernel[(len(logits),)](logits, *args, *logits.shape, block, num_warps=8)


def absorb(logits, targets, temperature: float, state):
    """Fold logits (K, chunk) of some words into what is known of the softmax over all, (4, K):
    largest logit, sum of exp(logit - largest), that sum times the logits, the target's logit.

    Targets (K,) count from the chunk's first word, and may lie outside of it.
    """
    if logits.is_cuda and logits.dtype == torch.float32:
        return by_row(absorb_kernel, logits, targets, 1 / temperature, state)
    logits, (top, total, product, chosen) = logits / temperature, state
    higher = torch.maximum(top, logits.amax(-1))
    p, shrink = (logits - higher[:, None]).exp(), (top - higher).exp()
    here = (targets >= 0) & (targets < logits.shape[1])
    found = logits.gather(-1, targets.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    total, product = total * shrink + p.sum(-1), product * shrink + (p * logits).sum(-1)
    state.copy_(torch.stack([higher, total, product, torch.where(here, found, chosen)]))


def logit_gradient(logits, targets, temperature: float, logsumexp, grad, out):
    """d(sum of grad * log-prob) / d(logits before the temperature) -> out (K, chunk)."""
    if logits.is_cuda and logits.dtype == torch.float32:
        return by_row(gradient_kernel, logits, targets, 1 / temperature, logsumexp, grad, out)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    probability = (logits / temperature - logsumexp[:, None]).exp()
    out.copy_((hit.to(logits.dtype) - probability) * (grad / temperature)[:, None])


if triton:

    @triton.jit
    def absorb_kernel(logits, targets, scale, state, K, C, BLOCK: tl.constexpr):
        row, at = tl.program_id(0), tl.arange(0, BLOCK)
        target = tl.load(targets + row)
        x = tl.load(logits + row.to(tl.int64) * C + at, at < C, float("-inf")) * scale
        top, total = tl.load(state + row), tl.load(state + K + row)
        product = tl.load(state + 2 * K + row)
        higher = tl.maximum(top, tl.max(x))
        p, shrink = tl.exp(x - higher), tl.exp(top - higher)
        tl.store(state + row, higher)
        tl.store(state + K + row, total * shrink + tl.sum(p))
        tl.store(state + 2 * K + row, product * shrink + tl.sum(tl.where(at < C, p * x, 0.0)))
        if (target >= 0) & (target < C):
            tl.store(state + 3 * K + row, tl.sum(tl.where(at == target, x, 0.0)))

    @triton.jit
    def gradient_kernel(logits, targets, scale, lse, grad, out, K, C, BLOCK: tl.constexpr):
        row, at = tl.program_id(0), tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * C + at, at < C, float("-inf")) * scale
        hit = tl.where(at == tl.load(targets + row), 1.0, 0.0)
        d = (hit - tl.exp(x - tl.load(lse + row))) * tl.load(grad + row) * scale
        tl.store(out + row.to(tl.int64) * C + at, d.to(out.dtype.element_ty), at < C)


class ChunkedHead(torch.autograd.Function):
    """log p(target) and entropy, `chunk` words at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        state = hidden.new_zeros(4, len(targets), dtype=wide)
        state[0] = -torch.inf
        for first in range(0, len(weight), chunk):
            logits = matmul_fp32(hidden, weight[first : first + chunk].T)  # (K, chunk)
            absorb(logits, targets - first, temperature, state)
        top, total, product, chosen = state
        logsumexp = top + total.log()
        entropy = logsumexp - product / total
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return chosen - logsumexp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        d_hidden, d_weight = torch.zeros_like(hidden, dtype=grad.dtype), torch.empty_like(weight)
        grad = grad.contiguous()
        for first in range(0, len(weight), ctx.chunk):
            words = weight[first : first + ctx.chunk]
            logits = matmul_fp32(hidden, words.T)  # (K, chunk)
            d_logits = torch.empty_like(logits, dtype=weight.dtype)
            logit_gradient(logits, targets - first, ctx.temperature, logsumexp, grad, d_logits)
            add_product(d_hidden, d_logits, words)
            torch.mm(d_logits.T, hidden, out=d_weight[first : first + ctx.chunk])
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def head_logprobs(hidden, weight, targets, temperature: float, chunk: int):
    """(K, D) hidden states, (V, D) head, (K,) targets -> log-probs and entropy (K,) each, float32.

    chunk=0 is the dense head, written plainly: all (K, V) logits at once.
    """
    if chunk and len(targets):
        return ChunkedHead.apply(hidden, weight, targets, temperature, chunk)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature  # (K, V)
    logp = logits.log_softmax(-1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy
