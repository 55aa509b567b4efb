"""Any task of reasoning-gym (`pip install reasoning-gym`): it makes problems and scores answers.

    torchrun --nproc_per_node=3 grpo.py --task=examples/reasoning_gym_task.py:ReasoningGym \
        --task_settings.name=leg_counting --model=... --max_prompt_tokens=256 --max_new_tokens=512
"""

import re

from runtime import UserError
from tasks import Episode, Task

try:
    import reasoning_gym
except ImportError:
    raise UserError("reasoning-gym is not installed: pip install reasoning-gym") from None


class ReasoningGym(Task):
    system = "Think step by step, then give the answer inside <answer> and </answer>."
    name: str = "leg_counting"  # of a data set of reasoning_gym
    config: dict = {}  # its own settings: --task_settings.config.max_animals=5

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.score]
        config = {k: int(v) if str(v).isdecimal() else v for k, v in self.config.items()}
        try:
            self.data = [
                reasoning_gym.create_dataset(self.name, seed=seed, size=size, **config)
                for seed, size in ((1, 4096), (2, 512))
            ]
        except Exception as error:  # a name or a setting that it does not know
            raise UserError(f"reasoning-gym, {self.name}: {error}") from None
        self.train, self.heldout = ([self.problem_of(e) for e in data] for data in self.data)
        known = {e["prompt"] for e in self.heldout}
        self.train = [e for e in self.train if e["prompt"] not in known]

    @staticmethod
    def problem_of(entry: dict) -> dict:
        return {"prompt": entry["question"], "entry": entry}

    def score(self, episode: Episode) -> float:
        """What the data set itself says of the last <answer>; without one, of nothing."""
        found = re.findall(r"<answer>(.*?)</answer>", episode.text, re.DOTALL)
        answer = found[-1].strip() if found else None
        return float(self.data[0].score_answer(answer, episode.problem["entry"]))
