"""What a checkpoint costs the run beside it: the copy, the write, how long a thread stands still.

    torchrun --nproc_per_node=1 benchmarks/save.py OUT [SAVES]     # each of SAVES (2): a line

A model of Qwen3's kind with 158 million parameters: 1.9 GB of weights and moments, over the ranks
that there are. While a checkpoint is written the main thread sleeps half a millisecond at a time:
where it comes back late, the thread that writes held it up.
"""

import json
import os
import pathlib
import shutil
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
import sft  # noqa: E402
from runtime import World  # noqa: E402
from trainer import Trainer  # noqa: E402

SHAPE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 32_000}
SHAPE |= {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "head_dim": 128}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}


def main():
    out, saves = pathlib.Path(sys.argv[1]).resolve(), int((sys.argv[2:] or ["2"])[0])
    world = World(None)
    world.connect()
    if world.writes:
        shutil.rmtree(out, ignore_errors=True)
        (out / "model").mkdir(parents=True)
        (out / "model/config.json").write_text(json.dumps(SHAPE))
    world.agree(None)
    trainer = Trainer(sft.Config(model=str(out / "model"), random_init=True), world)
    for trainer.version in range(1, saves + 1):
        start = time.perf_counter()
        trainer.save(out / "checkpoints")
        copied = last = time.perf_counter()
        late = []
        while not world.write.done():
            time.sleep(0.0005)
            now = time.perf_counter()
            late, last = [*late, now - last], now
        trainer.saved()
        held = [s for s in late if s > 0.01]
        print(
            f"rank {world.rank}: copied in {copied - start:.2f} s, written in {last - copied:.2f}; "
            f"stood still for {max(late, default=0):.2f} s at most, {sum(held):.2f} in all",
            flush=True,
        )
    world.agree(None)
    if world.writes:
        shutil.rmtree(out)
    os._exit(0)


if __name__ == "__main__":
    main()
