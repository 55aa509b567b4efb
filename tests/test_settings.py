"""Every wrong setting: one sentence, before anything is loaded."""

import pickle
import shutil

import pytest
from conftest import ROOT, run
from transformers import AutoTokenizer

import grpo
import sft
from runtime import UserError, World, load_symbol, settings

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
    names = ("num_generators", "tensor_parallel_size", "trainer_replicas")
    world = World(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)})
    script.check(cfg, world)
    return cfg, world


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--stpes=3"], "there is no setting 'stpes'; did you mean 'steps'"),
        (["--step=3"], "there is no setting 'step'; did you mean 'steps'"),  # no abbreviations
        (["--steps=many"], "steps"),
        (["--lr=fast"], "lr"),
        (["--loss=gpo"], "loss"),
        (["--deterministic=perhaps"], "deterministic"),
        (["--config=missing.yaml"], "missing.yaml"),
        (["--top_p=0.9"], "top_p=0.9: must be at least 1"),
        (["--temperature=0"], "temperature=0.0"),
        (["--group_size=1"], "group_size=1"),
        (["--prompts_per_step=0"], "prompts_per_step=0"),
        (["--steps=-1"], "steps=-1: must be at least 0"),
        (["--lr=.nan"], "lr=nan: must be at least 0"),
        (["--beta1=1"], "beta1=1.0: must be below 1"),
        (["--beta2=-0.1"], "beta2=-0.1: must be at least 0"),
        (["--clip_low=-0.5"], "clip_low=-0.5"),
        (["--clip_high=-0.5"], "clip_high=-0.5"),
        (["--weight_decay=-1"], "weight_decay=-1.0"),
        (["--max_grad_norm=-1"], "max_grad_norm=-1.0"),
        (["--warmup_steps=-1"], "warmup_steps=-1"),
        (["--log_samples=-1"], "log_samples=-1"),
        (["--lr_min_ratio=2"], "lr_min_ratio=2.0: must be at most 1"),
        (["--gpu_memory_utilization=0"], "gpu_memory_utilization=0.0: must be above 0"),
        (["--gpu_memory_utilization=85"], "gpu_memory_utilization=85.0: must be at most 1"),
        (["--task_seconds=0"], "task_seconds=0.0: must be above 0"),
        (["--stop_seconds=-1"], "stop_seconds=-1.0"),
        (["--keep_checkpoints=-1"], "keep_checkpoints=-1: must be at least 0"),
        (["--max_skipped=-1"], "max_skipped=-1: must be at least 0"),
        (["--save_minutes=-1"], "save_minutes=-1.0: must be at least 0"),
        (["--correction=mask"], "add --old_policy=trainer"),
        (["--minibatches=17"], "minibatches=17: at most prompts_per_step=16"),
        (["--correction_cap=0.5"], "correction_cap=0.5: must be at least 1"),
        (["--sapo_tau_negative=0"], "sapo_tau_negative=0.0: must be above 0"),
        (["--kl_coef=0.1", "--reference=/nowhere"], "model=/nowhere: no model there"),
        (["--task=calculater"], "task=calculater"),
        (["--task=missing.py:Mine"], "there is no file missing.py"),
        (["--num_generators=3"], "num_generators=3 leaves no rank to train"),
        (
            ["--num_generators=2", "--tensor_parallel_size=4"],
            "tensor_parallel_size=4 ranks make an engine",
        ),
        (
            ["--num_generators=0", "--tensor_parallel_size=2"],
            "tensor_parallel_size=2 needs",
        ),
        (["--trainer_replicas=3"], "trainer_replicas=3 must divide the 2 trainers"),
        (["--trainer_replicas=0"], "trainer_replicas=0 must divide"),
        (["--sleep=yes"], "sleep"),
        (["--max_new_tokens=1000"], "has 256 positions"),
        (["--model=/nowhere"], "no model there"),
        (["--temperature=0.005"], "temperature=0.005: must be at least 0.01"),
        ([f"--model={ROOT}/assets/blank"], "no weights in this folder"),
    ],
)
def test_wrong_settings(ranks, argv, sentence):
    ranks(3)
    with pytest.raises(UserError, match=sentence.replace("+", r"\+")) as error:
        start(*argv)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_teacher_with_other_tokens(ranks, tmp_path):
    ranks(3)
    shutil.copytree(ROOT / "assets/calculator", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.add_tokens("!")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="its tokenizer is not that of model="):
        start(f"--teacher={tmp_path}/teacher")
    start(f"--teacher={ROOT}/assets/calculator")


