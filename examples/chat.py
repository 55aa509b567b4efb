"""Talk to a trained model in its environment, or look at episodes that a run has kept.

    python examples/chat.py runs/grpo/model  # problems of the run's own task
    python examples/chat.py runs/grpo/model --prompt="12*34+56="
    python examples/chat.py runs/grpo/model --replay --step=40 --chosen=worst  # samples.jsonl

The settings are those of the run. Green: what the policy says. A prompt of yours has the rest of
the first held-out problem, so its reward says nothing."""

import argparse
import asyncio
import inspect
import json
import pathlib
import sys

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
from generator import Generator, eos_tokens
from rollouts import Row
from tasks import Episode, load_task, reward_name


def show(who: str, text: str):
    print(f"{who:>12}  {text}" if who != "policy" else f"{who:>12}  \033[32m{text}\033[0m")


def replay(run: pathlib.Path, step: int | None, chosen: str):
    """The stored episodes of a step (the last one), turn by turn, with what they earned."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    step = samples[-1]["step"] if step is None else step
    for s in (s for s in samples if s["step"] == step and (not chosen or chosen in s["chosen"])):
        earned = ", ".join(f"{name} {value:g}" for name, value in s["rewards"].items())
        print(f"\nstep {step}, slot {s['slot']}, reply {s['reply']}: {earned}")
        for i, turn in enumerate([str(s["problem"]["prompt"]), *s["turns"]]):
            show("policy" if i % 2 else "environment" if i else "prompt", turn)


class Player:
    """The generator's own way from turns to tokens, and transformers in place of its engine."""

    def __init__(self, folder: str, cfg):
        self.cfg, self.task = cfg, load_task(cfg)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.tokenizer.chat_template = self.task.template or self.tokenizer.chat_template
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.encoder = Generator.__new__(Generator)  # without its engine
        vars(self.encoder).update(cfg=cfg, task=self.task, tokenizer=self.tokenizer)
        self.encoder.eos = eos_tokens(folder, self.tokenizer)
        every, stops = range(len(self.tokenizer) if self.task.stop else 0), (*self.task.stop,)
        ends = [t for t in every if self.tokenizer.decode([t]).endswith(stops)]
        self.stops = [*self.encoder.eos, *ends]
        self.loop = asyncio.new_event_loop()

    def call(self, function, episode: Episode):
        said = function(episode)
        return self.loop.run_until_complete(said) if inspect.isawaitable(said) else said

    def turn(self, row: Row, temperature: float) -> bool:
        """Sample a turn; whether it ended by itself."""
        how = {"do_sample": temperature > 0, "temperature": temperature or None}
        how |= {"top_k": None, "top_p": None, "max_new_tokens": self.encoder.room(row)}
        out = self.model.generate(torch.tensor([row.tokens]), eos_token_id=self.stops, **how)
        tokens = out[0, len(row.tokens) :].tolist()
        row.append_sampled(tokens, [0.0] * len(tokens), 0)
        said = tokens[:-1] if tokens[-1] in self.encoder.eos else tokens
        row.episode.turns.append(self.tokenizer.decode(said))
        show("policy", row.episode.turns[-1])
        return tokens[-1] in self.stops

    def play(self, problem: dict, temperature: float = 0.0) -> dict[str, float]:
        """An episode, and what its rewards say."""
        row = Row(0, 0, 0, 0, Episode(problem))
        prompt = self.call(self.task.start, row.episode) if self.task.start else problem["prompt"]
        show("prompt", str(prompt))
        row.append_given(self.encoder.encode_prompt(prompt))
        while self.turn(row, temperature):
            reply = self.call(self.task.reply, row.episode)
            row.turn += 1
            if reply is None or row.turn == self.cfg.max_turns:
                break
            tokens = self.encoder.encode_reply(row, reply)
            if len(tokens) >= self.encoder.room(row):
                break
            row.append_given(tokens)
            said = [reply] if isinstance(reply, str) else [m["content"] for m in reply]
            row.episode.turns.append("\n".join(said))
            show("environment", row.episode.turns[-1])
        return {reward_name(f): self.call(f, row.episode) for f in self.task.rewards}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="runs/NAME/model")
    parser.add_argument("--prompt", help="a problem of yours; without it, of the held-out ones")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--replay", action="store_true", help="what the run has kept, instead")
    parser.add_argument("--step", type=int)
    parser.add_argument("--chosen", default="", help="best, worst or surprising")
    args = parser.parse_args()
    run = args.model.resolve().parent
    if args.replay:
        return replay(run, args.step, args.chosen)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    player = Player(str(args.model), grpo.Config(**settings))
    first = player.task.heldout[0]
    for problem in [{**first, "prompt": args.prompt}] if args.prompt else player.task.heldout:
        for name, value in player.play(problem, args.temperature).items():
            print(f"{name:>12}  {value}")
        if args.prompt or input("\nanother? [Enter, or q] ") == "q":
            return


if __name__ == "__main__":
    main()
