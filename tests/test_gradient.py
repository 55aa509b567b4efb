"""The gradient of a step is the same however the batch is split: ranks, micro-batches, head chunks,
checkpointing, for every loss. `benchmarks/invariances.py` runs the whole table.
"""

import json

import pytest
from conftest import run
from gradient_ranks import SAMPLE, VARIANTS

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@pytest.fixture(scope="module")
def cells(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients")
    for ranks in (1, 2, 3):
        done = run(ranks, "tests/gradient_ranks.py", str(out), tiny("qwen2"), timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    found = [c for ranks in (1, 2, 3) for c in json.loads((out / f"{ranks}.json").read_text())]
    for c in found:  # pytest shows them when a test fails
        print({k: v for k, v in c.items() if k != "metrics"})
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_and_weights_do_not_depend_on_the_split(cells, variant):
    mine = [c for c in cells if c["variant"] == variant and not c["planted"]]
    assert len(mine) == 3 * len(SAMPLE)
    for c in mine:
        assert c["norm"] > 1e-3, c
        assert max(c["gradient"], c["weights"]) < TOLERANCE[c["dtype"]], c
        assert not c["metrics"], c


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_local_divisor_would_show(cells, variant):
    planted = [c for c in cells if c["variant"] == variant and c["planted"]]
    assert planted and all(c["gradient"] > 100 * TOLERANCE["float32"] for c in planted)
