"""GRPO: sample a group of replies to each prompt, push up those better than their group's mean.

Left out on purpose: value network, mixture of experts, images.

    torchrun --nproc_per_node=3 grpo.py                     # the embedded default: CPU, 90 s
    torchrun --nproc_per_node=3 grpo.py --max_policy_age=1  # engines sample ahead meanwhile
    torchrun --nproc_per_node=1 grpo.py                     # one rank does both
"""

from dataclasses import dataclass
from typing import Literal

from transformers import AutoTokenizer

import losses
import weights
from generator import Generator
from model import check_config, has_weights
from rollouts import gather
from runtime import UserError, at_least, launch, load_symbol
from tasks import load_task
from trainer import Trainer


@dataclass
class Config:
    """GRPO with vLLM generators, FSDP2 trainers. --key=value overrides --config file.yaml."""

    run_dir: str = "runs/grpo"  # this run's own folder
    seed: int = 0  # of prompts, sampling and random weights
    steps: int = 46  # optimizer steps = batches
    model: str = "assets/calculator"  # local folder, hub name, or hf://org/name
    random_init: bool = False  # random weights of the model's shape, for measurements
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 on GPUs
    # what is asked
    task: str = "calculator"  # or sum_digits, countdown, gsm8k, a .jsonl file, my_file.py:MyTask
    task_data: str = ""  # folder, file or hub name for tasks that read data
    task_workers: int = 8  # threads for environments and rewards
    task_seconds: float = 60.0  # time limit of one environment reply with its rewards
    prompts_per_step: int = 16  # prompts (groups) in a batch
    group_size: int = 8  # replies to each prompt
    max_prompt_tokens: int = 32  # longer prompts are left out and counted
    max_new_tokens: int = 40  # tokens after the prompt: all turns, the environment's too
    max_turns: int = 4  # turns of the policy in one reply
    temperature: float = 1.0  # of the sampling, and of the trainer's log-probs
    top_p: float = 1.0  # must be 1 while training: filtered sampling has other log-probs
    # what is learned from it
    loss: str = "grpo"  # policy loss: grpo, or my_file.py:my_loss
    advantage: Literal["mean", "mean_std"] = "mean_std"  # minus the group's mean; over its std
    aggregation: Literal["token", "fixed"] = "token"  # the sum's divisor: tokens or rows x length
    clip_low: float = 0.2  # the ratio's clip is [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.28  # larger than clip_low: room for rare tokens (DAPO)
    lr: float = 6.5e-4  # peak learning rate
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up
    lr_min_ratio: float = 0.0  # share of the peak at the last step
    warmup_steps: int = 0  # of linear warm-up
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm; 0: not
    # who does it
    num_generators: int = 1  # ranks that generate; the others train; 0: every rank does both
    tensor_parallel_size: int = 1  # ranks per engine
    max_policy_age: int = 0  # versions that a token may be old when trained; 0: on-policy
    inflight: Literal["keep", "recompute"] = "keep"  # a running row's cache at new weights
    deterministic: bool = False  # same command, same seed, same ranks, CPU: bitwise the same run
    # how
    tokens_per_microbatch: int = 4096  # packed tokens of one forward and backward
    head_chunk: int = 4096  # positions whose logits exist at once; 0: all
    activation_checkpointing: bool = False  # recompute layers in the backward
    compile: bool = False  # torch.compile each layer
    max_num_seqs: int = 256  # rows that an engine runs at once
    gpu_memory_utilization: float = 0.85  # share of the GPU that an engine may take
    enforce_eager: bool = False  # no CUDA graphs (a CPU never has any)
    sync_bucket_mb: int = 512  # megabytes in one weight broadcast
    check_weights: bool = False  # prove after each sync that all hold the same bits
    # what is judged and kept
    eval_every: int = 10  # steps between evaluations on held-out prompts; 0: only at the end
    eval_size: int = 128  # held-out prompts; 0: no evaluation
    eval_samples: int = 1  # 1: greedy; more: that many samples at `temperature`
    save_every: int = 0  # steps between checkpoints; 0: only when the run is stopped
    resume: str = "no"  # no, auto (newest checkpoint of run_dir), or a checkpoint's folder
    save_rollouts: bool = False  # keep every step's table in run_dir/rollouts/
    log_samples: int = 2  # rows of each engine and step that go to samples.jsonl


