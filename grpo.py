"""GRPO: sample a group of replies to each prompt, push up those better than their group's mean.

torchrun --nproc_per_node=3 grpo.py                     # the embedded default: CPU, 90 s
torchrun --nproc_per_node=3 grpo.py --max_policy_age=1  # engines sample ahead meanwhile
torchrun --nproc_per_node=1 grpo.py                     # one rank does both"""

import heartbeat

heartbeat.start(__name__)  # a rank is watched from here on: what follows takes seconds

from dataclasses import dataclass, field
from typing import Literal

from transformers import AutoTokenizer

import losses
import report
import weights
from generator import Generator
from model import check_config, has_weights
from rollouts import gather
from runtime import UserError, launch, limits, load_symbol
from tasks import find_task, load_task
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
    task_settings: dict = field(default_factory=dict)  # the task's own: --task_settings.system=...
    task_workers: int = 8  # processes for environments and rewards; at least 1
    task_seconds: float = 60.0  # time limit of one call of environment or reward; above 0
    prompts_per_step: int = 16  # prompts (groups) in a batch; at least 1
    group_size: int = 8  # replies to each prompt; at least 1
    max_prompt_tokens: int = 32  # longer prompts are left out and counted; at least 1
    max_new_tokens: int = 40  # tokens after the prompt, the environment's too; at least 1
    max_turns: int = 4  # turns of the policy in one reply; at least 1
    episode_seconds: float = 0.0  # a turn that ends later than this is the last; 0: no limit
    temperature: float = 1.0  # of the sampling, and of the trainer's log-probs; at least 0.01
    top_p: float = 1.0  # at least 1, at most 1: filtered sampling has other log-probs
    # what is learned from it
    discount: float = 1.0  # of a later turn's reward, a turn; above 0, at most 1
    loss: str = "grpo"  # grpo dr_grpo dapo cispo gspo sapo reinforce, or my_file.py:my_loss
    advantage: Literal["auto", "mean", "mean_std", "leave_one_out"] = "auto"  # auto: the loss's own
    aggregation: Literal["auto", "token", "sequence", "prompt", "fixed"] = "auto"  # the divisor
    clip_low: float = -1.0  # the ratio's clip is [1 - clip_low, 1 + clip_high]; -1: the loss's own
    clip_high: float = -1.0  # larger than clip_low: room for rare tokens (DAPO)
    dual_clip: float = 3.0  # dapo: the ratio's cap where the advantage is negative; at least 1
    sapo_tau_positive: float = 1.0  # sapo: its gate's temperature where A > 0; above 0
    sapo_tau_negative: float = 1.05  # sapo: and where A < 0; above 0
    old_policy: Literal["generator", "trainer"] = "generator"  # whom the ratio divides by
    correction: Literal["none", "truncate", "mask"] = "none"  # of trainer against generator
    correction_level: Literal["token", "sequence"] = "token"  # whose ratio is corrected by
    correction_cap: float = 2.0  # largest weight (truncate); mask: within [1/cap, cap]; at least 1
    epochs_per_batch: int = 1  # times that a batch is trained; at least 1
    minibatches: int = 1  # optimizer steps that a batch is split into, by prompts; at least 1
    overlong: Literal["train", "mask"] = "train"  # replies that were cut off
    equal_rewards: Literal["train", "mask", "skip"] = "train"  # of groups; skip: train, uncomputed
    max_refills: int = 0  # times that a slot draws again when its group teaches nothing (DAPO)
    kl_coef: float = 0.0  # of the KL to the reference, in the loss; 0: no reference is loaded
    kl: Literal["k1", "k2", "k3"] = "k3"  # its estimator; the gradient of k1 is 0 on average
    reference: str = ""  # model of the KL; empty: `model` as it was at the start
    teacher: str = ""  # model to distil from, same tokenizer: see examples/distill.py
    offload_frozen: bool = False  # reference and teacher wait in host memory
    lora_rank: int = 0  # of adapters on the blocks' linear layers; 0: all weights are trained
    lora_alpha: float = 32.0  # adapters count lora_alpha / lora_rank
    lr: float = 6.5e-4  # peak learning rate
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up
    lr_min_ratio: float = 0.0  # share of the peak at the last step; at most 1
    warmup_steps: int = 0  # of linear warm-up
    beta1: float = 0.9  # AdamW; below 1
    beta2: float = 0.95  # AdamW; below 1
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm; 0: not
    # who does it
    num_generators: int = 1  # ranks that generate; the others train; 0: every rank does both
    tensor_parallel_size: int = 1  # ranks per engine
    trainer_replicas: int = 1  # copies of the model (HSDP); each is sharded over trainers / copies
    sleep: Literal["auto", "no"] = "auto"  # auto: a GPU that does both frees the engine's memory
    max_policy_age: int = 0  # versions that a token may be old when trained; 0: on-policy
    inflight: Literal["keep", "recompute"] = "keep"  # the cache of a running row at new weights
    deterministic: bool = False  # same command, same seed, same ranks, CPU: bitwise the same run
    # how
    tokens_per_microbatch: int = 4096  # packed tokens of one forward and backward; at least 1
    head_chunk: int = 4096  # words of the vocabulary whose logits exist at once; 0: all
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute in backward
    compile: bool = False  # torch.compile each layer
    max_num_seqs: int = 256  # rows that an engine runs at once; at least 1
    gpu_memory_utilization: float = 0.85  # share of the GPU for an engine; above 0, at most 1
    enforce_eager: bool = False  # no CUDA graphs (a CPU never has any)
    sync_bucket_mb: int = 512  # megabytes in one weight broadcast; at least 1
    check_weights: bool = False  # prove after each sync that all hold the same bits
    # what is judged and kept
    eval_every: int = 10  # steps between evaluations on held-out prompts; 0: only at the end
    eval_size: int = 128  # held-out prompts; 0: no evaluation
    eval_samples: int = 1  # 1: greedy; more: that many samples at `temperature`; at least 1
    save_every: int = 10  # steps between checkpoints; 0: only when the run is stopped
    save_minutes: float = 0.0  # minutes between checkpoints, besides; 0: by steps alone
    keep_checkpoints: int = 2  # newest ones that stay, besides the best; 0: all
    max_skipped: int = 2  # updates in a row that a gradient of NaN or infinity may cost
    start_seconds: float = 3600.0  # most that a start, save or export may take; above 0
    stuck_seconds: float = 900.0  # most that an engine step or micro-batch may take; above 0
    stop_seconds: float = 8.0  # a step longer than this is cut short by Ctrl-C, unsaved
    resume: str = "no"  # no, auto (newest checkpoint of run_dir), or a checkpoint's folder
    save_rollouts: bool = False  # keep every step's table in run_dir/rollouts/
    log_samples: int = 3  # rows of each engine and step for samples.jsonl: best, worst, surprising
    log_to: str = ""  # tensorboard, wandb, trackio, or several with commas, besides the run folder
    profile_steps: str = ""  # torch's profile of a step, 3, or of some, 3-5: run_dir/profile/


