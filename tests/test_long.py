"""Minutes, not seconds: `make test-all`."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.long
def test_the_default_learns_from_every_warm_start_and_seed(tmp_path):
    """{3 warm starts} x {5 seeds} x {ages 0, 1}; benchmarks/RESULTS.md keeps the table."""
    script = ROOT / "benchmarks/default_runs.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], cwd=ROOT, check=True)
    import json

    done = [json.loads(x) for x in (tmp_path / "default_runs.jsonl").read_text().splitlines()]
    last = sorted(d["reward_last5"] for d in done)
    assert len(done) == 30 and last[0] >= 0.90 and last[2] >= 0.95, last
    assert all(d["accuracy_before"] < 0.1 and d["accuracy_after"] >= 0.95 for d in done)
    idle = {age: sum(d["idle_trainer"] for d in done if d["age"] == age) / 15 for age in (0, 1)}
    assert idle[1] <= 0.7 * idle[0], idle
