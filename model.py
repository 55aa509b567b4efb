"""The policy: a Hugging Face causal LM under FSDP2. Packed rows in, log-probs out. Rows lie one
behind the other in one sequence without padding, or side by side where they are about even;
attention keeps them apart. The head never holds all logits, but some words' at a time."""

import functools
import pathlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM

from runtime import UserError

aten = torch.ops.aten


@dataclass
class Pack:
    """A micro-batch of P tokens, made on the host: the GPU need not stop."""

    tokens: torch.Tensor  # (R, L) int64: (rows, longest) if even, else (1, P), one after the other
    positions: torch.Tensor  # (1, L) int64: each token's place in its row
    starts: torch.Tensor  # (rows + 1,) int32: where each row starts among the P, and the end
    slot: torch.Tensor  # (P,) int64: each token's place in the padded layout (rows, longest)
    wanted: torch.Tensor  # (K,) int64: the tokens whose log-probs are asked for
    longest: int
    even: bool  # all rows have `longest` tokens
    shape: tuple[int, int]  # (B, T) of what was packed


def pack_rows(tokens, length, mask, device: str | torch.device = "cpu") -> Pack:
    """Host tokens (B, T), lengths (B,), wanted tokens (B, T) bool -> Pack on the device. Rows about
    even get equal room. On a GPU one more row rounds P up: compiled functions see few shapes."""
    (b, t), device, room = tokens.shape, torch.device(device), length.tolist()
    total, wide = sum(room), few_sizes(t) if device.type == "cuda" else t
    if b * wide <= total * 17 / 16:
        room = [wide] * b
    elif device.type == "cuda":
        room.append(few_sizes(total) - total)
    rows, longest = len(room), max(t, *room)
    tokens = F.pad(tokens, (0, longest - t, 0, rows - b))
    mask = F.pad(mask[:, 1:], (1, longest - t, 0, rows - b))  # nothing is before a first token
    slot, even = torch.arange(rows * longest), min(room) == longest
    positions = slot[None, :longest]
    if not even:
        slot = (positions < torch.tensor(room)[:, None]).flatten().nonzero().flatten()
        tokens, mask = (x.flatten().index_select(0, slot)[None] for x in (tokens, mask))
        positions = slot[None] % longest
    starts = F.pad(torch.tensor(room).cumsum(0), (1, 0)).int()
    parts = tokens, positions, starts, slot, mask.flatten().nonzero().flatten()
    return Pack(*(send(x, device) for x in parts), longest, even, (b, t))


def few_sizes(n: int) -> int:
    """n rounded up by less than 1/16, or to 64; powers of 2 stay."""
    step = max(2 ** ((n - 1).bit_length() - 5), 64)
    return -(-n // step) * step


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device; from pinned memory, so that the host goes on meanwhile."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def packed_attention(module, query, key, value, mask, scaling=None, pack: Pack = None, **kwargs):
    """Queries (R, H, L, D), keys, values (R, H_kv, L, D) -> (R, L, H, D), causal in each row. CUDA:
    cuDNN's kernel, the faster, on rows of one length, else flash attention over the pack. CPU: rows
    padded for this one operation (the pack would cost P^2) at the end, where causality hides it."""
    fast, n = query.is_cuda and query.dtype == torch.bfloat16, len(pack.starts) - 1  # n: rows
    if not pack.even:
        xs = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # (P, H, D)
        if fast:
            at, how = (pack.starts, pack.starts, pack.longest, pack.longest), (0.0, True, False)
            return aten._flash_attention_forward(*xs, *at, *how, scale=scaling)[0][None], None
        xs = [x.new_zeros(n * pack.longest, *x.shape[1:]).index_copy(0, pack.slot, x) for x in xs]
        query, key, value = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in xs)
    if fast:
        cudnn = aten._scaled_dot_product_cudnn_attention
        out = cudnn(query, key, value, None, True, 0.0, True, False, scale=scaling)[0]
    else:
        how = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, **how)
    out = out.transpose(1, 2)  # (rows, longest, H, D)
    return out if pack.even else out.flatten(0, 1).index_select(0, pack.slot)[None], None


transformers.AttentionInterface.register("packed", packed_attention)
# Rows are told apart by Pack, not by a mask.
transformers.AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in at least float32, also from bf16 inputs: logits must not be rounded to bf16."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def absorb(state, logits, targets, temperature):
    """Fold logits (K, chunk) of some words into what is known of all, (K,) each: largest logit, sum
    of exp(logit - largest), that sum times the logits, the target's logit."""
    (top, total, product, chosen), logits = state, logits / temperature
    higher = torch.maximum(top, logits.amax(-1))
    p, shrink = (logits - higher[:, None]).exp(), (top - higher).exp()
    total, product = total * shrink + p.sum(-1), product * shrink + (p * logits).sum(-1)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return higher, total, product, chosen + torch.where(hit, logits, 0).sum(-1)


