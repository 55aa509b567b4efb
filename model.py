"""The policy: a Hugging Face causal LM under FSDP2. Packed rows in, log-probs out.

Rows lie one behind the other in a single sequence without padding; attention keeps them apart. The
head never holds all logits: it goes through the sampled positions in chunks, forward and backward.
"""

import pathlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)

from runtime import UserError

# ---------------------------------------------------------------- attention over packed rows


@dataclass
class Pack:
    """How the rows lie in the one packed sequence."""

    starts: torch.Tensor  # (B + 1,) int32: where each row starts, and the end
    longest: int
    slot: torch.Tensor  # (sum of lengths,) int64: each token's place in the padded layout


def packed_attention(module, query, key, value, mask, scaling=None, pack: Pack = None, **kwargs):
    """Queries (1, H, tokens, D), keys and values (1, H_kv, tokens, D) -> (1, tokens, H, D).

    Causal within each row. CUDA: flash attention over the packed layout. CPU: rows are laid out
    padded for this one operation, because attention over the whole pack would cost tokens^2; the
    padding is at the end, where causality hides it.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, H, D)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v)) if groups > 1 else (k, v)
        rows = (pack.starts, pack.starts, pack.longest, pack.longest)
        return varlen_attn(q, k, v, *rows, scale=scaling, window_size=(-1, 0))[None], None
    rows = len(pack.starts) - 1

    def padded(x):  # (tokens, H, D) -> (B, H, longest, D)
        out = x.new_zeros(rows * pack.longest, *x.shape[1:]).index_copy(0, pack.slot, x)
        return out.view(rows, pack.longest, *x.shape[1:]).transpose(1, 2)

    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        padded(q), padded(k), padded(v), is_causal=True, scale=scaling, enable_gqa=gqa
    )
    return out.transpose(1, 2).flatten(0, 1)[pack.slot][None], None


AttentionInterface.register("packed", packed_attention)
# Rows are told apart by Pack, not by a mask.
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)

# ---------------------------------------------------------------- head


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in at least float32, also from bf16 inputs: logits must not be rounded to bf16."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class ChunkedHead(torch.autograd.Function):
    """log p(target) and entropy, `chunk` positions at a time; backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        out = []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = matmul_fp32(h, weight.T).div_(temperature)  # (chunk, V)
            logsumexp = logits.logsumexp(-1)
            logprob = logits.gather(-1, t[:, None])[:, 0] - logsumexp
            entropy = logsumexp - (logits.sub(logsumexp[:, None]).exp_().mul_(logits)).sum(-1)
            out.append(torch.stack([logprob, entropy]))
        logprobs, entropy = torch.cat(out, 1)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for at in torch.arange(len(targets), device=hidden.device).split(ctx.chunk):
            a, b = int(at[0]), int(at[-1]) + 1
            h, g = hidden[a:b], grad[a:b, None]
            logits = matmul_fp32(h, weight.T).div_(ctx.temperature)  # (chunk, V)
            d_logits = logits.softmax(-1).mul_(-g)
            d_logits.scatter_add_(1, targets[a:b, None], g.to(d_logits.dtype)).div_(ctx.temperature)
            d_logits = d_logits.to(weight.dtype)
            d_hidden[a:b] = d_logits @ weight
            d_weight += matmul_fp32(d_logits.T, h)
        return d_hidden, d_weight.to(weight.dtype), None, None, None


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


# ---------------------------------------------------------------- policy


class Policy(nn.Module):
    """Rollouts in, log-probs out. Only here stands that logits at t - 1 predict the token at t."""

    def __init__(self, lm: nn.Module, temperature: float, chunk: int):
        super().__init__()
        self.lm, self.temperature, self.chunk = lm, temperature, chunk
        for module in lm.modules():  # sampler and trainer must be the same function
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, tokens, length, mask):
        """Tokens (B, T), lengths (B,), mask of the wanted tokens (B, T) -> log-probs and entropy.

        Both are (B, T) and 0 where nothing was wanted. The entropy has no gradient.
        """
        real = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]  # (B, T)
        slot = real.flatten().nonzero().flatten()
        starts = F.pad(length.cumsum(0), (1, 0)).int()
        positions = slot % tokens.shape[1]
        pack = Pack(starts, tokens.shape[1], slot)
        packed = tokens[real]  # (sum of lengths,)
        hidden = self.lm.model(
            input_ids=packed[None],
            position_ids=positions[None],
            attention_mask=None,
            use_cache=False,
            pack=pack,
        ).last_hidden_state[0]
        # A row's first token has nothing before it.
        wanted = (mask[real] & (positions > 0)).nonzero().flatten()
        head = self.lm.get_output_embeddings().weight
        logprobs, entropy = head_logprobs(
            hidden[wanted - 1], head, packed[wanted], self.temperature, self.chunk
        )

        def table(values):
            flat = values.new_zeros(tokens.numel()).index_copy(0, slot[wanted], values)
            return flat.view(tokens.shape)

        return table(logprobs), table(entropy.detach())


