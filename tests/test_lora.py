"""LoRA: what is trained, what travels, what is kept."""

import json

import pytest
import torch
from conftest import ROOT, lines, run
from safetensors.torch import load_file
from test_runs import good
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
import weights
from data import Examples
from rollouts import gather
from trainer import Trainer

CALCULATOR = str(ROOT / "assets/calculator")


def trained(world, steps=2, **settings):
    """A trainer after some steps of SFT, and how it is set."""
    cfg = sft.Config(**{"model": CALCULATOR, "rows_per_step": 8, "warmup_steps": 0, **settings})
    tokenizer = AutoTokenizer.from_pretrained(CALCULATOR)
    trainer, data = Trainer(cfg, world, tokenizer), Examples(cfg, tokenizer)
    for step in range(steps):
        trainer.step(gather(data.batch(step), world, 4096), sft.sft_loss)
    return trainer


def test_only_adapters_are_trained_and_begin_as_nothing(world):
    whole = trained(world, 0)
    base = {name: full.clone() for name, full in weights.stream(whole)}
    trainer = trained(world, 0, lora_rank=4)
    at_first = dict(weights.stream(trainer))
    assert all(torch.equal(at_first[name], base[name]) for name in base) and len(at_first) == len(
        base
    )
    assert trainer.trained and all(".lora_" in name for name in trainer.trained)
    after = trained(world, 2, lora_rank=4)
    own = dict(after.policy.named_parameters())
    for name, full in weights.stream(after):
        layer = "layers" in name and "norm" not in name
        assert torch.equal(own[f"lm.{name}"].full_tensor(), base[name])  # W stays as it was
        assert torch.equal(full, base[name]) != layer, name


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", ""), ("float64", ""), ("float64", "qwen2")]
)
def test_what_travels_is_what_is_trained(world, tiny, tmp_path, dtype, kind):
    """The merged weights, in a model without adapters, give the policy's log-probs. Qwen2 has
    biases, which no adapter touches.
    """
    from model import Policy, pack_rows

    base = tiny(kind) if kind else CALCULATOR
    how = {"lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2, "dtype": dtype}
    trainer = trained(world, 3, model=base, **how)
    weights.export(trainer, tmp_path / "model", world, getattr(torch, dtype))
    how = {"dtype": getattr(torch, dtype), "attn_implementation": "packed"}
    merged = Policy(AutoModelForCausalLM.from_pretrained(tmp_path / "model", **how), 1.0, 0)
    plain = Policy(AutoModelForCausalLM.from_pretrained(base, **how), 1.0, 0)
    tokens = torch.randint(3, 16, (3, 20), generator=torch.Generator().manual_seed(0))
    pack = pack_rows(tokens, torch.tensor([20, 11, 7]), tokens > 0)
    with torch.no_grad():
        ours, theirs, before = (p(pack)[0] for p in (trainer.policy, merged, plain))
    assert (ours - theirs).abs().max() < (1e-4 if dtype == "float32" else 1e-10)
    assert (ours - before).abs().max() > 1e-3


def test_peft_loads_the_adapters(world, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = trained(world, 3, lora_rank=4, lora_alpha=8.0, lr=1e-2)
    weights.export(trainer, tmp_path / "model", world)
    base = AutoModelForCausalLM.from_pretrained(CALCULATOR)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "model/adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.randint(3, 16, (2, 20), generator=torch.Generator().manual_seed(0))
    assert (theirs(ids).logits - merged(ids).logits).abs().max() < 1e-4
    about = json.loads((tmp_path / "model/adapter/adapter_config.json").read_text())
    assert about["r"] == 4 and about["lora_alpha"] == 8 and "q_proj" in about["target_modules"]


def test_a_checkpoint_holds_the_adapters_alone(world, tmp_path):
    trainer = trained(world, 2, lora_rank=4)
    trainer.save(tmp_path)
    trainer.saved()
    held = {}
    for part in (tmp_path / "step-2").glob("*.safetensors"):
        held |= load_file(part)
    assert all(".lora_" in name for name in held if name.startswith("policy."))
    again = trained(world, 0, lora_rank=4)
    assert again.problem(tmp_path / "step-2") == ""
    again.load(tmp_path / "step-2")
    for (name, a), (_, b) in zip(weights.stream(trainer), weights.stream(again)):
        assert torch.equal(a, b), name
    assert "of another model" in trained(world, 0).problem(tmp_path / "step-2")


def test_grpo_with_adapters_on_real_ranks(tmp_path):
    """Two FSDP2 trainers and an engine: what it samples with is proven after each sync."""
    folder = tmp_path / "r"
    readme = (ROOT / "README.md").read_text()
    [recipe] = [x.split() for x in readme.splitlines() if "grpo.py --lora_rank=" in x]
    args = [
        *recipe[recipe.index("grpo.py") + 1 :],
        "--steps=3",
        "--eval_every=0",
        "--check_weights=true",
        "--prompts_per_step=6",
        "--sync_bucket_mb=1",  # several, from either end of the buffer
    ]
    good(run(3, "grpo.py", *args, f"--run_dir={folder}"), folder)
    rows = [x for x in lines(folder) if "loss" in x]
    assert len(rows) == 3 and max(x["mismatch_max"] for x in rows) < 1e-3
    assert all(x["grad_norm"] > 0 for x in rows)
    adapter = load_file(folder / "model/adapter/adapter_model.safetensors")
    assert all(x.shape[0] == 16 for name, x in adapter.items() if "lora_A" in name)
    assert any(x.abs().max() > 0 for name, x in adapter.items() if "lora_B" in name)
