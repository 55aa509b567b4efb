"""torchforge's toy: the sum of the digits of a number.

torchrun --nproc_per_node=3 grpo.py --task=sum_digits
"""

import random

from tasks import Task


class SumDigits(Task):
    """`3141=`: reward 1 for `#9`, else 0."""

    def __init__(self, cfg):
        super().__init__(cfg)
        rng = random.Random("sum_digits")
        numbers = [str(rng.randrange(10, 10 ** rng.randint(2, 6))) for _ in range(8000)]
        numbers = list(dict.fromkeys(numbers))  # no prompt stands twice
        examples = [{"prompt": f"{n}=", "answer": f"#{sum(map(int, n))}"} for n in numbers]
        self.train, self.heldout = examples[512:], examples[:512]
