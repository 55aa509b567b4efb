"""The policy: a Hugging Face causal LM under FSDP2. Packed rows in, log-probs out.

Rows lie one behind the other in a single sequence without padding; attention keeps them apart. The
head never holds all logits: it goes through the sampled positions in chunks, forward and backward.
"""

import functools
import pathlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)

from head import head_logprobs
from runtime import UserError

# ---------------------------------------------------------------- attention over packed rows


@dataclass
class Pack:
    """A micro-batch as one sequence of P tokens: its rows, one behind the other.

    `pack_rows` makes it on the host, where lengths are known: a GPU asked for them would have to
    finish first, and then wait for its next work.
    """

    tokens: torch.Tensor  # (P,) int64
    positions: torch.Tensor  # (P,) int64: each token's place in its row
    starts: torch.Tensor  # (rows + 1,) int32: where each row starts, and the end
    slot: torch.Tensor  # (P,) int64: each token's place in the padded layout, (rows, longest)
    wanted: torch.Tensor  # (K,) int64: the tokens whose log-probs are asked for
    longest: int  # at least the longest row
    even: bool  # all rows have `longest` tokens
    shape: tuple[int, int]  # (B, T) of what was packed


def pack_rows(tokens, length, mask, device: str | torch.device = "cpu") -> Pack:
    """Tokens (B, T), lengths (B,), wanted tokens (B, T) bool, on the host -> Pack on the device.

    On a GPU P is rounded up to one of few sizes, so that compiled functions see few shapes and
    kernels round ones: rows that are about even all get the same room, else the rest is a row.
    """
    (b, t), device, room = tokens.shape, torch.device(device), length
    if device.type == "cuda":
        total, wide = int(length.sum()), few_sizes(t)
        if b * wide <= total * 17 / 16:
            room = torch.full_like(length, wide)
        elif more := few_sizes(total) - total:
            room = torch.cat([length, torch.tensor([more])])
    longest = max(t, int(room.max()))
    tokens, mask = (F.pad(x, (0, longest - t, 0, len(room) - b)) for x in (tokens, mask))
    real = torch.arange(longest) < room[:, None]  # (rows, longest)
    slot = real.flatten().nonzero().flatten()
    positions = slot % longest
    # A row's first token has nothing before it.
    wanted = (mask[real] & (positions > 0)).nonzero().flatten()
    parts = tokens[real], positions, F.pad(room.cumsum(0), (1, 0)).int(), slot, wanted
    even = bool((room == longest).all())
    return Pack(*(send(x, device) for x in parts), longest, even, (b, t))


def few_sizes(n: int) -> int:
    """n rounded up by less than 1/8, mostly 1/16 or less; powers of 2 stay, 128 is the step."""
    step = max(2 ** ((n - 1).bit_length() - 4), 128)
    return -(-n // step) * step


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device. From pinned memory, so that the host goes on meanwhile."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def packed_attention(module, query, key, value, mask, scaling=None, pack: Pack = None, **kwargs):
    """Queries (1, H, P, D), keys and values (1, H_kv, P, D) -> (1, P, H, D), causal in each row.

    CUDA: cuDNN's kernel (the faster) where rows have one length, else flash attention over the
    packed layout. CPU: rows are laid out padded for this one operation, because attention over the
    whole pack would cost P^2; the padding is at the end, where causality hides it.
    """
    rows, gqa = len(pack.starts) - 1, query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        if pack.even:
            q, k, v = (
                x[0].unflatten(1, (rows, pack.longest)).transpose(0, 1) for x in (query, key, value)
            )
            cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
            out = cudnn(q, k, v, None, True, 0.0, True, False, scale=scaling)[0]  # (B, H, T, D)
            return out.transpose(1, 2).flatten(0, 1)[None], None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (P, H, D)
        at = (pack.starts, pack.starts, pack.longest, pack.longest)
        flash = torch.ops.aten._flash_attention_forward
        return flash(q, k, v, *at, 0.0, True, False, scale=scaling)[0][None], None

    def padded(x):  # (1, H, P, D) -> (B, H, longest, D)
        x = x[0].transpose(0, 1)
        out = x.new_zeros(rows * pack.longest, *x.shape[1:]).index_copy(0, pack.slot, x)
        return out.view(rows, pack.longest, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        padded(query), padded(key), padded(value), is_causal=True, scale=scaling, enable_gqa=gqa
    )
    return out.transpose(1, 2).flatten(0, 1)[pack.slot][None], None


AttentionInterface.register("packed", packed_attention)
# Rows are told apart by Pack, not by a mask.
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)

# ---------------------------------------------------------------- policy


class Policy(nn.Module):
    """Rollouts in, log-probs out. Only here stands that logits at t - 1 predict the token at t."""

    def __init__(self, lm: nn.Module, temperature: float, chunk: int):
        super().__init__()
        self.lm, self.temperature, self.chunk = lm, temperature, chunk
        for module in lm.modules():  # sampler and trainer must be the same function
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, pack: Pack):
        """-> log-probs and entropy of the wanted tokens, (B, T) each and 0 elsewhere.

        The entropy has no gradient.
        """
        hidden = self.lm.model(
            input_ids=pack.tokens[None],
            position_ids=pack.positions[None],
            attention_mask=pack.tokens.new_zeros(1, 1, 1, 1),  # see `check_config`
            use_cache=False,
            pack=pack,
        ).last_hidden_state[0]
        head, wanted = self.lm.get_output_embeddings().weight, pack.wanted
        logprobs, entropy = head_logprobs(
            hidden.index_select(0, wanted - 1),
            head,
            pack.tokens[wanted],
            self.temperature,
            self.chunk,
        )

        def table(values):
            flat = values.new_zeros((len(pack.starts) - 1) * pack.longest)
            flat = flat.index_copy(0, pack.slot[wanted], values).view(-1, pack.longest)
            return flat[: pack.shape[0], : pack.shape[1]]

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
    pack = Pack(two[0], two[0], two[0].int(), two[0], two[0], 2, False, (1, 2))
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
    alone = world.num_trainers == 1
    if alone and not frozen:  # nothing to gather again for the backward, only to cast again
        shard["reshard_after_forward"] = False
    for layer in lm.model.layers:
        # Inside out: what is recomputed, one compiled function around it, FSDP's hooks around that.
        if not frozen:
            layer.forward = checkpointed(layer.forward, cfg.activation_checkpointing)
        if cfg.compile:
            layer.forward = torch.compile(layer.forward)
        fully_shard(layer, **shard)
    policy = Policy(lm, getattr(cfg, "temperature", 1.0), cfg.head_chunk)
    fully_shard(policy, **shard)
    for module in policy.modules():
        # Alone nothing is divided; a factor would cost a pass over the gradient.
        if isinstance(module, FSDPModule) and not alone:
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


aten = torch.ops.aten
SAVED = [aten.mm, aten.addmm, aten._scaled_dot_product_cudnn_attention]
SAVED += [aten._flash_attention_forward, aten._scaled_dot_product_flash_attention_for_cpu]


def checkpointed(forward, kind: str):
    """A layer's forward whose backward makes again all that it needs (full), or all but the outputs
    of matrix products and attention (selective): little memory, or little work.
    """
    how = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        saved = [op.default for op in SAVED]
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, saved)

    def twice(*args, **kwargs):
        return checkpoint(forward, *args, **how, **kwargs)

    return forward if kind == "none" else twice


def compute_dtype(cfg, world) -> torch.dtype:
    """`dtype=auto` is bfloat16 on a GPU and float32 on a CPU."""
    auto = "bfloat16" if world.cuda else "float32"
    return getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