HEAD_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")  # Cohere, Granite, Falcon-H1


def check_config(path: str) -> AutoConfig:
    """The model's configuration; UserError if there is none, or it is of a kind not covered."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model={path}: no model there ({str(error).splitlines()[0]})") from None
    if not any(name.endswith("ForCausalLM") for name in config.architectures or []):
        raise UserError(f"model={path}: {config.architectures} is not a causal language model")
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    softcap = any("softcap" in k and v for k, v in config.to_dict().items())
    if types != {"full_attention"} or (window and not hasattr(config, "layer_types")) or softcap:
        raise UserError(
            f"model={path}: sliding-window, linear or soft-capped attention is not yet tested"
        )
    if any("expert" in k and v for k, v in config.to_dict().items()):
        raise UserError(f"model={path}: mixture-of-experts models are not supported")
    # What `Policy` takes for granted: layers in `lm.model`, and logits = hidden @ head.T, no more.
    if scale := [k for k in HEAD_SCALES if getattr(config, k, None) not in (None, 1)]:
        raise UserError(f"model={path}: logits scaled by {scale[0]} are not supported")
    with torch.device("meta"):  # parts to look at, without memory: milliseconds, at any size
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    head = lm.get_output_embeddings()
    if not hasattr(getattr(lm, "model", None), "layers") or getattr(head, "bias", None) is not None:
        raise UserError(
            f"model={path}: {type(lm).__name__} is not built like Llama, with lm.model.layers and "
            "a head without bias"
        )
    lm.model.layers = lm.model.layers[:1]
    two = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = two.expand(1, 1, 2, 2)  # of no effect, but without one transformers looks at positions
    pack = Pack(two[0].int(), 2, two[0])
    try:
        lm.model(input_ids=two, position_ids=two, attention_mask=mask, use_cache=False, pack=pack)
    except (AttributeError, TypeError):
        name = type(lm).__name__
        raise UserError(f"model={path}: {name}'s layers do not hand packed rows on") from None
    return config


def has_weights(path: str) -> bool:
    """False for a local folder with a configuration alone. A hub name is taken to have weights."""
    folder = pathlib.Path(path)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def build_policy(cfg, world, frozen: str | None = None) -> Policy:
    """Load (or initialise) the model, shard it over the trainers. Collective over the trainers.

    With `frozen` that model, in the compute type and without a gradient: a reference or a teacher.
    """
    master = torch.float64 if cfg.dtype == "float64" else torch.float32
    compute, path = compute_dtype(cfg, world), frozen or cfg.model
    config = check_config(path)
    how = {"dtype": compute if frozen else master, "attn_implementation": "packed"}
    if path == cfg.model and (cfg.random_init or not has_weights(path)):
        torch.manual_seed(cfg.seed)
        lm = AutoModelForCausalLM.from_config(config, **how)
    else:
        lm = AutoModelForCausalLM.from_pretrained(path, **how)
    lm.train(not frozen).requires_grad_(not frozen)
    if cfg.activation_checkpointing and not frozen:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    shard = {
        "mesh": trainer_mesh(world),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if frozen or compute == master else compute,
            reduce_dtype=master,
            cast_forward_inputs=False,
        ),
    }
    if frozen and cfg.offload_frozen and world.cuda:
        shard["offload_policy"] = CPUOffloadPolicy()
    for layer in lm.model.layers:
        if cfg.compile:
            layer.compile()
        fully_shard(layer, **shard)
    policy = Policy(lm, getattr(cfg, "temperature", 1.0), cfg.head_chunk)
    fully_shard(policy, **shard)
    for module in policy.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)  # sums: the loss has its global divisor
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return policy


def trainer_mesh(world) -> DeviceMesh:
    """One dimension, over which FSDP2 shards; with replicas two: HSDP copies over the first."""
    if len(world.mesh) == 1:
        return DeviceMesh.from_group(world.trainers, world.device.type, mesh=world.trainer_ranks)
    names = ("copies", "shards")
    return DeviceMesh.from_group(
        world.mesh, world.device.type, mesh=torch.tensor(world.shards), mesh_dim_names=names
    )


def compute_dtype(cfg, world) -> torch.dtype:
    """`dtype=auto` is bfloat16 on a GPU and float32 on a CPU."""
    auto = "bfloat16" if world.cuda else "float32"
    return getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
