"""What the tests share: the command line under torchrun, tiny models of several architectures."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SFT = ["--rows_per_step=16", "--eval_size=16", "--eval_every=1", "--steps=4", "--save_every=1"]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",  # seconds that torchrun waits before it kills
}


def pytest_addoption(parser):
    meaning = "also the long matrices: topologies, learning"
    parser.addoption("--long", action="store_true", help=meaning)
    parser.addoption("--matrix", default="", help="file for the matrix of faults")


@pytest.fixture
def matrix(request):
    """Add a row: fault, who, phase, seconds until every rank is gone, exit code, what is said."""

    def add(fault, who, phase, seconds, code, line):
        line = re.sub(r"\(log: .*/(log/rank\d+.log)\)", r"(log: \1)", line)
        time = "" if seconds is None else f"{seconds:.1f} s"
        row = f"| {fault} | {who} | {phase} | {time} | {code} | {line} |"
        request.node.user_properties.append(("matrix", row))  # this comes back from a worker, too

    return add


def pytest_terminal_summary(terminalreporter, config):
    calls = [r for found in terminalreporter.stats.values() for r in found if hasattr(r, "when")]
    told = [pair for r in calls if r.when == "call" for pair in r.user_properties]
    rows = [row for name, row in told if name == "matrix"]
    if rows:
        head = ["| fault | who | phase | all gone after | exit code | our last line |"]
        head.append("|---|---|---|---|---|---|")
        table = "\n".join([*head, *rows])
        terminalreporter.write_line(table)
        if config.getoption("--matrix"):
            pathlib.Path(config.getoption("--matrix")).write_text(table + "\n")


def judge(task, row, may_go_on):
    """As a worker does, here: the environment's reply, None once the row has its rewards."""
    import workers

    try:
        workers.judge(task, row, may_go_on, 60).send(None)
    except StopIteration as end:
        [(reply, row.rewards, row.paid, row.episode.state, _)] = end.value
        return reply


def pytest_configure(config):
    meaning = "long: minutes, not seconds; runs with --long (make test-all)"
    config.addinivalue_line("markers", meaning)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: make test-all"))


def torchrun(ranks: int, script: str, *args: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={ranks}", str(ROOT / script), *args]


def run(ranks: int, script: str, *args: str, timeout: int = 240) -> subprocess.CompletedProcess:
    """A script under torchrun, to its end. Output as text."""
    command = torchrun(ranks, script, *args)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def lines(folder, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(folder) / name).read_text().splitlines()]


def trace(folder) -> list[dict]:
    """The events of trace.json, which has no closing bracket."""
    text = (pathlib.Path(folder) / "trace.json").read_text()
    return json.loads(text.rstrip().rstrip(",") + "]")


def logs(folder) -> str:
    files = sorted(pathlib.Path(folder, "log").glob("*.log"))
    return "\n".join(file.read_text()[-3000:] for file in files)


SHAPE = dict(
    vocab_size=28,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ARCHITECTURES = {
    "qwen3": ("Qwen3ForCausalLM", dict(head_dim=32, tie_word_embeddings=True)),
    "llama": ("LlamaForCausalLM", dict(head_dim=32, tie_word_embeddings=False)),
    "qwen2": ("Qwen2ForCausalLM", dict(tie_word_embeddings=True)),  # biases on q, k and v
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """name -> folder of a random model of two layers, with the calculator's tokenizer."""
    import torch
    import transformers

    def make(name: str, eos=(2,)) -> str:
        folder = tmp_path_factory.getbasetemp() / f"{name}-{'-'.join(map(str, eos))}"
        if folder.exists():
            return str(folder)
        class_name, extra = ARCHITECTURES[name]
        model_class = getattr(transformers, class_name)
        torch.manual_seed(1)
        model = model_class(model_class.config_class(**SHAPE, **extra))
        # Biases start at zero and norms at one, where a lost parameter would not show.
        for n, p in model.named_parameters():
            if n.endswith("bias") or "norm" in n:
                p.data.add_(0.3 * torch.randn_like(p))
        model.generation_config.eos_token_id = list(eos)
        model.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "assets/calculator")
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def world(monkeypatch):
    """A world of one trainer, connected."""
    from heartbeat import HEART
    from runtime import World

    env = dict(TORCHELASTIC_RUN_ID="x", RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    env |= dict(TORCHELASTIC_RESTART_COUNT=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    world = World(None)
    world.connect()
    monkeypatch.setattr(HEART, "store", world.store)
    monkeypatch.setattr(HEART, "phase", "start")
    yield world
    world.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def sft(tmp_path_factory):
    """A run of two trainers that nobody disturbs."""
    from test_runs import good

    folder = tmp_path_factory.mktemp("sft") / "r"
    return good(run(2, "sft.py", *SFT, f"--run_dir={folder}"), folder)
