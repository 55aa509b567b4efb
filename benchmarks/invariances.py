"""The gradient of a step, over every way to split the batch, for every loss: the README's table.

    python benchmarks/invariances.py [--cells]    # {1, 2, 3 trainers} x 2 x 3 budgets x 4 heads x 2

Real FSDP2 ranks (gloo, CPU), random weights, unequal rows, stale log-probs. A cell's difference
is |gradient - reference| / |reference|; the reference is one rank, one pack, a dense head, float64.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = pathlib.Path(__file__).parent.parent


def measure(out: str, model: str, full: bool = True) -> list[dict]:
    cells = []
    for ranks in (1, 2, 3):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [str(ROOT / "tests/gradient_ranks.py"), out, model, str(ranks)]
        script += ["--full"] if full else []
        command = [*launcher, f"--nproc_per_node={ranks}", *script]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=env, check=True, stderr=subprocess.DEVNULL)
        cells += json.loads(pathlib.Path(out, f"{ranks}.json").read_text())
    return cells


def table(cells: list[dict]) -> str:
    lines = ["| loss | cells | gradient norm | float64: gradient | weights after SGD "]
    lines[0] += "| float32: gradient | weights after SGD | with a local divisor |"
    lines.append("|" + "---|" * 8)
    for variant in dict.fromkeys(c["variant"] for c in cells):
        mine = [c for c in cells if c["variant"] == variant]
        right = [c for c in mine if not c["planted"]]

        def worst(dtype, what, right=right):
            return f"{max(c[what] for c in right if c['dtype'] == dtype):.1e}"

        norms = [c["norm"] for c in right]
        planted = [c["gradient"] for c in mine if c["planted"]]
        lines.append(
            f"| {variant} | {len(right)} | {min(norms):.3f} "
            f"| {worst('float64', 'gradient')} | {worst('float64', 'weights')} "
            f"| {worst('float32', 'gradient')} | {worst('float32', 'weights')} "
            f"| {min(planted):.2f} to {max(planted):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "assets/blank"))
        model.save_pretrained(f"{folder}/model")
        cells = measure(folder, f"{folder}/model")
    if "--cells" in sys.argv:  # each with its gradient's norm
        print("\n".join(map(json.dumps, cells)))
    print(table(cells))
    right = [c for c in cells if not c["planted"]]
    limit = {"float64": 1e-12, "float32": 1e-5}
    beyond = [c for c in right if max(c["gradient"], c["weights"]) > limit[c["dtype"]]]
    sys.exit(bool(beyond or any(c["norm"] < 1e-3 for c in right)))
