"""Input that misbehaves: a sentence or a right result, never a traceback from inside a library."""

import dataclasses
import json
import math
import pathlib
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, judge, run
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as effort
from test_runs import good, learned
from transformers import AutoTokenizer

import grpo
import sft
import tasks
from data import Examples
from examples.calculator import Calculator
from generator import Generator, eos_tokens
from runtime import UserError, World, settings

few = effort(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FIELDS = sorted(f.name for f in dataclasses.fields(grpo.Config))
SCALARS = strategies.one_of(
    strategies.none(),
    strategies.booleans(),
    strategies.integers(-(2**70), 2**70),
    strategies.floats(),
    strategies.text(max_size=20),
)
JSON = strategies.recursive(
    SCALARS,
    lambda x: (
        strategies.lists(x, max_size=3)
        | strategies.dictionaries(strategies.text(max_size=9), x, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def ranks():
    with pytest.MonkeyPatch.context() as patch:
        env = dict(TORCHELASTIC_RUN_ID="x", RANK=0, WORLD_SIZE=3, LOCAL_RANK=0)
        for name, value in env.items():
            patch.setenv(name, str(value))
        yield


def one_sentence(call):
    """What `call` returns, or a UserError of one line."""
    try:
        return call()
    except UserError as error:
        assert str(error) and "\n" not in str(error)


def begin(*argv):
    """As launch does, before anything is loaded."""
    cfg = settings(grpo.Config, [f"--model={ROOT}/assets/calculator", *argv])
    grpo.check(cfg, World(cfg.num_generators, cfg.tensor_parallel_size))
    return cfg


@few
@given(content=strategies.binary(max_size=60) | strategies.text(max_size=60))
def test_a_settings_file_of_anything(ranks, content):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="ignore"))
        one_sentence(lambda: begin(f"--config={path}"))


@few
@given(found=strategies.dictionaries(strategies.sampled_from(FIELDS), JSON, max_size=3))
def test_a_settings_file_of_right_names_and_any_values(ranks, found):
    found.pop("model", None), found.pop("run_dir", None)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.yaml"
        path.write_text(yaml.safe_dump(found))
        cfg = one_sentence(lambda: begin(f"--config={path}"))
    if cfg:
        assert cfg.steps >= 0 and cfg.group_size >= 1 and not math.isnan(cfg.lr)


@few
@given(name=strategies.sampled_from(FIELDS), value=strategies.text(max_size=12))
def test_a_setting_of_any_text(ranks, name, value):
    if name not in ("model", "reference", "teacher") and "\0" not in value:
        one_sentence(lambda: begin(f"--{name}={value}"))


LINES = strategies.lists(
    strategies.binary(max_size=30)
    | JSON.map(lambda x: json.dumps(x).encode())
    | strategies.fixed_dictionaries(
        {}, optional={"prompt": JSON, "answer": JSON, "completion": JSON, "messages": JSON}
    ).map(lambda x: json.dumps(x).encode()),
    max_size=5,
)


@few
@given(content=LINES)
def test_a_data_file_of_anything(content):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
    good_rows = [json.dumps({"prompt": f"{i}", "answer": 1}).encode() for i in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.jsonl"
        path.write_bytes(b"\n".join([*content, *good_rows]))
        cfg = SimpleNamespace(task=str(path), seed=0, prompts_per_step=2)
        one_sentence(lambda: tasks.load_task(cfg))
        for max_bad in (0.0, 1.0):
            cfg = sft.Config(data=str(path), model="assets/calculator", max_bad=max_bad)
            made = one_sentence(lambda cfg=cfg: Examples(cfg, tokenizer))
            if made:
                assert made.batch(0).tokens.shape[0] == cfg.rows_per_step
    assert made  # where bad rows may be left out, the good ones are trained


ANYTHING = strategies.lists(
    strategies.text(max_size=30)
    | strategies.text(alphabet="0123456789[]()+-*=# ", max_size=30)
    | strategies.binary(max_size=30).map(lambda b: b.decode(errors="replace")),
    min_size=1,
    max_size=3,
)


@few
@given(turns=ANYTHING)
def test_replies_of_anything(turns):
    """The environment answers or ends; a reward is a number; and the sample can be written."""
    row = SimpleNamespace(name=lambda: "row", rewards={}, paid=[])
    task = CALCULATOR
    row.episode = tasks.Episode(task.train[0], turns)
    reply = judge(task, row, may_go_on=True)
    assert (reply is None) == (row.rewards.keys() == {"correct"}) and set(row.rewards.values()) <= {
        0.0,
        1.0,
    }
    assert json.loads(json.dumps({"turns": turns}))["turns"] == turns


CALCULATOR = Calculator(SimpleNamespace(seed=0, prompts_per_step=16))


def tokenizer_without(tmp_path, *names):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


def test_a_tokenizer_without_pad_or_eos(tmp_path):
    bare = tokenizer_without(tmp_path, "pad_token", "eos_token")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        eos_tokens(str(tmp_path), bare)
    with pytest.raises(UserError, match="no token that ends a reply"):
        Examples(sft.Config(), bare)
    padless = tokenizer_without(tmp_path, "pad_token")
    assert eos_tokens(str(tmp_path), padless) == {2}
    assert len(Examples(sft.Config(eval_size=2), padless).heldout[""]) == 2


def test_prompts_of_no_and_of_100_000_tokens(tmp_path):
    tokenizer = tokenizer_without(tmp_path)
    world = SimpleNamespace(generates=False, colocated=False, cuda=False, engine=0, leads=True)
    plain = [{"prompt": "1+1="}] * 3
    odd = [{"prompt": ""}, {"prompt": "1" * 100_000}]
    made = Generator(grpo.Config(), world, tasks.Task(None), tokenizer)
    made.told = {"notes": []}
    made.encode_prompt = made.encode  # no BOS: an empty prompt has no token
    made.task.train, made.task.heldout = plain + odd, plain
    made.prepare_prompts()
    assert [e["prompt"] for e in made.task.train] == ["1+1="] * 3
    assert "left out 2 of 5 train prompts" in made.told["notes"][0]
    del made.task.heldout
    made.cfg.eval_size = 0  # then nobody needs any
    made.prepare_prompts()
    made.task.train = odd
    with pytest.raises(UserError, match="left out all of 2 train prompts: over max_prompt"):
        made.prepare_prompts()


BORDERS = {
    "smallest": ["--prompts_per_step=1", "--group_size=2", "--max_new_tokens=1", "--max_turns=1"],
    "one at a time": ["--max_num_seqs=1", "--tokens_per_microbatch=1", "--prompts_per_step=2"],
    "all positions": ["--max_new_tokens=224", "--minibatches=2", "--prompts_per_step=2"],
    "no step": ["--steps=0"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", BORDERS)
def test_sizes_at_their_borders(tmp_path, name):
    args = ["--steps=2", "--group_size=3", "--eval_size=1", "--task_workers=1", *BORDERS[name]]
    folder = tmp_path / "r"
    good(run(2, "grpo.py", *args, f"--run_dir={folder}"), folder)
    if name == "no step":
        assert (folder / "model/model.safetensors").exists()
    else:
        assert [x["step"] for x in learned(folder)] == [0, 1]


@pytest.mark.parametrize("kind", ["qwen3", "unheard_of"])
def test_a_model_that_brings_code_does_not_run_it(ranks, tmp_path, kind):
    folder = shutil.copytree(ROOT / "assets/calculator", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "own.C", "AutoTokenizer": "own.T"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    argv = ["--random_init=true", f"--model={folder}"]
    if kind == "qwen3":  # transformers has its own code for it
        begin(*argv)
    else:
        with pytest.raises(UserError, match="brings Python code of its own, which would run as"):
            begin(*argv)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert not (tmp_path / "ran").exists()
