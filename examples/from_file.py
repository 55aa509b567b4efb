"""Any file with prompts and answers: what `--task=file.jsonl` is. Copy it to judge them otherwise.

torchrun --nproc_per_node=3 grpo.py --task=mine.jsonl --model=...
"""

from runtime import UserError
from tasks import Task, read_examples


class FileTask(Task):
    """Any file with `prompt` and `answer`. The last tenth, at most 512 prompts, is held out."""

    def __init__(self, cfg):
        super().__init__(cfg)
        examples = {}  # by prompt: one that stands twice could be on both sides
        for where, e in read_examples(cfg.task, "train"):
            if "answer" not in e or not isinstance(e.get("prompt"), str | list):
                raise UserError(f"{where}: needs 'prompt' and 'answer', has {sorted(e)}")
            examples[str(e["prompt"])] = e
        order, held = list(examples.values()), min(512, len(examples) // 10)
        if not held:
            why = f"{len(order)} different prompts; one in ten is held out, so 10 at least"
            raise UserError(f"{cfg.task}: {why}")
        self.train, self.heldout = order[:-held], order[-held:]
