"""What only a GPU has: fast attention over packed rows, bf16 products with fp32 results, a host
that runs ahead. Skipped without one.
"""

import signal
import subprocess
import time

import pytest
import torch

import grpo
import losses
from model import Policy, head_logprobs, pack_rows, packed_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("lengths", [[70, 3, 129, 1, 40], [200, 56], [128, 127, 120], [250]])
def test_attention_keeps_rows_apart(lengths):
    """bf16 attention (flash where rows are uneven, else cuDNN) against the float32 path on a CPU:
    values and gradients, grouped key/value heads.
    """
    torch.manual_seed(0)
    length, longest = torch.tensor(lengths), max(lengths)
    every = torch.arange(longest) < length[:, None]
    row, place = every.nonzero().T
    inputs = [torch.randn(len(row), heads, 64).bfloat16() for heads in (6, 2, 2)]
    upstream, results = torch.randn(len(row), 6, 64), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        pack = pack_rows(every.long(), length, every, device)
        if device == "cuda":
            assert pack.even == (lengths[0] in (128, 250))
        at = pack.starts.cpu()[row] + place  # each token's place in the pack
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        q, k, v = (
            x.new_zeros(pack.tokens.numel(), *x.shape[1:])
            .index_copy(0, at.to(device), x)
            .view(*pack.tokens.shape, *x.shape[1:])
            .transpose(1, 2)
            for x in leaves
        )
        out = packed_attention(None, q, k, v, None, scaling=64**-0.5, pack=pack)[0]
        out = out.flatten(0, 1)[at]
        (out.float() * upstream.to(device)).sum().backward()
        results.append([x.detach().float().cpu() for x in (out, *(x.grad for x in leaves))])
    for cpu, gpu in zip(*results):
        assert (gpu - cpu).norm() / cpu.norm() < 2e-2


def test_the_host_does_not_wait_for_the_gpu(tiny):
    """Forward, loss with its figures, backward: nothing asks the GPU for a number."""
    from pitfall_rows import batch, settings
    from transformers import AutoModelForCausalLM

    how = {"dtype": torch.bfloat16, "attn_implementation": "packed"}
    lm = AutoModelForCausalLM.from_pretrained(tiny("qwen3"), **how)
    policy, cfg = Policy(lm.cuda(), 1.0, 7), settings()
    rows, loss = batch(cfg), losses.policy_loss(losses.LOSSES[grpo.Config.loss])
    table = type(rows)(**{k: v.cuda() for k, v in rows.columns().items()})

    def micro_batch():
        pack = pack_rows(rows.tokens, rows.length, rows.mask, "cuda")
        loss(policy(pack)[0], table, cfg)[0].backward()

    micro_batch()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            table.mask.nonzero()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("hidden", [1024, 4096])
