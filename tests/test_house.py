"""The plan of the house: who imports whom, and how long a file may be."""

import ast
import dataclasses
import textwrap

import mutate
import pytest
from conftest import ROOT

import grpo
import sft
from runtime import setting_help

CORE = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "report")
MAY_IMPORT = {
    "heartbeat": set(),
    "runtime": {"record", "report", "heartbeat"},
    "record": {"report", "heartbeat"},
    "report": {"rollouts"},
    "losses": set(),
    "tasks": {"runtime"},  # for UserError alone
    "rollouts": set(),
    "model": {"runtime"},
    "trainer": {"runtime", "rollouts", "model"},
    "engine": {"runtime"},
    "workers": {"runtime", "rollouts", "tasks"},
    "generator": {"runtime", "rollouts", "tasks", "engine", "workers", "report"},
    "weights": {"report"},  # it is handed the trainer and the generator
    "data": {"runtime", "rollouts", "tasks"},
    "grpo": {*CORE, "report"} - {"sft"},
    "sft": {*CORE, "report"} - {"grpo", "generator", "losses"},
}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_arrows_between_files(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported & MAY_IMPORT.keys() <= MAY_IMPORT[name]


def test_mutations_follow_the_code():
    for number, _, file, old, _ in mutate.mutations():
        assert (ROOT / file).read_text().count(old) == 1, (number, file, old)


def test_budget():
    count = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert sum(count.values()) <= 3300 and max(count.values()) <= 500, count


def test_readme_has_the_lines_and_the_loop_as_they_stand():
    text = (ROOT / "README.md").read_text()
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert f"One file per component, {sum(lines.values()):,} lines in all" in text
    lines["report"] = len((ROOT / "report.py").read_text().splitlines())
    assert f"and {lines['report']} that draw the report" in text
    for name, count in lines.items():
        assert f"| `{name}.py` | {count} |" in text, name
    code = (ROOT / "grpo.py").read_text()
    start = code.index("    for step in range(start")
    loop = code[start : code.index("    weights.sync(trainer, generator, world)  # the last")]
    assert f"```python\n{textwrap.dedent(loop)}```" in text


def test_only_runtime_reads_ranks():
    for name in set(CORE) - {"runtime", "engine"}:  # the engine shows vLLM a world of its own
        assert "get_rank" not in (ROOT / f"{name}.py").read_text()


def test_every_setting_has_a_meaning():
    for script in (grpo, sft):
        names = {f.name for f in dataclasses.fields(script.Config)}
        missing = names - setting_help(script.Config).keys()
        assert not missing, f"{script.__name__}.py: no comment behind {missing}"
