"""What tools cost: tokens per second of an engine whose episodes wait a second for each answer,
against the same episodes with an answer at once.

    python benchmarks/tools.py OUT [--max_num_seqs=32] [--vocabulary=128] [--seconds=1]

A random model of so many words ends a turn after about as many tokens. 4 x max_num_seqs episodes
are admitted, of which the engine runs max_num_seqs; the others are with their tools, in an `async`
function that sleeps. Four suffice where the tool takes less than three times a turn in the engine:
the table says how long one takes. All rewards are 0 and equal groups are left out, so the trainer
has nothing to do and the engine never waits for it; age 1, so that a batch's end does not empty it.
The rate is over the engine's busy and idle time.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
TASK = '''
import asyncio
import tasks


class Waits(tasks.Task):
    """Three turns of a fixed length, each answered after `wait` seconds."""

    wait: float = 0.0

    def __init__(self, cfg):
        super().__init__(cfg)
        self.train = [{"prompt": f"{i % 100} {i // 100}"} for i in range(9999)]
        self.heldout, self.rewards = self.train[:1], [self.nothing]

    async def reply(self, episode):
        await asyncio.sleep(self.wait)
        return "1"

    async def nothing(self, episode):
        return 0.0
'''


def main():
    from long_tail import word_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--vocabulary", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--max_num_seqs", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=900, help="of a reply at most, all turns")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "waits.py").write_text(TASK)
    heads = dict(num_attention_heads=args.width // 32, num_key_value_heads=1, head_dim=32)
    shape = dict(num_hidden_layers=args.layers, tie_word_embeddings=True, **heads)
    shape |= dict(hidden_size=args.width, intermediate_size=3 * args.width)
    model = word_model(out / "model", args.vocabulary, args.tokens + 99, weights=False, **shape)
    rates = {}
    for wait in (0.0, args.seconds):
        folder = out / f"wait-{wait:g}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "grpo.py", f"--run_dir={folder}", f"--model={model}"]
        command += ["--random_init=true"]
        command += [f"--task={out}/waits.py:Waits", f"--task_settings.wait={wait}", "--lr=0"]
        command += [
            f"--max_num_seqs={args.max_num_seqs}",
            f"--steps={args.steps}",
            "--group_size=4",
        ]
        command += [f"--prompts_per_step={args.max_num_seqs}", "--max_turns=3", "--eval_size=0"]
        command += [f"--max_new_tokens={args.tokens}", "--max_policy_age=1", "--save_every=0"]
        command += ["--equal_rewards=mask"]
        subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True)
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [x for x in lines if "loss" in x][1:-1]  # the first holds the start
        spent = sum(x["generate_s"] + x["idle_generator_s"] for x in kept)
        length = statistics.fmean(x["length"] for x in kept)
        rates[wait] = 4 * args.max_num_seqs * length * len(kept) / spent
        turn = args.vocabulary / rates[0.0] * args.max_num_seqs
        what = f"{length:.0f} tokens an episode, a turn takes {turn:.2f} s without a tool"
        print(f"a tool of {wait:g} s: {rates[wait]:,.0f} tokens/s ({what})")
    print(f"with the tool: {rates[args.seconds] / rates[0.0]:.1%} of the rate without")


if __name__ == "__main__":
    main()
