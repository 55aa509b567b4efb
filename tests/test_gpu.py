"""What only a GPU has: flash attention over packed rows, bf16 products with fp32 results. Skipped
without one.
"""

import pytest
import torch
import torch.nn.functional as F

from model import Pack, head_logprobs, packed_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
LENGTHS = [70, 3, 129, 1, 40]


def pack(device):
    length = torch.tensor(LENGTHS, device=device)
    real = torch.arange(max(LENGTHS), device=device) < length[:, None]
    return Pack(
        F.pad(length.cumsum(0), (1, 0)).int(), max(LENGTHS), real.flatten().nonzero().flatten()
    )


def test_flash_attention_keeps_rows_apart():
    """bf16 flash attention against the float32 path on a CPU, values and gradients, grouped
    key/value heads.
    """
    torch.manual_seed(0)
    n = sum(LENGTHS)
    shapes = [(1, heads, n, 64) for heads in (6, 2, 2)]
    inputs = [torch.randn(s).bfloat16() for s in shapes]
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
        out, _ = packed_attention(None, q, k, v, None, scaling=64**-0.5, pack=pack(device))
        out.float().square().sum().backward()
        results.append([x.detach().float().cpu() for x in (out, q.grad, k.grad, v.grad)])
    for cpu, gpu in zip(*results):
        assert (gpu - cpu).norm() / cpu.norm() < 2e-2


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
