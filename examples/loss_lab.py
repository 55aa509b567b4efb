"""Replay one saved batch under several losses: what would each have done with these very tokens?

    torchrun --nproc_per_node=3 grpo.py --save_rollouts=true --save_every=1
    python examples/loss_lab.py runs/grpo/rollouts/37 --loss=grpo,gspo,cispo

For each loss: the norm of its gradient, its noise (standard deviation over groups of the gradient,
as a share of the norm), the share of tokens whose gradient it clipped, the effective sample size,
and the cosine between its gradient and the others'. The policy is checkpoints/step-37 where the run
kept it, else --model, else the run's first model; `mismatch_kl` says how far that is from the one
that sampled. Each loss has its own aggregation, advantage and clip unless --keep.
"""

import argparse
import pathlib
import sys

import torch
import torch.distributed.checkpoint as dcp
import yaml
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import grpo
import losses
from model import Policy, pack_rows
from report import derived, load_rollouts


def load_policy(run: pathlib.Path, step: int, cfg, model: str | None):
    """(policy, where its weights come from), in float32, without ranks."""
    lm = AutoModelForCausalLM.from_pretrained(
        model or cfg.model, dtype=torch.float32, attn_implementation="packed"
    )
    checkpoint, source = run / f"checkpoints/step-{step}", model or cfg.model
    if checkpoint.exists() and not model:
        state = {"policy": {f"lm.{name}": p.data for name, p in lm.named_parameters()}}
        source = dcp.HuggingFaceStorageReader(str(checkpoint))
        dcp.load(state, storage_reader=source, no_dist=True)
        source = str(checkpoint)
    return Policy(lm, cfg.temperature, cfg.head_chunk), source


def settings_of(name: str, cfg, keep: bool):
    """The run's settings with another loss, and with that loss's own where they are auto."""
    auto = {"aggregation": "auto", "advantage": "auto", "clip_low": -1.0, "clip_high": -1.0}
    new = grpo.Config(**{**vars(cfg), **({} if keep else auto), "loss": name})
    grpo.find_loss(new)
    return new


def replay(table, policy, names: list[str], cfg, keep: bool) -> dict[str, dict]:
    """loss -> gradient (flat), its noise, and figures. A forward for each group and loss."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [(table.index == i).nonzero().flatten() for i in table.index.unique()]
    settings = {name: settings_of(name, cfg, keep) for name in names}
    found = {name: {"gradient": 0.0, "squares": 0.0, "sums": {}} for name in names}
    for at in groups:
        for name, own in settings.items():
            table.advantage = losses.group_advantages(table, own.advantage)
            table.share = losses.shares(table, own)
            rows = table.take(at)
            logprobs, _ = policy(pack_rows(rows.tokens, rows.length, rows.mask))
            loss, sums = losses.policy_loss(grpo.find_loss(own))(logprobs, rows, own)
            loss = loss / losses.divisor(table, own)
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = torch.cat([g.flatten() for g in gradient if g is not None])
            result = found[name]
            result["gradient"] = result["gradient"] + flat
            result["squares"] += float(flat @ flat)
            for k, v in sums.items():
                add = torch.maximum if k.endswith("_max") else torch.add
                result["sums"][k] = add(result["sums"][k], v) if k in result["sums"] else v
    tokens = float((table.sampled * table.weight).sum())
    for result in found.values():
        g, n = result["gradient"], len(groups)
        variance = max(result["squares"] - float(g @ g) / n, 0.0) / max(n - 1, 1)  # of one group
        result["noise"] = (n * variance) ** 0.5 / max(float(g.norm()), 1e-30)  # of their sum
        whole = "_max"
        means = {
            k: v.tolist() if k.endswith(whole) else float(v) / tokens
            for k, v in result["sums"].items()
        }
        result["figures"] = derived(means)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="runs/NAME/rollouts/STEP")
    parser.add_argument("--loss", default=",".join(losses.LOSSES), help="names, or file.py:loss")
    parser.add_argument("--model", help="weights to replay with")
    parser.add_argument("--keep", action="store_true", help="keep the run's aggregation and clip")
    args = parser.parse_args()
    run, step, names = args.folder.parents[1], int(args.folder.name), args.loss.split(",")
    cfg = grpo.Config(**yaml.safe_load((run / "config.yaml").read_text()))
    table = load_rollouts(args.folder)
    if any(table.index.unique(return_counts=True)[1] != cfg.group_size):
        sys.exit("rows of weight 0 are not saved, and without them a group's mean is not known")
    table.old_logprobs = None  # the replay is of the batch's first update
    policy, source = load_policy(run, step, cfg, args.model)
    found = replay(table, policy, names, cfg, args.keep)
    figures = found[names[0]]["figures"]
    print(f"{len(table)} rows of step {step}, {int(table.sampled.sum())} sampled tokens; {source}")
    print(f"mismatch_kl {figures['mismatch_kl']:.2g}, effective sample size {figures['ess']:.3f}\n")
    print(f"{'loss':12}{'norm':>9}{'noise':>8}{'low':>8}{'high':>8}{'ratio max':>11}  cosine")
    for name in names:
        f, g = found[name]["figures"], found[name]["gradient"]
        others = (float(torch.cosine_similarity(g, found[o]["gradient"], dim=0)) for o in names)
        clip = "".join(f"{f[k]:8.3f}" if k in f else f"{'-':>8}" for k in ("clip_low", "clip_high"))
        line = f"{name:12}{float(g.norm()):9.4f}{found[name]['noise']:8.2f}{clip}"
        print(f"{line}{f['ratio_max']:11.2f}  " + " ".join(f"{c:6.3f}" for c in others))


if __name__ == "__main__":
    main()
