"""On-policy distillation: a teacher scores the policy's own replies, token by token. Two losses.

    torchrun --nproc_per_node=3 grpo.py --teacher=MODEL --loss=examples/distill.py:alone
    torchrun --nproc_per_node=3 grpo.py --teacher=MODEL --loss=examples/distill.py:added

log pi_teacher - log pi_generator is minus the reverse KL's estimate at a token (Agarwal et al.,
arXiv 2306.13649; Lu et al., "On-policy distillation", 2025), with no view of the future. As an
advantage it makes likelier what the teacher finds likelier. With `alone` a group may be of one, and
it pays to leave --max_refills and --equal_rewards as they are: rewards do not count.
"""

import dataclasses

import losses

COEFFICIENT = 1.0  # of the teacher's advantage


def gain(rows):
    """(B, T) the teacher's advantage."""
    return COEFFICIENT * (rows.teacher_logprobs - rows.logprobs) * rows.mask


def alone(logprobs, rows, cfg):
    """REINFORCE with the teacher's advantage in place of the rewards'."""
    return taught(losses.reinforce, logprobs, rows, cfg, gain(rows))


def added(logprobs, rows, cfg):
    """GRPO with the sum of both."""
    return taught(losses.grpo, logprobs, rows, cfg, rows.advantage + gain(rows))


def taught(loss, logprobs, rows, cfg, advantage):
    value, sums = loss(logprobs, dataclasses.replace(rows, advantage=advantage), cfg)
    teacher = (gain(rows) * rows.weight[:, None]).sum()  # per token: minus the KL to the teacher
    return value, {**sums, "teacher_gain": teacher}
