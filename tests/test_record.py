"""The run folder, in one process: what is kept, set aside, said, exported."""

import json
import shutil
import types

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sft
import weights
from runtime import World
from trainer import Trainer

CALCULATOR = ROOT / "assets/calculator"


@pytest.fixture
def world(monkeypatch):
    """A world of one trainer, connected. With `restart` it is torchrun's second attempt."""
    env = dict(TORCHELASTIC_RUN_ID="x", RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    env |= dict(TORCHELASTIC_RESTART_COUNT=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    world = World(None)
    world.connect()
    yield world
    world.close()


def test_export_keeps_any_generation_config(world, tmp_path):
    """Many models ship top_p without do_sample, which transformers refuses to save."""
    shutil.copytree(CALCULATOR, tmp_path / "model")
    shipped = json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9})
    (tmp_path / "model/generation_config.json").write_text(shipped)
    cfg = sft.Config(model=str(tmp_path / "model"))
    trainer = Trainer(cfg, world, AutoTokenizer.from_pretrained(cfg.model))
    out = tmp_path / "out"
    weights.export(trainer, out, world)
    told = GenerationConfig.from_pretrained(out)
    assert (told.eos_token_id, told.temperature, told.top_p) == ([2, 7], 0.6, 0.9)
    assert AutoTokenizer.from_pretrained(out).encode("1+1=")
    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (CALCULATOR, out))
    assert all((a == b).all() for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert "export" in [name for name, *_ in world.spans]

    def fails(folder):
        raise OSError("disk full")

    trainer.tokenizer = types.SimpleNamespace(save_pretrained=fails)
    with pytest.raises(OSError, match="disk full"):
        weights.export(trainer, tmp_path / "torn", world)
    assert not (tmp_path / "torn").exists()  # complete or absent
    assert (tmp_path / "partial-torn/model.safetensors").exists()
