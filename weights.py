"""Weights leave the trainers as one stream of tensors: to engines (`sync`), a folder (`export`)."""

import math
import pathlib
import shutil

import torch
import torch.distributed as dist

import report


def parameters(trainer):
    """(Hugging Face name, parameter) of the model; a tied head is none, nor is what LoRA adds."""
    named = trainer.policy.named_parameters()
    return [(name.removeprefix("lm."), p) for name, p in named if ".lora_" not in name]


def shard(trainer, name: str, p) -> torch.Tensor:
    """This trainer's rows of a parameter, LoRA merged: B is cut as W is. Collective with LoRA."""
    adapter = f"lm.{name.removesuffix('weight')}lora_"
    if f"{adapter}A" not in trainer.trained:
        return p.to_local()
    a, b = trainer.trained[f"{adapter}A"].full_tensor(), trainer.trained[f"{adapter}B"].to_local()
    return torch.addmm(p.to_local(), b, a, alpha=trainer.cfg.lora_alpha / trainer.cfg.lora_rank)


def fill(views: list[torch.Tensor], shards: list[torch.Tensor], group):
    """Full tensors, views of one flat tensor, from every trainer's shards of them, which are cast
    first. FSDP2 cuts the first dimension into equal parts, the last ones short or empty: one
    all-gather brings the parts of all tensors, each in the room of a whole one. Collective."""
    if (n := dist.get_world_size(group)) == 1:
        return torch._foreach_copy_(views, shards)
    rooms = [-(-len(v) // n) * math.prod(v.shape[1:]) for v in views]
    mine, parts = (views[0].new_empty(k * sum(rooms)) for k in (1, n))
    own = [part[: s.numel()].view_as(s) for part, s in zip(mine.split(rooms), shards)]
    torch._foreach_copy_(own, shards)
    dist.all_gather_into_tensor(parts, mine, group=group)
    pairs = zip(views, parts.view(n, -1).split(rooms, dim=1))
    parts = [p if p.numel() == v.numel() else p.flatten()[: v.numel()] for v, p in pairs]
    torch._foreach_copy_([v.view(p.shape) for v, p in zip(views, parts)], parts)


@torch.no_grad()
def stream(trainer):
    """Yield (Hugging Face name, full tensor) of each parameter. Collective over the trainers."""
    for name, p in parameters(trainer):
        full = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        fill([full], [shard(trainer, name, p)], trainer.world.mesh[-1])
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
    """Sum of the bit patterns, as integers of 16 bits."""
    return int(tensor.contiguous().flatten().view(torch.int16).sum())


@torch.no_grad()  # DTensor is quick then, and there are hundreds of parameters
def buckets_through(trainer, world, dtype):
    """Yield each bucket as {name: view of a flat tensor}, where weights arrive. The one behind it
    is on its way by then: two at a time, at the two ends of one buffer. Collective."""
    sums = [sum(map(math.prod, bucket.values())) for bucket in world.buckets] + [0]
    buffer = torch.empty(max(map(sum, zip(sums, sums[1:]))), dtype=dtype, device=world.device)
    mine, coming = dict(parameters(trainer)) if world.trains else {}, []
    for k, (bucket, size) in enumerate(zip([*world.buckets, {}], sums)):  # {}: the last arrives
        flat, work = buffer[:size] if k % 2 == 0 else buffer[len(buffer) - size :], None
        parts = flat.split([math.prod(shape) for shape in bucket.values()])
        views = {name: x.view(shape) for (name, shape), x in zip(bucket.items(), parts)}
        if world.trains and bucket:
            own = [shard(trainer, name, mine[name]) for name in bucket]
            fill(list(views.values()), own, world.mesh[-1])
        if world.carries_weights and bucket:
            work = dist.broadcast(flat, world.first_trainer, world.weights, async_op=True)
        coming.append((views, work))
        if k:
            views, work = coming.pop(0)
            if work:
                work.wait()  # on a GPU the stream does, not the host
            yield views


def sync(trainer, generator, world):
    """Trainers' weights -> every engine, between two engine steps; version + 1. Collective. Flat
    buckets, one broadcast each from the first trainer, are copied in place, fused and cut layers
    too, so captured graphs stay valid. Colocated ranks keep what their own all-gather gave."""
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
    """Prove the sync: tensors arrive bit-equal, and a load into poisoned memory (NaN) gives the
    same bits: the stream writes every element of the engine, and alone decides it. Collective."""
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
            raise RuntimeError(f"weights: {bad=} as sent, {untouched=}, {changed=} by reload")


def export(trainer, folder: pathlib.Path, world, dtype: torch.dtype = torch.float32):
    """Write a folder that transformers and vLLM load, by a temporary name: complete or absent.
    Collective: every rank waits for the writer, in a phase that a signal does not cut short."""
    from huggingface_hub import save_torch_state_dict

    with world.span("export"):
        trainer.saved()  # a checkpoint that is being written
        tensors, trained = {}, trainer.trained if world.trains else {}
        for name, full in stream(trainer) if world.trains else ():
            if world.writes:
                tensors[name] = full.to("cpu", dtype)
        lora = {k: p.detach().full_tensor() for k, p in trained.items() if ".lora_" in k}
        if world.writes:
            partial = folder.with_name(f"partial-{folder.name}")
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
                report.save_adapters(lora, trainer.cfg, partial / "adapter")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        world.agree(None)