def test_the_heads_memory(hidden):
    """16,384 tokens x 151,936 words in fp32: less than 1 GB beyond inputs and their gradients."""
    sizes = (16384, hidden), (151936, hidden)
    h, w = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in sizes)
    targets = torch.randint(151936, (16384,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head_logprobs(h, w, targets, 1.0, grpo.Config.head_chunk)[0].sum().backward()
    beyond = torch.cuda.max_memory_allocated() - before - h.nbytes - w.nbytes
    assert beyond < 1e9


def test_the_heads_gradient_is_the_dense_heads():
    """In fp32, at the whole vocabulary."""
    g = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(2000, 256, device="cuda", generator=g)
    w = torch.randn(151936, 256, device="cuda", generator=g) * 0.1
    targets = torch.randint(151936, (2000,), device="cuda", generator=g)
    upstream, results = torch.randn(2000, device="cuda", generator=g), []
    for chunk in (0, grpo.Config.head_chunk):
        a, b = (x.clone().requires_grad_() for x in (h, w))
        logprobs, entropy = head_logprobs(a, b, targets, 0.7, chunk)
        (logprobs * upstream).sum().backward()
        results.append((logprobs.detach(), entropy, a.grad, b.grad))
    for dense, chunked in zip(*results):
        assert (dense - chunked).norm() / dense.norm() < 1e-5


def test_head_in_bf16_has_fp32_logits():
    """Log-probs from bf16 inputs are as good as from the same numbers in fp32: nothing is rounded
    in between.
    """
    torch.manual_seed(0)
    h, w = torch.randn(300, 64).bfloat16(), torch.randn(5000, 64).bfloat16()
    targets = torch.randint(5000, (300,))
    exact, _ = head_logprobs(h.double(), w.double(), targets, 1.0, 0)
    h, w = h.cuda().requires_grad_(), w.cuda().requires_grad_()
    ours, _ = head_logprobs(h, w, targets.cuda(), 1.0, 128)
    assert (ours.cpu() - exact).abs().max() < 1e-4
    ours.sum().backward()
    hd, wd = (x.detach().cpu().double().requires_grad_() for x in (h, w))
    head_logprobs(hd, wd, targets, 1.0, 0)[0].sum().backward()
    for got, want in ((h.grad, hd.grad), (w.grad, wd.grad)):
        assert (got.cpu().double() - want).norm() / want.norm() < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_generator_one_trainer_on_two_gpus(tiny, tmp_path):
    from conftest import lines, logs, run

    args = [
        "--steps=2",
        "--check_weights=true",
        f"--model={tiny('llama')}",
        f"--run_dir={tmp_path}/r",
        "--enforce_eager=true",
    ]
    done = run(2, "grpo.py", *args, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:] + logs(tmp_path / "r")
    metrics = [x for x in lines(tmp_path / "r") if "reward" in x]
    assert all(x["mismatch_kl"] < 0.01 for x in metrics)


HUNGRY = """
import losses, torch
def hungry(logprobs, rows, cfg):
    free, total = torch.cuda.mem_get_info()
    torch.empty(total // 2, dtype=torch.uint8, device="cuda").fill_(1)
    return losses.grpo(logprobs, rows, cfg)
"""


def test_one_gpu_sleeps_and_wakes(tiny, tmp_path):
    """The engine has 0.7 of the card and the loss needs half of it: one of them has to sleep. After
    it woke up its weights are the trainer's, and so are its log-probs.
    """
    from conftest import lines, logs, run

    (tmp_path / "hungry.py").write_text(HUNGRY)
    args = ["--steps=3", "--check_weights=true", "--enforce_eager=true", "--eval_every=1"]
    args += [f"--loss={tmp_path}/hungry.py:hungry", "--gpu_memory_utilization=0.7", "--lr=1e-3"]
    args += [f"--model={tiny('llama')}", f"--run_dir={tmp_path}/r", "--eval_size=16"]
    done = run(1, "grpo.py", *args, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:] + logs(tmp_path / "r")
    metrics = [x for x in lines(tmp_path / "r") if "reward" in x]
    assert len(metrics) == 3 and all(x["mismatch_kl"] < 0.01 for x in metrics)
    assert [x["step"] for x in lines(tmp_path / "r") if "eval_reward" in x] == [0, 1, 2, 3]


def used() -> int:
    """MiB of the first GPU that anybody holds."""
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)


TOO_MUCH = """
import torch
def mine(logprobs, rows, cfg):
    torch.zeros(2**44, device="cuda")
"""


@pytest.mark.parametrize("fault", ["killed", "goes on", "trainer's memory", "engine's memory"])
def test_a_fault_leaves_no_gpu_memory(tmp_path, fault):
    from faults import SMALL, Watched

    (tmp_path / "mine.py").write_text(TOO_MUCH)
    torch.zeros(1, device="cuda")  # this process's own context is no leak
    before, held = used(), None
    args = [*SMALL, "--enforce_eager=true", "--gpu_memory_utilization=0.3"]
    if fault == "trainer's memory":
        args.append(f"--loss={tmp_path}/mine.py:mine")
    if fault == "engine's memory":
        held = torch.empty(int(0.8 * torch.cuda.mem_get_info()[0]), dtype=torch.int8, device="cuda")
    launcher = ["--max-restarts=1"] if fault == "goes on" else []
    watched = Watched(tmp_path / "r", "grpo.py", 1, *args, launcher=launcher)
    try:
        if held is None and "memory" not in fault:
            phase = {"train"} if fault == "killed" else {"collect"}
            print(fault, watched.hit(0, phase, signal.SIGKILL, steps=2), f"{watched.gone():.1f} s")
        code, said = watched.end(), watched.said()
    finally:
        watched.close()
    del held
    torch.cuda.empty_cache()
    assert (code == 0) == (fault == "goes on"), said
    if "memory" in fault:
        where, what = ("train", "OutOfMemoryError") if "trainer" in fault else ("build engine", "")
        assert f"rank 0 (trainer) stopped in {where}: {what}" in said
        print([x for x in said.splitlines() if x.startswith("nanoforge: ")])
    end = time.monotonic() + 10
    while used() > before + 50 and time.monotonic() < end:  # the driver takes a moment
        time.sleep(0.1)
    assert used() <= before + 50
    watched.leaves_nothing()