def logit_gradient(logits, targets, temperature, logsumexp, grad, dtype):
    """d(sum of grad * log-prob) / d(logits before the temperature): (K, chunk)."""
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    probability = (logits / temperature - logsumexp[:, None]).exp()
    return ((hit.to(logits.dtype) - probability) * (grad / temperature)[:, None]).to(dtype)


# On a GPU: one pass over the logits in place of ten.
fused = functools.cache(functools.partial(torch.compile, dynamic=True))


class ChunkedHead(torch.autograd.Function):
    """log p(target) and entropy, `chunk` words of the vocabulary at a time; the backward makes the
    logits again. A word's weights get their gradient in one product over all tokens."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        zero = hidden.new_zeros(len(targets), dtype=wide)
        state = (zero - torch.inf, zero, zero, zero)
        step = fused(absorb) if hidden.is_cuda else absorb
        for first in range(0, len(weight), chunk):
            logits = matmul_fp32(hidden, weight[first : first + chunk].T)  # (K, chunk)
            state = step(state, logits, targets - first, temperature)
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
        d_hidden = torch.zeros_like(hidden, dtype=grad.dtype)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        step = fused(logit_gradient) if hidden.is_cuda else logit_gradient
        for first in range(0, len(weight), ctx.chunk):
            words, here = weight[first : first + ctx.chunk], targets - first
            logits = matmul_fp32(hidden, words.T)  # (K, chunk)
            d_logits = step(logits, here, ctx.temperature, logsumexp, grad, weight.dtype)
            if weight.is_cuda and weight.dtype != grad.dtype:  # += within the product
                aten.addmm.dtype_out(d_hidden, d_logits, words, grad.dtype, out=d_hidden)
            else:
                d_hidden += matmul_fp32(d_logits, words)
            if d_weight is not None:
                torch.mm(d_logits.T, hidden, out=d_weight[first : first + ctx.chunk])
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def head_logprobs(hidden, weight, targets, temperature: float, chunk: int):
    """(K, D) hidden states, (V, D) head, (K,) targets -> log-probs and entropy (K,) each, float32.
    chunk=0 is the dense head, written plainly: all (K, V) logits at once."""
    if chunk and len(targets):
        return ChunkedHead.apply(hidden, weight, targets, temperature, chunk)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature  # (K, V)
    logp = logits.log_softmax(-1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy


class Policy(nn.Module):
    """Rollouts in, log-probs out. Only here stands that logits at t - 1 predict the token at t."""

    def __init__(self, lm: nn.Module, temperature: float, chunk: int):
        super().__init__()
        self.lm, self.temperature, self.chunk = lm, temperature, chunk
        for module in lm.modules():  # sampler and trainer must be the same function
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, pack: Pack):
        """Log-probs and entropy (no gradient) of the wanted tokens: (B, T) each, 0 elsewhere."""
        # The mask is of no effect, but without one transformers looks at positions.
        how = {"attention_mask": pack.tokens.new_zeros(1, 1, 1, 1), "use_cache": False}
        out = self.lm.model(input_ids=pack.tokens, position_ids=pack.positions, pack=pack, **how)
        hidden = out.last_hidden_state.flatten(0, 1)
        wanted, how = pack.wanted, (self.temperature, self.chunk)
        before, head = hidden.index_select(0, wanted - 1), self.lm.get_output_embeddings().weight
        logprobs, entropy = head_logprobs(before, head, pack.tokens.flatten()[wanted], *how)
        at, size = pack.slot[wanted], (len(pack.starts) - 1) * pack.longest
        laid = (x.new_zeros(size).index_copy(0, at, x) for x in (logprobs, entropy.detach()))
        b, t = pack.shape
        return tuple(x.view(-1, pack.longest)[:b, :t] for x in laid)


def check_config(path: str, tokens: int = 0, what: str = "") -> AutoConfig:
    """The configuration; UserError if there is none, it is not covered, or short of positions."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = f"no model there ({str(error).splitlines()[0]})"
        if "trust_remote_code" in str(error):
            why = "brings Python code of its own, which would run as you (trust_remote_code is off)"
        raise UserError(f"model={path}: {why}") from None
    if why := unsupported(config):
        raise UserError(f"model={path}: {why}")
    if tokens > (most := getattr(config, "max_position_embeddings", tokens)):
        raise UserError(f"{what}, but {path} has {most} positions")
    return config


class Adapted(nn.Linear):
    """W x + (alpha / rank) B A x: A, and B from 0, are trained (LoRA, arXiv 2106.09685, 4.1)."""

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def adapt(lm: nn.Module, rank: int, alpha: float, seed: int):
    """Every linear layer of the blocks becomes an Adapted one; nothing else is trained."""
    torch.manual_seed(seed)  # the same A on every rank
    lm.requires_grad_(False)
    for module in [m for m in lm.model.layers.modules() if isinstance(m, nn.Linear)]:
        module.__class__, module.scale, w = Adapted, alpha / rank, module.weight
        a = w.new_empty(rank, w.shape[1]).uniform_(-1, 1) / w.shape[1] ** 0.5
        module.lora_A, module.lora_B = nn.Parameter(a), nn.Parameter(w.new_zeros(w.shape[0], rank))