def check(cfg: Config, world):
    """Settings that cannot work together: one sentence, before anything is loaded."""
    if cfg.top_p != 1.0:
        raise UserError(
            f"top_p={cfg.top_p}: training needs 1.0; filtered sampling has log-probs of its own"
        )
    if cfg.temperature <= 0:
        raise UserError(
            f"temperature={cfg.temperature}: sampling while training needs a temperature above 0"
        )
    if cfg.group_size == 1 and cfg.advantage == "mean_std":
        raise UserError(
            "group_size=1 has no spread to divide by: use 2 or more, or --advantage=mean"
        )
    if world.colocated and cfg.max_policy_age:
        raise UserError(
            f"max_policy_age={cfg.max_policy_age}: ranks that also train cannot sample ahead; use 0"
        )
    least = {"prompts_per_step": 1, "group_size": 1, "max_prompt_tokens": 1, "max_new_tokens": 1}
    least |= {"max_turns": 1, "task_workers": 1, "eval_samples": 1, "max_num_seqs": 1}
    least |= {"tokens_per_microbatch": 1, "sync_bucket_mb": 1, "head_chunk": 0, "lr": 0, "steps": 0}
    least |= {"max_policy_age": 0, "eval_every": 0, "eval_size": 0, "save_every": 0}
    at_least(cfg, least)
    find_loss(cfg.loss)
    cfg.model = cfg.model.removeprefix("hf://")
    if not cfg.random_init and not has_weights(cfg.model):
        raise UserError(f"model={cfg.model}: a configuration, but no weights in this folder")
    config, longest = check_config(cfg.model), cfg.max_prompt_tokens + cfg.max_new_tokens
    if longest > getattr(config, "max_position_embeddings", longest):
        limit = config.max_position_embeddings
        raise UserError(
            f"max_prompt_tokens + max_new_tokens = {longest}, but {cfg.model} has {limit} positions"
        )


def find_loss(name: str):
    """One of losses.LOSSES, or a function with the same signature in the user's file."""
    if name in losses.LOSSES:
        return losses.LOSSES[name]
    if ".py:" in name:
        return load_symbol(name, "loss")
    raise UserError(f"loss={name}: known are {', '.join(losses.LOSSES)}, or my_file.py:my_loss")


def main(cfg: Config, world, run):
    """The loop. Every rank runs every line; one that has no part in a line passes through it."""
    task, loss = load_task(cfg), losses.with_diagnostics(find_loss(cfg.loss))
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    trainer = Trainer(cfg, world, tokenizer)
    start = run.resume(trainer)
    if world.writes and cfg.max_policy_age > 1:
        run.say(f"max_policy_age={cfg.max_policy_age}: this loss has no correction for old tokens")
    generator = Generator(cfg, world, task, tokenizer, version=start)

    for step in range(start, cfg.steps):
        weights.sync(trainer, generator, world)  # version = step; rows in flight go on
        rollouts = generator.collect(step)  # until batch `step` is complete, rewards included
        rollouts.advantage = losses.group_advantages(rollouts, cfg.advantage)
        rollouts = gather(rollouts, world, cfg.tokens_per_microbatch)  # generators -> trainers
        if rollouts.stop:
            return run.stopped(trainer, step)
        metrics = trainer.step(rollouts, loss, losses.divisor(rollouts.all, cfg))
        run.log(step, {**table_metrics(rollouts.all), **metrics}, rollouts)
        run.save(trainer, step + 1)
    weights.sync(trainer, generator, world)  # the last evaluation and the export are one version
    run.log(cfg.steps, {}, gather(generator.finish(), world, cfg.tokens_per_microbatch))
    weights.export(trainer, run.folder / "model", world)


def table_metrics(table) -> dict[str, float]:
    """Figures of the whole batch that need no model."""
    mean, each = lambda x: x.float().mean().item(), table.rewards  # noqa: E731
    return {
        "reward": mean(table.reward),
        "reward_std": table.reward.std(correction=0).item(),
        **({f"reward/{name}": mean(x) for name, x in each.items()} if len(each) > 1 else {}),
        "equal_groups": mean(losses.equal_groups(table)),  # groups that teach nothing
        "finished": mean(table.finished),
        "length": mean(table.sampled),
    }


if __name__ == "__main__":
    launch(main, Config, check)
