"""Run by test_oracle.py under torchrun: what the real engine says greedily, with weights that came
from the trainer through `weights.sync`.

torchrun --nproc_per_node=1 tests/oracle_ranks.py OUT
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from transformers import AutoTokenizer

import grpo
import tasks
import weights
from examples.calculator import Calculator
from generator import EVALUATION, Generator
from runtime import World
from trainer import Trainer

# (max_new_tokens, max_turns): replies of 27 and 31 tokens all end by themselves; the longer ones
# are cut off in their answer; no room for what the environment says; in a call; turns run out.
LIMITS = [(40, 4), (28, 4), (24, 4), (16, 4), (40, 2)]


class Opened(Calculator):
    """The calculator, whose prompts open the call themselves: greedy replies use the tool."""

    def __init__(self, cfg):
        super().__init__(cfg)
        for example in self.train + self.heldout:
            example["prompt"] += "["

    def reply(self, episode):
        opened = "[" if len(episode.turns) == 1 else ""
        return super().reply(tasks.Episode(episode.problem, [opened + episode.turns[-1]]))


def main(out: str):
    cfg = grpo.Config(steps=0, eval_size=12, eval_every=1, temperature=2.0)
    world = World(0)
    world.connect()
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    trainer = Trainer(cfg, world, tokenizer)
    generator = Generator(cfg, world, Opened(cfg), tokenizer)
    found = []
    for cfg.max_new_tokens, cfg.max_turns in LIMITS:
        weights.sync(trainer, generator, world)  # a new version: its evaluation is admitted
        generator.run_until(lambda: not (generator.later or generator.open.get(EVALUATION)))
        rows = sorted(generator.judged, key=lambda row: row.slot)
        found.append([{k: getattr(r, k) for k in ("tokens", "mask", "finished")} for r in rows])
    pathlib.Path(out).write_text(json.dumps(found))
    world.close()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
