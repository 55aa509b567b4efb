"""Run by test_inflight.py under torchrun: new weights land while rows run, and while others wait.

    torchrun --nproc_per_node=1 tests/inflight_ranks.py OUT keep|recompute

Leaves OUT/rollouts/{0,1} (batches), OUT/{0,1} (the weights of both versions). All prompts begin
with the same 270 tokens, which fill two blocks of the engine's prefix cache.
"""

import json
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import torch
from transformers import AutoTokenizer

import grpo
import weights
from examples.calculator import Calculator
from generator import Generator
from report import save_rollouts
from runtime import World
from trainer import Trainer

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 9  # of the engine, before the new weights
PLACES = 8  # in the engine; three batches of rows want one


class Prefixed(Calculator):
    def __init__(self, cfg):
        super().__init__(cfg)
        for example in self.train + self.heldout:
            example["prompt"] = "12*34+56=" * 30 + example["prompt"]


def main(out: pathlib.Path, inflight: str):
    model = out / "model"
    shutil.copytree(ROOT / "assets/calculator", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    cfg = grpo.Config(model=str(model), steps=2, eval_size=0, max_prompt_tokens=300)
    cfg.prompts_per_step, cfg.group_size, cfg.max_num_seqs = 6, 4, PLACES
    cfg.max_policy_age, cfg.inflight, cfg.dtype = 1, inflight, "float32"  # on a GPU, too
    world = World(0)
    world.connect()
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = Trainer(cfg, world, tokenizer)
    generator = Generator(cfg, world, Prefixed(cfg), tokenizer)
    weights.sync(trainer, generator, world)
    weights.export(trainer, out / "0", world)
    asked = iter(range(STEPS))
    generator.run_until(lambda: next(asked, None) is None)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainer.policy.parameters():
            local = p.to_local()
            local += 0.02 * torch.randn(local.shape).to(local.device)
    weights.export(trainer, out / "1", world)
    weights.sync(trainer, generator, world)
    for step in range(2):
        save_rollouts(generator.collect(step), out / f"rollouts/{step}/rows.safetensors")
    world.close()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
