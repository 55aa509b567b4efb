"""Weights leave the trainers as one stream of (name, full tensor), into one of two sinks: the
generators (`sync`) and a Hugging Face folder (`export`).
"""

import json
import math
import pathlib
import shutil

import torch
import torch.distributed as dist
from safetensors.torch import save_file


def parameters(trainer):
    """(Hugging Face name, parameter) of the model; a tied head is none, nor is what LoRA adds."""
    named = trainer.policy.named_parameters()
    return [(name.removeprefix("lm."), p) for name, p in named if ".lora_" not in name]


def stream(trainer):
    """Yield (Hugging Face name, full tensor) of each parameter, LoRA merged. Collective."""
    for name, p in parameters(trainer):
        full, layer = (
            p.detach().full_tensor(),
            trainer.policy.lm.get_submodule(name.rpartition(".")[0]),
        )
        if name.endswith(".weight") and hasattr(layer, "lora_A"):
            b, a = layer.lora_B.detach().full_tensor(), layer.lora_A.detach().full_tensor()
            full = torch.addmm(full, b, a, alpha=layer.scale)
        yield name, full


def plan_buckets(trainer, limit: int) -> list[dict[str, tuple[int, ...]]]:
    """The stream as {name: shape} in buckets of `limit` elements; a larger tensor has its own."""
    buckets, room = [], 0
    for name, p in parameters(trainer):
        if not buckets or p.numel() > room:
            buckets, room = [*buckets, {}], limit
        buckets[-1][name] = tuple(p.shape)
        room -= p.numel()
    return buckets


def checksum(tensor: torch.Tensor) -> int:
    """Sum of the bit patterns, as integers."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.contiguous().view(bits).long().sum())


def buckets_through(trainer, world, dtype):
    """Yield each bucket as {name: view of a flat tensor}, where weights arrive. Collective."""
    tensors = stream(trainer) if world.trains else None
    for bucket in world.buckets:
        sizes = [math.prod(shape) for shape in bucket.values()]
        flat = torch.empty(sum(sizes), dtype=dtype, device=world.device)
        views = {name: x.view(shape) for (name, shape), x in zip(bucket.items(), flat.split(sizes))}
        if world.trains:
            for (planned, view), (name, full) in zip(views.items(), tensors):
                assert name == planned, f"the stream is at {name}, the plan at {planned}"
                view.copy_(full)  # casts to the engine's type
        if world.carries_weights:
            dist.broadcast(flat, src=world.first_trainer, group=world.weights)
        yield views


def sync(trainer, generator, world):
    """Trainers' weights -> every engine, between two engine steps; version + 1. Collective. Flat
    buckets, one broadcast each, from the first trainer to all generator ranks; vLLM's own loaders
    copy the views in place (fused and tensor-parallel layers included), so captured graphs stay
    valid. Colocated ranks keep what their own all-gather gave."""
    with world.span("evaluate"):
        generator.finish_evaluation()
    world.arrive("sync")
    with world.span("sync"):
        if world.buckets is None:
            limit = generator.cfg.sync_bucket_mb * 2**20 // generator.dtype.itemsize
            world.buckets = world.agree(plan_buckets(trainer, limit) if world.trains else None)
        generator.wake("weights")
        for views in buckets_through(trainer, world, generator.dtype):
            if world.generates:
                generator.engine.load(views)
        generator.wake("kv_cache")
        generator.new_version()
    if generator.cfg.check_weights:
        with world.span("check"):
            check(trainer, generator, world)


def check(trainer, generator, world):
    """Prove the sync: tensors arrive bit-equal; a load into poisoned memory gives the same bits.
    The poison (NaN) shows that the stream touches every element of every parameter of the engine;
    the equal checksums, that loading is a function of the stream alone. Collective."""
    own = dict(generator.engine.parameters()) if world.generates else {}
    before, sums = {name: checksum(p) for name, p in own.items()}, {}
    for p in own.values():
        p.data.fill_(float("nan"))
    for views in buckets_through(trainer, world, generator.dtype):
        sums |= {name: checksum(v) for name, v in views.items()}
        if own:
            generator.engine.load(views)
    sent = world.agree(sums)
    if world.generates:
        bad = [name for name in sent if sums[name] != sent[name]]
        untouched = [name for name, p in own.items() if bool(p.isnan().any())]
        changed = [name for name, p in own.items() if checksum(p) != before[name]]
        if bad or untouched or changed:
            found = f"{bad=} on the wire, {untouched=} by it, {changed=} by reload"
            raise RuntimeError(f"weights after sync: {found}")


def export(trainer, folder: str | pathlib.Path, world, dtype: torch.dtype = torch.float32):
    """Write a folder that transformers and vLLM load, by a temporary name: complete or absent.
    Collective: every rank waits for the writer, in a phase that a signal does not cut short."""
    from huggingface_hub import save_torch_state_dict

    with world.span("export"):
        trainer.saved()  # a checkpoint that is being written
        tensors = {}
        for name, full in stream(trainer) if world.trains else ():
            if world.writes:
                # A copy: of uneven shards the full tensor is a view of something larger.
                tensors[name] = torch.empty(full.shape, dtype=dtype).copy_(full)
        lora = {}  # under PEFT's names
        for name, p in trainer.trained.items() if world.trains else ():
            if ".lora_" in name:
                name = name.replace("lm.", "base_model.model.", 1) + ".weight"
                lora[name] = p.detach().full_tensor()
        if world.writes:
            final = pathlib.Path(folder)
            partial = final.with_name(f"partial-{final.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_torch_state_dict(tensors, partial)  # first: what fails below leaves them there
            lm = trainer.policy.lm
            lm.config.dtype = dtype
            lm.config.to_json_file(partial / "config.json")
            # As it was loaded: save_pretrained refuses what models ship (top_p, no do_sample).
            lm.generation_config.to_json_file(partial / "generation_config.json")
            if trainer.tokenizer is not None:
                trainer.tokenizer.save_pretrained(partial)
            if lora:
                save_adapters(lora, trainer.cfg, partial / "adapter")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        world.agree(None)


def save_adapters(tensors: dict[str, torch.Tensor], cfg, folder: pathlib.Path):
    """In PEFT's format."""
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": cfg.model}
    targets = sorted({name.split(".")[-3] for name in tensors})
    about |= {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": targets}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    save_file(
        {k: v.cpu().contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors"
    )
