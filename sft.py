"""SFT: make the given replies likelier. `diff sft.py grpo.py` is the lesson of what RL adds.

torchrun --nproc_per_node=2 sft.py            # makes grpo.py's default model from nothing
torchrun --nproc_per_node=8 sft.py --model=Qwen/Qwen3-0.6B --data=chat.jsonl --epochs=3"""

import heartbeat

heartbeat.start(__name__)  # a rank is watched from here on: what follows takes seconds

import re
from dataclasses import dataclass
from typing import Literal

from transformers import AutoTokenizer

import report
import weights
from data import Examples
from model import check_config, has_weights
from rollouts import Rollouts, gather
from runtime import UserError, launch, limits
from tasks import find_task
from trainer import Trainer


@dataclass
class Config:
    """Supervised fine-tuning with FSDP2. --key=value overrides --config file.yaml."""

    run_dir: str = "runs/sft"  # this run's own folder
    seed: int = 0  # of the order of examples and of random weights
    steps: int = 700  # optimizer steps = batches
    epochs: float = 0.0  # passes over `data`, in place of `steps`
    model: str = "assets/blank"  # local folder (without weights: random ones), or hub name
    random_init: bool = False  # random weights of the model's shape
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 on GPUs
    # what is learned from
    data: str = ""  # files, folders, hub names: a.jsonl=3,b@train=1; empty: what `task` shows
    eval_data: str = ""  # what is judged, in whole; empty: `eval_size` of each source of `data`
    streaming: bool = False  # read `data` as it is trained, not before; in order but for 4096 rows
    data_workers: int = 4  # processes that tokenise, once: the result is cached
    form: str = ""  # FILE:FUNCTION that makes tokens of a row; empty: that of examples/forms.py
    loss_on: Literal["assistant", "last", "all"] = "assistant"  # every turn, the last, all tokens
    max_bad: float = 0.0  # share of rows that may be of no known form: left out; at most 1
    task: str = "calculator"  # whose demonstrations
    task_data: str = ""  # folder, file or hub name for tasks that read data
    rows_per_step: int = 64  # examples in a batch; at least 1
    tokens_per_step: int = 0  # in place of it: a batch holds what fits into so many tokens
    max_tokens: int = 64  # of an example; at least 2
    too_long: Literal["drop", "cut"] = "drop"  # what becomes of longer ones, which are counted
    # how
    trainer_replicas: int = 1  # copies of the model (HSDP); each is sharded over trainers / copies
    lora_rank: int = 0  # of adapters on the blocks' linear layers; 0: all weights are trained
    lora_alpha: float = 32.0  # adapters count lora_alpha / lora_rank
    lr: float = 2e-3  # peak learning rate
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up
    lr_min_ratio: float = 0.0  # share of the peak at the last step; at most 1
    warmup_steps: int = 20  # of linear warm-up
    beta1: float = 0.9  # AdamW; below 1
    beta2: float = 0.98  # AdamW; below 1
    weight_decay: float = 0.01  # AdamW
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm; 0: not
    tokens_per_microbatch: int = 4096  # packed tokens of one forward and backward; at least 1
    head_chunk: int = 4096  # words of the vocabulary whose logits exist at once; 0: all
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute in backward
    compile: bool = False  # torch.compile each layer
    # what is judged and kept
    eval_every: int = 100  # steps between evaluations of the held-out loss; 0: never
    eval_size: int = 256  # held-out examples of a source, at most a tenth of it
    save_every: int = 100  # steps between checkpoints; 0: only when the run is stopped
    save_minutes: float = 0.0  # minutes between checkpoints, besides; 0: by steps alone
    keep_checkpoints: int = 2  # newest ones that stay, besides the best; 0: all
    max_skipped: int = 2  # updates in a row that a gradient of NaN or infinity may cost
    start_seconds: float = 3600.0  # most that a start, save or export may take; above 0
    stuck_seconds: float = 900.0  # most that an engine step or micro-batch may take; above 0
    stop_seconds: float = 8.0  # a step longer than this is cut short by Ctrl-C, unsaved
    resume: str = "no"  # no, auto (newest checkpoint of run_dir), or a checkpoint's folder
    log_to: str = ""  # tensorboard, wandb, trackio, or several with commas, besides the run folder
    profile_steps: str = ""  # torch's profile of a step, 3, or of some, 3-5: run_dir/profile/


def check(cfg: Config, world):
    """Settings that cannot work together: one sentence, before anything is loaded."""
    limits(cfg)
    if not cfg.data:
        find_task(cfg.task)
    kinds = r"[^=,]+", r"[^=,]+=(?!0*\.?0*(,|$))\d*\.?\d+"  # without weights, or all with one
    if cfg.data and not any(re.fullmatch(f"{kind}(,{kind})*", cfg.data) for kind in kinds):
        what = "write NAME or NAME@SPLIT, with commas; all with =WEIGHT above 0, or none"
        raise UserError(f"data={cfg.data}: {what}")
    if cfg.epochs and cfg.streaming or not cfg.data and (cfg.epochs or cfg.tokens_per_step):
        what = "of data without a known length; give --steps and --rows_per_step"
        raise UserError(f"epochs={cfg.epochs:g}, tokens_per_step={cfg.tokens_per_step}: {what}")
    cfg.model = cfg.model.removeprefix("hf://")
    config = check_config(cfg.model, cfg.max_tokens, f"max_tokens={cfg.max_tokens}")
    if why := report.memory(cfg, world, config)[1]:
        raise UserError(why)


def sft_loss(logprobs, rows, cfg):
    """(B, T) log-probs -> minus their sum over the trained tokens (cross-entropy)."""
    return -(logprobs * rows.mask * rows.weight[:, None]).sum(), {}


def main(cfg: Config, world, run):
    """The loop of grpo.py, whose rows come from data."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
    data = Examples(cfg, tokenizer) if world.leads else None
    if data:
        report.before(data, run, check_config(cfg.model), has_weights(cfg.model))
    cfg.steps, names = world.agree(data and (data.steps, list(data.heldout)))
    trainer, n = Trainer(cfg, world, tokenizer), cfg.tokens_per_microbatch
    heldout = {k: gather(data.heldout[k] if data else Rollouts(), world, n) for k in names}
    start = run.resume(trainer)

    for step in range(start, cfg.steps):
        rollouts = gather(data.batch(step) if data else Rollouts(), world, n)  # each its share
        if rollouts.stop:
            return run.stopped(trainer, step, rollouts)
        metrics = trainer.step(rollouts, sft_loss, meanwhile=data and data.begin)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and heldout:
            metrics |= trainer.evaluate(heldout, sft_loss)
        run.log(step, metrics, rollouts)
        run.save(trainer, step + 1)
    report.after(data, trainer, run)
    weights.export(trainer, run.folder / "model", world)


if __name__ == "__main__":
    launch(main, Config, check)
