"""The gradient of a step is the same however the batch is split: ranks, engines that bring rows,
copies of the model, micro-batches, head chunks, checkpointing, for every loss.
`benchmarks/invariances.py` runs the whole table.
"""

import json

import pytest
import torch
from conftest import run
from gradient_ranks import SAMPLE, VARIANTS
from safetensors.torch import load_file
from topologies import TOPOLOGIES

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


RANKS = {  # name -> ranks, settings; the first is what the others are compared with
    "1": (1, {}),
    "1 + 2": TOPOLOGIES["1 + 2"],
    "3": (3, {}),
    "4 as 2 copies": (4, {"trainer_replicas": 2}),
}
MORE = {**TOPOLOGIES, "2 x TP 2 + 2 copies": (6, {"num_generators": 4, "trainer_replicas": 2})}


def measure(out, model, name, ranks, settings) -> list[dict]:
    words = [f"{k}={v}" for k, v in settings.items()]
    done = run(ranks, "tests/gradient_ranks.py", str(out), model, name, *words, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def cells(tiny, tmp_path_factory, request):
    out = tmp_path_factory.mktemp("gradients")
    every = {**RANKS, **MORE} if request.config.getoption("--long") else RANKS
    found = [c for name, how in every.items() for c in measure(out, tiny("qwen2"), name, *how)]
    models = [load_file(out / f"{name}-model/model.safetensors") for name in every]
    for model in models:  # the weights were put back: shards, even and uneven, make the same whole
        assert all(torch.equal(values, models[0][name]) for name, values in model.items())
    for c in found:  # pytest shows them when a test fails
        print({k: v for k, v in c.items() if k != "metrics"})
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_and_weights_do_not_depend_on_the_split(cells, variant):
    mine = [c for c in cells if c["variant"] == variant and not c["planted"]]
    assert len(mine) == len({c["ranks"] for c in cells}) * len(SAMPLE) >= 4 * len(SAMPLE)
    for c in mine:
        assert c["norm"] > 1e-3, c
        assert max(c["gradient"], c["weights"]) < TOLERANCE[c["dtype"]], c
        assert not c["metrics"], c


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_local_divisor_would_show(cells, variant):
    planted = [c for c in cells if c["variant"] == variant and c["planted"]]
    assert planted and all(c["gradient"] > 100 * TOLERANCE["float32"] for c in planted)
