"""What a step does: the table as each station of the loop leaves it, from a run's saved batch.

    torchrun --nproc_per_node=3 grpo.py --steps=1 --prompts_per_step=2 --group_size=3 --seed=4 \
        --eval_size=0 --save_rollouts=true --run_dir=runs/step
    python docs/step.py runs/step/rollouts/0

The rows are those that were sampled. Advantages, shares, plan, log-probs and loss are made again
by the functions that the loop calls, and must be those of the run.
"""

import argparse
import pathlib
import sys

import torch
import yaml
from transformers import AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import losses
from examples.loss_lab import load_policy
from model import pack_rows
from report import load_rollouts, read_lines
from rollouts import plan_batch


def texts(table, tokenizer) -> list[list[str]]:
    """Each row's tokens as text; EOS as a dollar sign, so that each is one character wide."""
    rows = zip(table.tokens.tolist(), table.length.tolist(), strict=True)
    end = tokenizer.eos_token
    return [
        ["$" if t == end else t for t in tokenizer.convert_ids_to_tokens(tokens[:n])]
        for tokens, n in rows
    ]


def borders(mask: list[bool]) -> list[int]:
    """The tokens where the mask changes, on both sides, and the last one."""
    n = len(mask)
    return [t for t in range(n) if t in (0, n - 1) or mask[t] != mask[t - 1 if t else 0]]


def line(name: str, values):
    print(f"{name:10}" + "".join(f"{v!s:>8}" for v in values))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="runs/NAME/rollouts/STEP")
    folder = parser.parse_args().folder
    run, step = folder.parents[1], int(folder.name)
    cfg = grpo.Config(**yaml.safe_load((run / "config.yaml").read_text()))
    table, tokenizer = load_rollouts(folder), AutoTokenizer.from_pretrained(cfg.model)
    logged = next(x for x in read_lines(run / "metrics.jsonl") if x["step"] == step)

    print("1. generator.collect: rows, sampled (#) or given (.)\n")
    pieces = texts(table, tokenizer)
    for i, row in enumerate(pieces):
        print(f"row {i}     {''.join(row)}")
        print("mask      " + "".join(".#"[int(m)] for m in table.mask[i, : len(row)]))
    i = int(table.sampled.argmax())
    at = borders(table.mask[i, : len(pieces[i])].tolist())
    print(f"\nrow {i} where its mask changes, and at its end\n")
    line("token", [pieces[i][t] for t in at])
    line("mask", [int(table.mask[i, t]) for t in at])
    line("logprobs", [f"{table.logprobs[i, t]:.3f}" for t in at])
    line("version", [int(table.version[i, t]) for t in at])

    print(f"\n2. losses.group_advantages: {cfg.advantage}\n")
    advantage = losses.group_advantages(table, cfg.advantage)
    first = [int(m.nonzero()[0]) for m in table.mask]
    assert torch.equal(advantage, table.advantage), "not what the run trained on"
    line("row", range(len(table)))
    line("slot", [int(x) & 0xFFFFFFFF for x in table.index])
    line("reward", [f"{r:g}" for r in table.reward])
    line("advantage", [f"{advantage[k, t]:.3f}" for k, t in enumerate(first)])

    print(f"\n3. losses.row_weights, shares, divisor: {cfg.aggregation}\n")
    line("sampled", table.sampled.tolist())
    line("weight", [f"{w:g}" for w in losses.row_weights(table, cfg)])
    line("share", [f"{s:g}" for s in losses.shares(table, cfg)])
    count = losses.divisor(table, cfg)
    print(f"divisor   {count:g}")

    print("\n4. gather: the plan, with two trainers and at most 64 tokens in a micro-batch\n")
    line("length", table.length.tolist())
    for k, own in enumerate(plan_batch(table, 2, 64, 1)):
        micro = (f"rows {rows} ({int(table.length[rows].sum())} tokens)" for rows in own[0])
        print(f"trainer {k} " + ", ".join(micro))

    print("\n5. trainer.step: log-probs, ratio, loss\n")
    policy, source = load_policy(run, step, cfg, None)
    with torch.no_grad():
        logprobs, _ = policy(pack_rows(table.tokens, table.length, table.mask))
        whole = losses.policy_loss(grpo.find_loss(cfg))
        loss, sums = whole(logprobs, table, cfg)
    sampled = [t for t in at if table.mask[i, t]]
    line("token", [pieces[i][t] for t in sampled])
    line("generator", [f"{table.logprobs[i, t]:.3f}" for t in sampled])
    line("trainer", [f"{logprobs[i, t]:.3f}" for t in sampled])
    ratio = losses.log_ratio(logprobs, table, cfg).exp()
    line("ratio", [f"{ratio[i, t]:.5f}" for t in sampled])
    line("loss", [f"{x:.3f}" for x in losses.surrogate(ratio, table, cfg)[i, sampled]])
    value = float(loss / count)
    print(f"\nsum {float(loss):.4f} / divisor {count:g} = loss {value:.6f}; the run: ", end="")
    print(f"{logged['loss']:.6f}")
    print(f"largest mismatch {float(sums['mismatch_max']):.1e}, with the weights of {source}")
    assert abs(value - logged["loss"]) < 1e-4, "not the run's loss"


if __name__ == "__main__":
    main()