def unsupported(config) -> str:
    """Why `Policy` does not cover such a model; "" if it does."""
    on = " ".join(name for name, value in config.to_dict().items() if value)
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if not any(name.endswith("ForCausalLM") for name in config.architectures or []):
        return f"{config.architectures} is not a causal language model"
    if types != {"full_attention"} or (window and "layer_types" not in on) or "softcap" in on:
        return "sliding-window, linear or soft-capped attention is not yet tested"
    if "expert" in on:
        return "mixture-of-experts models are not supported"
    # What `Policy` takes for granted: layers in `lm.model`, and logits = hidden @ head.T, no more.
    scales = ("logit_scale", "logits_scaling", "lm_head_multiplier")  # Cohere, Granite, Falcon-H1
    if scale := [k for k in scales if getattr(config, k, None) not in (None, 1)]:
        return f"logits scaled by {scale[0]} are not supported"
    with torch.device("meta"):  # parts to look at, without memory: milliseconds, at any size
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    name, bias = type(lm).__name__, getattr(lm.get_output_embeddings(), "bias", None)
    if not hasattr(getattr(lm, "model", None), "layers") or bias is not None:
        return f"{name} is not built like Llama, with lm.model.layers and a head without bias"
    lm.model.layers = lm.model.layers[:1]
    two = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        Policy(lm, 1.0, 0)(Pack(two, two, two[0].int(), two[0], two[0], 2, False, (1, 2)))
    except (AttributeError, TypeError, RuntimeError):  # the last one: rope that asks for lengths
        return f"{name}'s layers or positions do not take packed rows"
    return ""


def has_weights(path: str) -> bool:
    """False for a local folder with a configuration alone. A hub name is taken to have weights."""
    folder = pathlib.Path(path)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def build_policy(cfg, world, frozen: str | None = None, head=None) -> nn.Module:
    """The model, loaded or initialised, sharded over the trainers: a Policy or what `head` makes of
    it. `frozen`: that one, in the compute type, with no gradient (a reference). Collective."""
    master = torch.float64 if cfg.dtype == "float64" else torch.float32
    auto = "bfloat16" if world.cuda else "float32"
    compute = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    path = frozen or cfg.model
    how = {"dtype": compute if frozen else master, "attn_implementation": "packed"}
    if path == cfg.model and (cfg.random_init or not has_weights(path)):
        torch.manual_seed(cfg.seed)
        lm = AutoModelForCausalLM.from_config(check_config(path), **how)
    else:
        lm = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **how)
    lm.train(not frozen).requires_grad_(not frozen)
    if getattr(cfg, "lora_rank", 0) and not frozen:
        adapt(lm, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    # One dimension, over which FSDP2 shards; with replicas two: HSDP copies over the first.
    names, ranks = ("copies", "shards")[-len(world.mesh) :], torch.tensor(world.shards).squeeze(0)
    mesh = DeviceMesh.from_group(world.mesh, world.device.type, ranks, mesh_dim_names=names)
    types = MixedPrecisionPolicy(compute, reduce_dtype=master, cast_forward_inputs=False)
    shard, alone = {"mesh": mesh, "mp_policy": types}, world.num_trainers == 1
    if frozen and cfg.offload_frozen and world.cuda:
        shard["offload_policy"] = CPUOffloadPolicy()
    if alone and not frozen:  # nothing to gather again for the backward, only to cast again
        shard["reshard_after_forward"] = False
    for layer in lm.model.layers:
        # Inside out: what is recomputed, one compiled function around it, FSDP's hooks around that.
        if not frozen:
            layer.forward = checkpointed(layer.forward, cfg.activation_checkpointing)
        if cfg.compile:
            layer.forward = torch.compile(layer.forward)
        fully_shard(layer, **shard)
    policy = head(lm) if head else Policy(lm, getattr(cfg, "temperature", 1.0), cfg.head_chunk)
    fully_shard(policy, **shard)
    for module in policy.modules():
        # Alone nothing is divided; a factor would cost a pass over the gradient.
        if isinstance(module, FSDPModule) and not alone:
            module.set_gradient_divide_factor(1.0)  # sums: the loss has its global divisor
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return policy


def checkpointed(forward, kind: str):
    """A layer's forward whose backward makes again all that it needs (full), or all but the outputs
    of matrix products and attention (selective): little memory, or little work."""
    saved = [aten.mm, aten.addmm, aten._scaled_dot_product_cudnn_attention]
    saved += [aten._flash_attention_forward, aten._scaled_dot_product_flash_attention_for_cpu]
    how = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        saved = [op.default for op in saved]
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, saved)
    return forward if kind == "none" else functools.partial(checkpoint, forward, **how)
