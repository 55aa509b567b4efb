"""Engine against trainer, token by token, in bf16: how far their log-probs are apart, and through
which part of the model.

    torchrun --nproc_per_node=1 benchmarks/mismatch.py OUT MODEL --task=gsm8k --task_data=GSM8K
    torchrun --nproc_per_node=1 benchmarks/mismatch.py OUT assets/calculator     # a CPU, to try it

The engine samples at temperature 1; every forward then scores the same tokens. "trainer" is the
trainer's own (`Trainer.logprobs`); the others are transformers' model, padded, in bf16 throughout
or with parts in fp32: the head's logits, rotary embedding, attention, all but matrix products
(norms and the residual stream too). KL is k3 over sampled tokens, in nats; p95 of |difference|.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import weights
from generator import Generator
from rollouts import gather
from runtime import World
from tasks import load_task
from trainer import Trainer


def wide_attention(module, query, key, value, mask, scaling=None, **kwargs):
    """Causal attention in fp32, rounded once at its end."""
    q, k, v = (x.float() for x in (query, key, value))
    how = {"scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **how)
    return out.transpose(1, 2).to(query.dtype), None


transformers.AttentionInterface.register("wide", wide_attention)


@contextlib.contextmanager
def wide_rotary(lm):
    """cos, sin and their products with queries and keys in fp32."""
    place = sys.modules[type(lm).__module__]
    before, rotary = place.apply_rotary_pos_emb, lm.model.rotary_emb

    def apply(q, k, cos, sin, *args, **kwargs):
        wide = before(q.float(), k.float(), cos.float(), sin.float(), *args, **kwargs)
        return tuple(x.to(q.dtype) for x in wide)

    place.apply_rotary_pos_emb = apply
    # It casts to the type of what it is given, which it looks at for nothing else.
    hook = rotary.register_forward_pre_hook(lambda m, args: (args[0].float(), *args[1:]))
    yield
    place.apply_rotary_pos_emb = before
    hook.remove()


def narrow_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16()).float()


@torch.no_grad()
def scores(lm, table, wide_head: bool, device) -> torch.Tensor:
    """(N, T) log-probs of the sampled tokens by a padded forward, 0 elsewhere."""
    out = torch.zeros(table.tokens.shape)
    for rows in torch.arange(len(table)).split(16):
        tokens = table.tokens[rows].to(device)
        hidden = lm.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        weight = lm.get_output_embeddings().weight
        for i, row in enumerate(rows.tolist()):
            if wide_head:
                logits = hidden[i].float() @ weight.float().T
            else:
                logits = (hidden[i] @ weight.T).float()
            logp = logits.log_softmax(-1).gather(-1, tokens[i, 1:, None])[:, 0]
            out[row, 1:] = logp.cpu() * table.mask[row, 1:]
    return out


def apart(ours: torch.Tensor, table) -> dict[str, float]:
    d = (ours - table.logprobs)[table.mask].double()
    found = {"kl": float((d.exp() - 1 - d).mean()), "mean": float(d.abs().mean())}
    return {**found, "p95": float(d.abs().quantile(0.95)), "max": float(d.abs().max())}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("model")
    parser.add_argument("--task", default="calculator")
    parser.add_argument("--task_data", default="")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    args = parser.parse_args()
    cfg = grpo.Config(model=args.model, task=args.task, task_data=args.task_data, dtype="bfloat16")
    cfg.prompts_per_step, cfg.max_prompt_tokens, cfg.max_new_tokens = args.prompts, 512, args.new
    cfg.max_prompt_tokens = 512 if torch.cuda.is_available() else 64
    cfg.eval_size, cfg.sleep, cfg.num_generators, cfg.steps = 0, "no", 0, 2
    cfg.gpu_memory_utilization, cfg.enforce_eager = 0.4, False
    world = World(0)
    world.connect()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = Trainer(cfg, world, tokenizer)
    generator = Generator(cfg, world, load_task(cfg), tokenizer)
    weights.sync(trainer, generator, world)
    table = gather(generator.collect(0), world, 8192)
    found = {"trainer": apart(trainer.logprobs(table, trainer.policy), table)}
    how = {"plain, all in bf16": ("sdpa", False, False), "fp32 head": ("sdpa", False, True)}
    how |= {"fp32 head and rotary": ("sdpa", True, True)}
    how |= {"fp32 head and attention": ("wide", False, True)}
    how |= {"fp32 head, rotary and attention": ("wide", True, True)}
    for name, (attention, rotary, head) in how.items():
        one = {"dtype": torch.bfloat16, "attn_implementation": attention}
        lm = AutoModelForCausalLM.from_pretrained(args.model, **one).to(world.device)
        with wide_rotary(lm) if rotary else contextlib.nullcontext():
            found[name] = apart(scores(lm, table, head, world.device), table)
    lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(world.device)
    found["plain, all in fp32"] = apart(scores(lm, table, True, world.device), table)
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = functools.partial(narrow_product, module.weight)
    found["products in bf16, the rest in fp32"] = apart(
        scores(lm, table, True, world.device), table
    )
    tokens = int(table.mask.sum())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "mismatch.json").write_text(json.dumps({"tokens": tokens, **found}, indent=1))
    print(f"{tokens} sampled tokens, {args.model}")
    print("| forward | KL | mean of abs | p95 | max |\n|---|---|---|---|---|")
    for name, x in found.items():
        print(f"| {name} | {x['kl']:.5f} | {x['mean']:.4f} | {x['p95']:.4f} | {x['max']:.2f} |")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