def check(cfg: Config, world):
    """Settings that cannot work together: one sentence, before anything is loaded."""
    find_loss(cfg)
    if cfg.group_size == 1 and not cfg.teacher:
        raise UserError("group_size=1 has nothing to compare a reply with: use 2 or more")
    if cfg.correction != "none" and cfg.old_policy == "generator":
        what = "with the generator's old policy the ratio itself is the correction"
        raise UserError(f"correction={cfg.correction}: {what}; add --old_policy=trainer")
    if cfg.minibatches > cfg.prompts_per_step:
        most = f"at most prompts_per_step={cfg.prompts_per_step}"
        raise UserError(f"minibatches={cfg.minibatches}: {most}")
    if world.colocated and world.cuda and cfg.sleep == "auto" and cfg.max_policy_age:
        why = "an engine that sleeps while its rank trains keeps no rows"
        raise UserError(f"max_policy_age={cfg.max_policy_age}: {why}; use 0, or --sleep=no")
    limits(cfg)
    find_task(cfg.task)
    cfg.model = cfg.model.removeprefix("hf://")
    longest = cfg.max_prompt_tokens + cfg.max_new_tokens
    check_config(cfg.model, longest, f"max_prompt_tokens + max_new_tokens = {longest}")
    for path in {cfg.model, *frozen_models(cfg).values()}:  # a reference, a teacher
        check_config(path)
        if not has_weights(path) and not (cfg.random_init and path == cfg.model):
            raise UserError(f"{path}: a configuration, but no weights in this folder")
        both, safe = (cfg.model, path), {"trust_remote_code": False}
        ours, theirs = (AutoTokenizer.from_pretrained(p, **safe).get_vocab() for p in both)
        if ours != theirs:
            raise UserError(f"{path}: its tokenizer is not that of model={cfg.model}")


def find_loss(cfg: Config):
    """The loss, of losses.LOSSES or a file. Puts its own values where settings say auto or -1."""
    if cfg.loss not in losses.LOSSES and ".py:" not in cfg.loss:
        known = ", ".join(losses.LOSSES)
        raise UserError(f"loss={cfg.loss}: known are {known}, or my_file.py:my_loss")
    for name, value in {**losses.OWN["grpo"], **losses.OWN.get(cfg.loss, {})}.items():
        if getattr(cfg, name) in ("auto", -1.0):
            setattr(cfg, name, value)
    return losses.LOSSES.get(cfg.loss) or load_symbol(cfg.loss, "loss")


def frozen_models(cfg: Config) -> dict[str, str]:
    """Column of the table -> model that writes it, for the models that the settings need."""
    models = {"ref_logprobs": (cfg.reference or cfg.model) if cfg.kl_coef else ""}
    models["teacher_logprobs"] = cfg.teacher
    return {column: path.removeprefix("hf://") for column, path in models.items() if path}


def main(cfg: Config, world, run):
    """The loop. Every rank runs every line; one that has no part in a line passes through it."""
    task, loss = load_task(cfg), losses.policy_loss(find_loss(cfg))
    tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
    tokenizer.chat_template = task.template or tokenizer.chat_template
    trainer = Trainer(cfg, world, tokenizer, frozen_models(cfg))
    start = run.resume(trainer)
    generator = Generator(cfg, world, task, tokenizer, version=start)

    for step in range(start, cfg.steps):
        weights.sync(trainer, generator, world)  # version = step; rows in flight go on
        rollouts = generator.collect(step)  # until batch `step` is complete, rewards included
        rollouts.advantage = losses.group_advantages(rollouts, cfg.advantage)
        rollouts.weight = losses.row_weights(rollouts, cfg)
        rollouts.share = losses.shares(rollouts, cfg)
        rollouts = gather(rollouts, world, cfg.tokens_per_microbatch, cfg.minibatches)
        if rollouts.stop:
            return run.stopped(trainer, step, rollouts)
        rollouts = trainer.score(rollouts)  # log-probs of reference and teacher, where asked for
        metrics = report.derived(trainer.step(rollouts, loss, losses.divisor))
        run.log(step, {**report.table_metrics(rollouts), **metrics}, rollouts)
        run.save(trainer, step + 1)
    weights.sync(trainer, generator, world)  # the last evaluation and the export are one version
    run.log(cfg.steps, {}, gather(generator.finish(), world, cfg.tokens_per_microbatch))
    weights.export(trainer, run.folder / "model", world)


if __name__ == "__main__":
    launch(main, Config, check)
