"""What the ranks of many_gpus.py run: grpo.py, after a restart at age 0 and with weights proven."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import heartbeat

heartbeat.start(__name__)

import grpo
from runtime import launch


def check(cfg, world):
    """grpo.py's, once what changes at the restart has changed."""
    if world.restart:
        cfg.max_policy_age, cfg.check_weights = 0, True
    grpo.check(cfg, world)


if __name__ == "__main__":
    launch(grpo.main, grpo.Config, check)
