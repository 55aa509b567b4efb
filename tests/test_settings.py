"""Every wrong setting: one sentence, before anything is loaded."""

import pytest
from conftest import ROOT, run

import grpo
import sft
from runtime import UserError, World, settings

MODEL = f"--model={ROOT}/assets/calculator"


@pytest.fixture
def ranks(monkeypatch):
    def become(size, rank=0):
        env = dict(
            TORCHELASTIC_RUN_ID="x",
            RANK=rank,
            WORLD_SIZE=size,
            LOCAL_RANK=rank,
            TORCHELASTIC_RESTART_COUNT=0,
        )
        for k, v in env.items():
            monkeypatch.setenv(k, str(v))

    return become


def start(*argv, script=grpo):
    cfg = settings(script.Config, [MODEL, *argv])
    world = World(getattr(cfg, "num_generators", None), getattr(cfg, "tensor_parallel_size", 1))
    script.check(cfg, world)
    return cfg, world


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--stpes=3"], "there is no setting 'stpes'; did you mean 'steps'"),
        (["--steps=many"], "steps"),
        (["--lr=fast"], "lr"),
        (["--loss=gpo"], "loss"),
        (["--deterministic=perhaps"], "deterministic"),
        (["--config=missing.yaml"], "missing.yaml"),
        (["--top_p=0.9"], "top_p=0.9: training needs 1.0"),
        (["--temperature=0"], "temperature=0.0"),
        (["--group_size=1"], "group_size=1"),
        (["--prompts_per_step=0"], "prompts_per_step=0"),
        (["--steps=-1"], "steps=-1"),
        (["--num_generators=3"], "num_generators=3 leaves no rank to train"),
        (
            ["--num_generators=2", "--tensor_parallel_size=4"],
            "tensor_parallel_size ranks make an engine",
        ),
        (["--num_generators=0", "--tensor_parallel_size=2"], "tensor_parallel_size above 1"),
        (["--num_generators=0", "--max_policy_age=1"], "max_policy_age=1"),
        (["--max_new_tokens=1000"], "has 256 positions"),
        (["--model=/nowhere"], "no model there"),
        ([f"--model={ROOT}/assets/blank"], "no weights in this folder"),
    ],
)
def test_wrong_settings(ranks, argv, sentence):
    ranks(3)
    with pytest.raises(UserError, match=sentence.replace("+", r"\+")) as error:
        start(*argv)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_unknown_name_in_yaml(ranks, tmp_path):
    ranks(3)
    (tmp_path / "a.yaml").write_text("stpes: 3\n")
    with pytest.raises(UserError, match="there is no setting 'stpes'; did you mean 'steps'"):
        start(f"--config={tmp_path}/a.yaml")


def test_command_line_wins_over_yaml_wins_over_default(ranks, tmp_path):
    ranks(3)
    (tmp_path / "a.yaml").write_text("lr: 1e-6\nsteps: 7\n")
    cfg, _ = start(f"--config={tmp_path}/a.yaml", "--steps=8")
    assert (cfg.lr, cfg.steps, cfg.group_size) == (1e-6, 8, grpo.Config.group_size)
    assert start("--lr=1", script=sft)[0].lr == 1.0


def test_hub_names(ranks):
    ranks(3)
    assert start(f"--model=hf://{ROOT}/assets/calculator")[0].model == f"{ROOT}/assets/calculator"


def test_without_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc_per_node=3"):
        World(1)


def test_roles(ranks):
    ranks(4, rank=2)
    _, w = start("--num_generators=2")
    assert (w.generates, w.trains, w.writes, w.trainer_ranks, w.engines) == (
        False,
        True,
        True,
        [2, 3],
        [[0], [1]],
    )
    ranks(6, rank=3)
    _, w = start("--num_generators=4", "--tensor_parallel_size=2")
    assert (w.engines, w.engine, w.leads, w.trains) == ([[0, 1], [2, 3]], 1, False, False)
    ranks(1)
    _, w = start()  # a world of one is colocated
    assert w.generates and w.trains and w.leads and w.colocated


def test_said_once_by_the_ranks():
    done = run(3, "grpo.py", "--stpes=3")
    assert done.returncode != 0 and done.stderr.count("there is no setting 'stpes'") == 1
    assert "line" not in done.stderr.partition("nanoforge:")[0]  # no traceback of ours


def test_help_names_every_setting():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, str(ROOT / "grpo.py"), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "rows that an engine runs at once" in " ".join(
        done.stdout.split()
    )
