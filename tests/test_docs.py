"""The pages of docs/ and the recipes of the README run as they stand there, at a small size."""

import ast
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, lines, logs

import losses
from report import load_rollouts

sys.path.insert(0, str(ROOT / "docs"))
import loss as loss_page
import wrong

README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / f"docs/{name}.md").read_text()
    for name in ("step", "loss", "asynchrony", "wrong", "cluster")
}
CHANGE = README[README.index("## Change it") : README.index("## When it goes wrong")]
EXPERIMENTS = wrong.experiments(PAGES["wrong"])
SMALL = ["--steps=1", "--prompts_per_step=4", "--group_size=2", "--eval_size=0"]


def fenced(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """What begins with torchrun, python or make: in sh fences, indented, or between backticks."""
    shell = "\n".join(fenced(text, "sh")).splitlines() + re.findall(
        r"^    (\S.*)", text, re.MULTILINE
    )
    shell += re.findall(r"`((?:torchrun|python|make) [^`\n]+)`", text)
    return [shlex.split(x, comments=True) for x in shell if re.match(r"(torchrun|python|make) ", x)]


def python(*command: str) -> str:
    """What a page's script prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def ended(process: subprocess.Popen, folder: pathlib.Path):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:] + logs(folder)


def start(command: list[str], *more: str) -> subprocess.Popen:
    """A torchrun command of a page, with settings that make it small."""
    words = [sys.executable, "-m", "torch.distributed.run", *command[1:], *more]
    return subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def recipe(name: str, folder: pathlib.Path) -> str:
    """The README's file of that name, written to a folder; ten lines of code at most."""
    code = CHANGE[CHANGE.index(f"`{name}`") :]
    code = fenced(code, "python")[0]
    assert len([x for x in code.splitlines() if x.strip()]) <= 10, name
    (folder / name).write_text(code)
    return str(folder / name)


# ---------------------------------------------------------------- the README's recipes


def test_recipes_on_two_nodes(tmp_path):
    """Own task, own loss, separate generators, one step async and several nodes in one run: the
    README's line on each of two nodes, which are both this one.
    """
    [command] = [c for c in commands(CHANGE) if "--nnodes=2" in c]
    [apart] = [c for c in commands(CHANGE) if "--max_policy_age=1" in c]
    assert "--num_generators=2" in apart and "grpo.py" in apart
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = {"--nproc_per_node=8": "--nproc_per_node=2", "--num_generators=8": "--num_generators=2"}
    here["--rdzv_endpoint=HEAD:29500"] = f"--rdzv_endpoint=127.0.0.1:{port}"
    assert here.keys() <= set(command)
    command = [here.get(word, word) for word in command] + apart[apart.index("grpo.py") + 1 :]
    command[1:1] = ["--local_addr=127.0.0.1"]
    more = [f"--task={recipe('reverse.py', tmp_path)}:Reverse", "--save_rollouts=true"]
    more += [f"--loss={recipe('plain.py', tmp_path)}:reinforce", f"--run_dir={tmp_path}/age1"]
    more += [*SMALL[1:], "--steps=3", "--max_turns=1", "--max_new_tokens=8"]
    nodes = [start(command, *more) for _ in range(2)]
    for node in nodes:
        ended(node, tmp_path / "age1")
    steps = lines(tmp_path / "age1")
    assert [x["step"] for x in steps] == [0, 1, 2]
    ages = [x["policy_age_max"] for x in steps]  # 1 at most; on a busy machine less
    assert ages[0] == 0 and max(ages) <= 1
    assert "max_policy_age: 1\n" in (tmp_path / "age1/config.yaml").read_text()
    assert len(list((tmp_path / "age1/log").glob("rank*.log"))) == 4
    assert "clip_low" not in steps[0]  # the loss is the file's
    sample = lines(tmp_path / "age1", "samples.jsonl")[0]
    assert sample["problem"]["answer"] == sample["problem"]["prompt"][:4][::-1]
    table = python("docs/asynchrony.py", str(tmp_path / "age1"), "--steps=1", f"--out={tmp_path}")
    assert (tmp_path / "asynchrony.png").stat().st_size > 10_000
    cells = [c.strip() for c in table.splitlines()[2].split("|")]
    assert cells[1] == "age1" and float(cells[9]) == sum(ages[1:]) / 2  # their median


def test_reward_model_and_another_model_in_the_pages_run(tiny, tmp_path):
    """The README's reward model and a model of another kind, in the run of docs/step.md."""
    make, show = commands(PAGES["step"])
    [other] = [c for c in commands(CHANGE) if any(w.startswith("--model=") for w in c)]
    assert make[:3] == ["torchrun", "--nproc_per_node=3", "grpo.py"]
    assert other[2] == "grpo.py" and show == ["python", "docs/step.py", "runs/step/rollouts/0"]
    more = [f"--task={recipe('judged.py', tmp_path)}:Judged", f"--model={tiny('llama')}"]
    folder = tmp_path / "r"
    ended(start(make, *more, f"--run_dir={folder}", "--max_new_tokens=12"), folder)
    [step] = lines(folder)
    assert -10 < step["reward/likely"] < 0 and step["reward/correct"] == 0
    printed = python("docs/step.py", str(folder / "rollouts/0"))
    headings = re.findall(r"^(\d\. .*)$", printed, re.MULTILINE)
    assert len(headings) == 5, printed
    table = load_rollouts(folder / "rollouts/0")
    assert f"divisor   {int(table.sampled.sum())}\n" in printed
    marks = "".join(re.findall(r"^mask      ([.#]+)$", printed, re.MULTILINE))
    assert marks.count("#") == int(table.mask.sum())
    mismatch = float(re.search(r"largest mismatch (\S+),", printed)[1])
    assert mismatch < 1e-4


# ---------------------------------------------------------------- docs/loss.md


def test_the_pages_numbers_are_the_losses(tmp_path):
    printed = python("docs/loss.py", "--loss=grpo,dapo", f"--out={tmp_path}").splitlines()
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    rows = [x for x in PAGES["loss"].splitlines() if re.match(r"\| `\w+` \| [+-]1", x)]
    assert len(rows) >= 7
    for name in losses.LOSSES:
        table = loss_page.table([name]).splitlines()
        assert all(row in table for row in rows if f"`{name}`" in row), name
    assert printed == loss_page.table(["grpo", "dapo"]).splitlines()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_at_ratio_one_every_push_is_the_advantage(name):
    one = torch.ones(1, dtype=torch.float64)
    for advantage in (1.0, -1.0, 0.5):
        assert float(loss_page.values(name, one, advantage)[1]) == pytest.approx(
            advantage, abs=1e-6
        )


# ---------------------------------------------------------------- docs/wrong.md


def test_ten_experiments_of_one_line():
    assert len(EXPERIMENTS) == 10
    for e in EXPERIMENTS.values():
        changed = [x for x in e.diff.splitlines() if x[:1] in "+-" and x[:3] not in ("+++", "---")]
        assert [x[0] for x in changed] == ["-", "+"], e.name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_diff_applies(name, tmp_path):
    diff = EXPERIMENTS[name].diff
    wrong.copy_code(tmp_path, diff)
    path = re.search(r"^\+\+\+ b/(\S+)", diff, re.MULTILINE)[1]
    new = (tmp_path / path).read_text()
    ast.parse(new)
    assert new != (ROOT / path).read_text()
    others = [p for p in ROOT.glob("*.py") if p.name != path]
    assert all((tmp_path / p.name).read_text() == p.read_text() for p in others)


def test_an_experiment_runs_in_a_copy(tmp_path):
    """Two experiments and the README's metric, three files, in one run."""
    [metric] = fenced(CHANGE, "diff")
    diff = EXPERIMENTS["shift"].diff + EXPERIMENTS["seed"].diff + metric
    wrong.run(tmp_path / "both", diff, [*SMALL, "--steps=2"], ranks=2)
    steps = lines(tmp_path / "both")
    assert len(steps) == 2
    assert all(x["mismatch_kl"] > 0.1 and x["equal_groups"] == 1 for x in steps)
    assert all(0 < x["longest"] <= 40 for x in steps)
    shown = wrong.table(tmp_path, [EXPERIMENTS["shift"]])
    assert shown.startswith("| experiment |")


@pytest.mark.long
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_gives_itself_away(name, tmp_path):
    """The metric that the page says to watch is another than that of the unchanged code."""
    e = EXPERIMENTS[name]
    wrong.run(tmp_path / "right", "", [*e.settings, "--steps=12", "--eval_size=0"])
    wrong.run(tmp_path / name, e.diff, [*e.settings, "--steps=12", "--eval_size=0"])
    watched = [[x[e.watch] for x in wrong.steps_of(tmp_path / k)] for k in (name, "right")]
    changed, right = (sum(x) / len(x) for x in watched)
    assert abs(changed - right) > 0.05 * abs(right), (e.watch, watched)


# ---------------------------------------------------------------- commands and links


def test_the_readmes_count_of_lines():
    """Those at the top and in examples/, to a hundred or so: the table rounds."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]
    count = sum(len(path.read_text().splitlines()) for path in files)
    said = int(re.search(r"\| lines of Python \| about ([\d,]+) \|", README)[1].replace(",", ""))
    assert abs(count - said) < 150
    ppo = len((ROOT / "examples/ppo.py").read_text().splitlines())
    assert f"in {ppo} lines" in README


def test_every_command_names_what_there_is():
    """Scripts exist, and every --setting of a command is one that its script has."""
    for text in (README, *PAGES.values()):
        for command in commands(text):
            script = next((w for w in command if w.endswith(".py")), None)
            if not script:
                continue
            assert (ROOT / script).exists(), command
            if script in ("grpo.py", "sft.py"):
                import grpo
                import sft

                fields = {"grpo.py": grpo, "sft.py": sft}[script].Config.__dataclass_fields__
                asked = [w[2:].split("=")[0] for w in command[command.index(script) + 1 :]]
                asked = [w for w in asked if w not in ("config", "help") and w.isidentifier()]
                assert set(asked) <= fields.keys(), command


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f"docs/{p}.md" for p in PAGES)])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target


def test_pages_are_short_and_figures_small():
    for name, text in PAGES.items():
        assert len(text.splitlines()) <= 130, name
    for path in (ROOT / "docs").glob("*.png"):
        assert path.stat().st_size < 200_000, path
