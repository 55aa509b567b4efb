"""Replies whose lengths have a long tail: in each batch a few are as long as many others together.

Every problem carries its own limit, from a log-normal distribution: half are shorter than
max_new_tokens / 16, one in a hundred reaches max_new_tokens. What the policy says is of no use; it
is rewarded for even numbers, so that there is something to learn. For measurements:
`python benchmarks/long_tail.py`.

    torchrun --nproc_per_node=2 grpo.py --task=examples/long_tail.py:LongTail --max_new_tokens=200
"""

import math
import random

from tasks import Episode, Task


class LongTail(Task):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.even]
        rng, most = random.Random("long tail"), cfg.max_new_tokens
        examples = []
        for i in range(4096 + 256):
            limit = min(math.ceil(most / 16 * math.exp(1.2 * rng.gauss(0, 1))), most)
            examples.append({"prompt": " ".join(str(i)), "max_new_tokens": limit})
        self.train, self.heldout = examples[256:], examples[:256]

    def even(self, episode: Episode) -> float:
        """The share of even ones among the numbers of the reply."""
        numbers = [int(word) for word in episode.text.split() if word.isdecimal()]
        return sum(n % 2 == 0 for n in numbers) / max(len(numbers), 1)