def test_auto_is_the_loss_s_own(ranks):
    ranks(3)
    cfg, _ = start("--loss=dr_grpo")
    assert (cfg.aggregation, cfg.advantage, cfg.clip_high) == ("fixed", "mean", 0.2)
    cfg, _ = start("--loss=gspo", "--aggregation=token", "--clip_high=0.1")
    assert (cfg.aggregation, cfg.clip_low, cfg.clip_high) == ("token", 3e-4, 0.1)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations(ranks, path):
    """Settings that are known, of their types, that fit together; few, and none is a default."""
    import yaml

    script = {"grpo": grpo, "sft": sft}[path.parent.name]
    given = yaml.safe_load(path.read_text())
    cfg = settings(script.Config, ["--config", str(path)])
    assert {name: getattr(cfg, name) for name in given} == given
    assert not [
        k for k, v in given.items() if v == getattr(script.Config, k, {}) and k != "max_turns"
    ]
    assert 10 <= len(path.read_text().splitlines()) <= 25
    longest = cfg.max_tokens if script is sft else cfg.max_prompt_tokens + cfg.max_new_tokens
    assert longest <= cfg.tokens_per_microbatch
    if script is grpo:
        ranks(32)
        World(cfg.num_generators, cfg.tensor_parallel_size)
        grpo.find_loss(cfg)


def test_unknown_name_in_yaml(ranks, tmp_path):
    ranks(3)
    (tmp_path / "a.yaml").write_text("stpes: 3\n")
    with pytest.raises(UserError, match="there is no setting 'stpes'; did you mean 'steps'"):
        start(f"--config={tmp_path}/a.yaml")


def test_yaml_in_another_encoding(ranks, tmp_path):
    ranks(3)
    (tmp_path / "a.yaml").write_bytes("run_dir: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        start(f"--config={tmp_path}/a.yaml")


def test_wrong_settings_of_sft(ranks):
    ranks(2)
    with pytest.raises(UserError, match="max_tokens=257, but .* has 256 positions"):
        start("--max_tokens=257", script=sft)
    with pytest.raises(UserError, match="beta2=1.0: must be below 1"):
        start("--beta2=1", script=sft)
    with pytest.raises(UserError, match="task=calculater"):
        start("--task=calculater", script=sft)
    start("--task=calculater", "--data=mine.jsonl", script=sft)  # the task has no part in it


def test_a_users_file_is_run_once_and_its_classes_pickle(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class A: pass\nclass B: pass\n")
    first, again = (load_symbol(f"{file}:A", "task") for _ in range(2))
    assert first is again
    assert isinstance(pickle.loads(pickle.dumps(first())), first)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.py").write_text("A = 3\n")  # a file of the same name is another file
    assert load_symbol(f"{tmp_path}/other/mine.py:A", "task") == 3
    with pytest.raises(UserError, match="write .*mine.py:NAME"):
        load_symbol(f"{file}:C", "loss")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1\ndef f(:\n", "line 2: SyntaxError"),
        ("\nimport no_such_module\n", "line 2: ModuleNotFoundError: No module named"),
        ("def f():\n    return 1 / 0\n\nf()\n", "line 2: ZeroDivisionError"),
    ],
)
def test_a_users_file_that_does_not_load(tmp_path, text, sentence):
    file = tmp_path / "mine.py"
    file.write_text(text)
    for _ in range(2):  # a broken file is not remembered
        with pytest.raises(UserError, match=f"loss=.*mine.py:f: .*mine.py, {sentence}") as error:
            load_symbol(f"{file}:f", "loss")
        assert "\n" not in str(error.value)


def test_command_line_wins_over_yaml_wins_over_default(ranks, tmp_path):
    ranks(3)
    (tmp_path / "a.yaml").write_text("lr: 1e-6\nsteps: 7\n")
    file = f"{tmp_path}/a.yaml"
    for before, after in (
        ([f"--config={file}"], []),
        (["--config", file], []),
        ([], ["--config", file]),
    ):
        cfg, _ = start(*before, "--steps=8", *after)  # wherever the file stands
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


def test_an_engine_that_sleeps_keeps_no_rows(ranks):
    """A GPU that does both puts its engine to sleep, so cannot sample ahead; a CPU never does."""
    ranks(1)
    cfg, world = start("--max_policy_age=1")
    world.cuda = True
    with pytest.raises(UserError, match="max_policy_age=1: an engine that sleeps .*--sleep=no"):
        grpo.check(cfg, world)
    cfg.sleep = "no"
    grpo.check(cfg, world)


def test_shards_are_consecutive_ranks(ranks):
    ranks(6, rank=3)
    _, w = start("--num_generators=2", "--trainer_replicas=2")
    assert w.shards == [[2, 3], [4, 5]]


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
