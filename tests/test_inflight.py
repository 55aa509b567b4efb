"""New weights between two engine steps: each token is of the version that its column names.

Rows that run go on, under `keep` with the cache that the old weights left, under `recompute` with
one that the new weights make again. Rows that wait for a place never see the old one.
"""

import concurrent.futures

import pytest
import torch
from conftest import run
from inflight_ranks import PLACES
from transformers import AutoModelForCausalLM

from report import load_rollouts

# Errors against one policy's log-probs and against another's: on a CPU 1.5e-5, and 3.5 nats or more
# for the worst token of a row. In fp32 on a GPU vLLM's attention rounds as TF32 does: 0.006 there.
SAME, OTHER = 2e-2 if torch.cuda.is_available() else 1e-4, 1.0


def errors(policy, table, i):
    """How far the sampled log-probs of row i are from those that `policy` computes."""
    n, at = table.length[i], table.mask[i].nonzero().flatten()
    with torch.no_grad():
        logits = policy(input_ids=table.tokens[i : i + 1, :n]).logits[0]
    return (logits.log_softmax(-1)[at - 1, table.tokens[i, at]] - table.logprobs[i, at]).abs()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Kind -> (its folder, what became of it): both at once, a core each; on a GPU in turn."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("keep", "recompute")}
    start = lambda kind: run(1, "tests/inflight_ranks.py", str(folders[kind]), kind)  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(1 if torch.cuda.is_available() else 2) as pool:
        return dict(zip(folders, zip(folders.values(), pool.map(start, folders))))


@pytest.mark.parametrize("inflight", ["keep", "recompute"])
def test_weights_that_land_among_running_rows(runs, inflight):
    folder, done = runs[inflight]
    assert done.returncode == 0, done.stderr[-3000:]
    policies = [AutoModelForCausalLM.from_pretrained(folder / v) for v in "01"]
    whole, before, stale, fresh = [], [], [], []  # largest errors, by rows
    first = []  # error of the first token behind the border, against the weights before it
    for step in range(2):
        table = load_rollouts(folder / f"rollouts/{step}")
        for i in range(len(table)):
            version = table.version[i][table.mask[i]]
            assert (version.diff() >= 0).all() and set(version.tolist()) <= {0, 1}
            old, new = (errors(policy, table, i) for policy in policies)
            if version[0] == version[-1]:
                whole.append((int(version[0]), float((old, new)[version[0]].max())))
                continue
            before.append(float(old[version == 0].max()))
            first.append(float(old[version == 1][0]))
            if (version == 1).sum() > 2:  # a single token may be likely under both
                stale.append(float(old[version == 1].max()))
                fresh.append(float(new[version == 1].max()))
    assert len(before) > PLACES // 2, "too few rows ran when the weights landed"
    assert max(before) < SAME  # the old policy; behind the border another one
    assert sum(error > SAME for error in first) > len(first) * 0.7  # no border is too early
    assert min(stale) > OTHER and len(stale) > PLACES // 2
    # What the old weights left in the cache shows, unless the new ones computed it again.
    assert max(fresh) < SAME if inflight == "recompute" else min(fresh) > OTHER
    waited = [error for version, error in whole if version == 1]
    assert len(waited) > 24  # all of the second batch, and most of the first
    assert max(error for _, error in whole) < SAME, "a row of one version read another's cache"
