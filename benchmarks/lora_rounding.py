"""What rounding merged LoRA weights to bf16 does to log-probs, beside what bf16 does by itself.

    torchrun --nproc_per_node=1 benchmarks/lora_rounding.py [steps]

The default model, adapters of rank 16 trained by SFT for some steps. Engines sample with W + BA
rounded to bf16; trainers multiply by W and BA, each in bf16. Both against the log-probs in fp32,
over the sampled tokens of 256 held-out examples.
"""

import os
import pathlib
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import sft
import weights
from data import Examples
from model import Policy, adapt, pack_rows
from rollouts import gather
from runtime import World
from trainer import Trainer

ROOT = pathlib.Path(__file__).parent.parent


def main(steps: int = 100):
    world = World(None)
    world.connect()
    cfg = sft.Config(model=str(ROOT / "assets/calculator"), lora_rank=16, lr=3e-3, steps=steps)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    trainer, data = Trainer(cfg, world, tokenizer), Examples(cfg, tokenizer)
    for step in range(steps):
        trainer.step(gather(data.batch(step), world, 4096), sft.sft_loss)
    rows = data.heldout[""]
    pack = pack_rows(rows.tokens, rows.length, rows.mask)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights.export(trainer, pathlib.Path(folder) / "model", world, torch.float32)
        how = {"attn_implementation": "packed", "dtype": torch.float32}
        merged = AutoModelForCausalLM.from_pretrained(f"{folder}/model", **how)
        exact = Policy(merged, 1.0, 0)(pack)[0][rows.mask]
        lm = AutoModelForCausalLM.from_pretrained(cfg.model, **how)
        adapt(lm, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
        now = {name[3:]: p.full_tensor() for name, p in trainer.policy.named_parameters()}
        assert not lm.load_state_dict(now, strict=False).unexpected_keys
        apart = Policy(lm.bfloat16(), 1.0, 0)(pack)[0][rows.mask].float()
        rounded = Policy(merged.bfloat16(), 1.0, 0)(pack)[0][rows.mask].float()
    print("| compared | mean difference | largest | KL (k3) |\n|---|---|---|---|")
    pairs = {"W and BA in bf16, and fp32": (apart, exact)}
    pairs |= {"W + BA rounded to bf16, and fp32": (rounded, exact)}
    pairs |= {"trainer and engine: the two in bf16": (apart, rounded)}
    for name, (a, b) in pairs.items():
        d = a - b
        kl = (d.expm1() - d).mean()
        print(f"| {name} | {d.abs().mean():.1e} | {d.abs().max():.1e} | {kl:.1e} |")
    world.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)
