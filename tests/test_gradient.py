"""The gradient of a step is the same however the batch is split: ranks, micro-batches, head chunks,
checkpointing.
"""

import pytest
import torch
from conftest import run

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients")
    for ranks in (1, 2, 3):
        done = run(ranks, "tests/gradient_ranks.py", str(out), tiny("qwen2"))
        assert done.returncode == 0, done.stderr[-3000:]
    return {ranks: torch.load(out / f"{ranks}.pt") for ranks in (1, 2, 3)}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradient_does_not_depend_on_the_split(found, dtype):
    reference, metrics = found[1]["float64", False, 10_000, 0]
    norm = reference.norm()
    assert norm > 1e-3
    for ranks, cells in found.items():
        for cell, (gradient, m) in cells.items():
            if cell[0] == dtype:
                assert (gradient - reference).norm() / norm < TOLERANCE[dtype], (ranks, *cell)
                for name, value in metrics.items():
                    assert m[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (ranks, *cell, name)


def test_it_would_show_a_local_divisor(found):
    """What a mean per micro-batch would do: the parts of the split are not even nearly equal."""
    from gradient_ranks import LENGTHS, batch

    import losses
    from rollouts import pack

    rows = batch()
    counts = [int(rows.sampled[[i for i in m]].sum()) for m in pack(LENGTHS, 1, 40)[0]]
    assert max(counts) > 1.1 * min(counts) and losses is not None


def test_rows_of_weight_zero_have_no_gradient(found):
    from gradient_ranks import batch

    rows = batch()
    _, metrics = found[2]["float64", False, 40, 5]
    assert metrics["tokens"] == int((rows.sampled * rows.weight).sum()) < int(rows.sampled.sum())
