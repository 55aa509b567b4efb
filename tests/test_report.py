"""report.html, live sinks, profiles, the table of metrics."""

import gzip
import html.parser
import importlib.util
import json
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist
from browser import PROGRAM, Browser
from conftest import ROOT, run
from test_record import start, told

import grpo
import losses
import report
from rollouts import Rollouts, Row
from tasks import Episode
from trainer import Trainer

EVIL = "</script><script>window.pwned=1</script><!-- <b id=injected>&amp; \u2028\u202e ]]>"
SPANS = [("sync", 0.0, 0.1), ("collect", 0.1, 0.5), ("generate", 0.1, 0.4), ("gather", 0.5, 0.6)]
SPANS += [("arrive sync", 0.6, 1.0)]


def sample(reward=0.0, surprise=0.0, **about) -> dict:
    base = {"step": 0, "slot": 1, "reply": 2, "finished": True, "version": 0, "advantage": 0.5}
    told = {"problem": {"prompt": "1+1="}, "turns": ["[1+1]", "=2", "#2"], "rewards": {"r": reward}}
    return {**base, **told, "surprise": surprise, **about}


def make_run(folder, steps=8, **settings):
    """A run folder as record.py leaves it, without a run."""
    folder.mkdir(parents=True)
    settings = {"run_dir": str(folder), "seed": 0, "max_policy_age": 0, "lr": 1.0, **settings}
    config = "".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items())
    (folder / "config.yaml").write_text("# command: grpo.py\n# ranks: 2\n" + config)
    with open(folder / "metrics.jsonl", "w") as f:
        for step in range(steps):
            line = {"step": step, "reward": step / steps + settings["seed"], "loss": -0.1}
            line |= {"mismatch_kl": 10.0 ** -(step % 8), "mine": 2.0, "tokens": 100, "step_s": 0.5}
            line |= {"idle_trainer_s": 0.1, "reward/a": 0.5, "generate_s": 0.2}
            f.write(json.dumps(line) + "\n")
            if step % 4 == 0:
                line = {"step": step, "eval_reward": 0.5, "eval_stderr": 0.1, "eval_rows": 9}
                f.write(json.dumps(line) + "\n")
            shifted = [(name, a + step, b + step) for name, a, b in SPANS]
            report.append_spans(folder, "generator", {"rank": 0, "spans": shifted}, step)
            train = [("sync", step, step + 0.1), ("arrive gather", step + 0.1, step + 0.5)]
            train += [("gather", step + 0.5, step + 0.6), ("train", step + 0.6, step + 1)]
            report.append_spans(folder, "trainer", {"rank": 1, "spans": train}, step)
    with open(folder / "samples.jsonl", "w") as f:
        for step in range(steps):
            f.writelines(json.dumps(sample(r, s, step=step)) + "\n" for r, s in [(1, 0), (0, 2)])
    return folder


class Scripts(html.parser.HTMLParser):
    """The page's tags, and the text of its scripts, as a browser cuts them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.comments = [], {}, []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_comment(self, text):
        self.comments.append(text)

    def handle_data(self, text):
        index = len(self.tags) - 1
        self.texts[index] = self.texts.get(index, "") + text

    def data(self) -> dict:
        at = next(i for i, (_, attrs) in enumerate(self.tags) if attrs.get("id") == "data")
        return json.loads(self.texts[at])


# ---------------------------------------------------------------- names


def named() -> set[str]:
    rows, _ = report.metrics()
    return {name.strip("`") for names, *_ in rows for name in names.split(", ")}


def test_the_readme_has_the_table_of_metrics():
    text = (ROOT / "README.md").read_text()
    table, about = (ROOT / "assets/report/metrics.md").read_text().split("\n\n")
    assert f"\n{table}\n" in text and about in text
    rows, _ = report.metrics()
    assert len(rows) > 20 and all(len(row) == 4 and all(row) for row in rows), rows
    names = [name for names, *_ in rows for name in names.split(", ")]
    assert len(names) == len(set(names))  # once


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_figure_of_a_loss_is_documented(loss):
    cfg = grpo.Config(loss=loss, kl_coef=0.1, old_policy="trainer")
    grpo.find_loss(cfg)
    rows = Rollouts.blank(1, 3)
    rows.mask, rows.weight, rows.share = ~rows.mask, rows.weight + 1, rows.share + 1
    rows.ref_logprobs = rows.logprobs
    _, sums = losses.policy_loss(losses.LOSSES[loss])(torch.zeros(1, 3), rows, cfg)
    values = {k: v.tolist() if v.dim() else float(v) for k, v in sums.items()}
    assert report.derived(values).keys() <= named()


def test_help_metrics_needs_no_torchrun(capsys):
    from runtime import settings

    with pytest.raises(SystemExit) as end:
        settings(grpo.Config, ["--help-metrics"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(name.split("/")[0] in said for name in named())
    assert "x_min" in said


def test_how_a_name_is_reduced(monkeypatch):
    """Two ranks, of which each adds up what it was given: mean per token, extremes."""
    parts = [[1.0, 2.0], [6.0]]  # x of each rank's tokens
    sums = [
        {
            "x": torch.tensor(sum(x)).double(),
            "x_min": torch.tensor(min(x)).double(),
            "x_max": torch.tensor(max(x)).double(),
            "tokens": torch.tensor(len(x)).double(),
        }
        for x in parts
    ]
    sent, world = [], types.SimpleNamespace(device="cpu", trainers=None)

    def other_rank(tensor, op=dist.ReduceOp.SUM, group=None):
        sent.append(tensor.clone())

    def this_rank(tensor, op=dist.ReduceOp.SUM, group=None):
        theirs = sent.pop(0)
        join = torch.maximum if op == dist.ReduceOp.MAX else torch.add
        tensor.copy_(join(tensor, theirs))

    for who, given in zip((other_rank, this_rank), sums):
        monkeypatch.setattr(dist, "all_reduce", who)
        out = Trainer.reduce(types.SimpleNamespace(world=world), given)
    assert out == {"x": 3, "x_min": 1, "x_max": 6, "tokens": 3}


def test_extremes_over_the_microbatches_of_a_step(world, tmp_path):
    import sft

    cfg = sft.Config(model=str(ROOT / "assets/calculator"))
    trainer = Trainer(cfg, world)
    rows = Rollouts.blank(3, 4)
    rows.tokens, rows.length, rows.sampled = rows.tokens + 5, rows.length + 4, rows.sampled + 3
    rows.mask[:, 1:], rows.weight, rows.share = True, rows.weight + 1, rows.share + 1
    rows.minibatch, rows.all, rows.plan = torch.zeros(3, dtype=torch.long), rows, [[[0], [1], [2]]]
    values = iter([2.0, -7.0, 5.0])

    def loss(logprobs, rows, cfg):
        value = torch.tensor(next(values))
        return sft.sft_loss(logprobs, rows, cfg)[0], {"mine_min": value, "mine_max": value}

    out = trainer.step(rows, loss)
    assert (out["mine_min"], out["mine_max"]) == (-7, 5)


# ---------------------------------------------------------------- the page's data


def test_no_text_can_leave_its_place(tmp_path):
    folder = make_run(tmp_path / "a<b>&", task=EVIL)
    evil = sample(1, turns=[EVIL, EVIL], problem={"prompt": EVIL, EVIL: float("nan")}, step=7)
    evil["rewards"] = {EVIL: 1.0}
    with open(folder / "samples.jsonl", "a") as f:
        f.write(json.dumps(evil) + "\n")
    report.write_page([folder], folder / "report.html")
    page = Scripts(folder / "report.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 3 and "b" not in tags and not page.comments
    assert all(attrs.get("nonce") for tag, attrs in page.tags if tag == "script")
    assert not any({"src", "href"} & attrs.keys() for tag, attrs in page.tags if tag != "a")
    data = page.data()
    assert data["runs"][0]["settings"]["task"] == EVIL
    assert any(s["turns"] == [EVIL, EVIL] for s in data["runs"][0]["samples"]["7"])
    text = (folder / "report.html").read_text()
    assert "\u2028" not in text and "\u202e" not in text and "<b id" not in text
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert "default-src 'none'" in policy and "script-src 'nonce-" in policy


def test_a_new_nonce_each_time(tmp_path):
    folder, seen = make_run(tmp_path / "a"), set()
    for _ in range(2):
        report.write_page([folder], folder / "report.html")
        page = Scripts(folder / "report.html")
        seen |= {attrs["nonce"] for tag, attrs in page.tags if tag == "script"}
    assert len(seen) == 2  # one a page: nobody can have known it


def test_points_of_a_curve(monkeypatch):
    monkeypatch.setattr(report, "POINTS", 2)
    lines = [{"step": s, "x": float(s), "x_max": float(s), "x_min": float(s)} for s in range(6)]
    lines[5]["x"] = float("nan")
    out = report.columns(lines)
    assert out["x"] == [[0, 3], [1.0, None]]  # three steps a point; a NaN is not hidden
    assert out["x_max"] == [[0, 3], [2.0, 5.0]] and out["x_min"] == [[0, 3], [0.0, 3.0]]
    json.dumps(out, allow_nan=False)


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path):
    about = [{"seed": 0}, {"seed": 1}, {"seed": 0, "max_policy_age": 1}, {"seed": 2, "lr": 2.0}]
    folders = [make_run(tmp_path / f"r{i}", **a) for i, a in enumerate(about)]
    groups, differ = report.grouped([report.read_run(f) for f in folders])
    assert differ == ["lr", "max_policy_age"]
    assert [g["runs"] for g in groups] == [[0, 1], [2], [3]]
    assert [g["label"] for g in groups] == [
        f"lr={lr}, max_policy_age={age}" for lr, age in ((1.0, 0), (1.0, 1), (2.0, 0))
    ]
    alone, differ = report.grouped([report.read_run(folders[0])])
    assert differ == [] and alone == [{"runs": [0], "label": str(folders[0])}]


def test_telling_samples():
    rows = [sample(0.5, 1.0), sample(0.0, 3.0), sample(1.0, 0.1), sample(1.0, 0.2), sample(0.2, 2)]
    out = report.telling(rows)
    assert [s["chosen"] for s in out] == [["best"], ["worst", "surprising"], [], [], []]
    assert out[0] is rows[2] and out[1] is rows[1]  # of equals the first
    assert report.telling([]) == []


def test_samples_of_a_long_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SAMPLED", 3)
    path = tmp_path / "samples.jsonl"
    rows = [sample(r, step=s) for s in range(9) for r in (0.1, 0.9, 0.5, 0.2)]
    rows[0]["turns"] = ["x" * (report.LONGEST + 1)]
    del rows[0]["surprise"]  # of an older run
    path.write_text("".join(json.dumps(s) + "\n" for s in rows) + '{"step": 8, "torn')
    out = report.samples(path, last=8)
    assert list(out) == [0, 4, 8] and all(len(some) == 3 for some in out.values())
    assert [s["rewards"]["r"] for s in out[4][:2]] == [0.9, 0.1]
    long = next(s for s in out[0] if s["turns"][0].startswith("x"))["turns"][0]
    assert len(long) < report.LONGEST + 99 and long.endswith("see samples.jsonl)")


def test_a_row_tells_how_surprising_it_was():
    from report import sample as sample_of

    row = Row(0, 0, 0, 0, Episode({"prompt": "1+1=", "tokens": [3]}))
    row.append_given([3])
    row.append_sampled([4, 5], [-1.0, -2.0], 0)
    assert sample_of(0, row)["surprise"] == 1.5  # nats per sampled token


def test_timeline_of_a_few_steps(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a", steps=40)
    out = report.timeline(folder / "trace.json")
    assert {row[4] for row in out["early"]} == set(range(2, 7))
    assert {row[4] for row in out["latest"]} == set(range(35, 40))
    assert {row[0] for row in out["early"]} == {"generator 0", "trainer 1"}
    first = out["early"][0]
    assert first == ["generator 0", "sync", 0.0, 100.0, 2]
    monkeypatch.setattr(report, "TRACE", 12_000)  # bytes at both ends, with torn lines
    assert report.timeline(folder / "trace.json") == out
    (tmp_path / "empty.json").write_text("[\n")
    assert report.timeline(tmp_path / "empty.json") == {"early": [], "latest": []}


def test_of_many_ranks_some_are_shown(tmp_path):
    for rank in range(20):
        role = "generator" if rank < 10 else "trainer"
        report.append_spans(tmp_path, role, {"rank": rank, "spans": SPANS}, 0)
    shown = {row[0] for row in report.timeline(tmp_path / "trace.json")["early"]}
    assert shown == {f"generator {r}" for r in range(6)} | {f"trainer {r}" for r in range(10, 16)}


def test_an_engines_steps_are_one_span():
    spans = []
    for name, begin, end in [
        ("generate", 0, 1), ("admit", 1, 2), ("generate", 2, 3), ("idle", 3, 4), ("idle", 4, 5),
        ("generate", 5, 6), ("collect", 6, 6.5),
    ]:  # fmt: skip
        report.note_engine(spans, name, begin, end)
    assert spans == [("generate", 0, 3), ("idle", 3, 5), ("generate", 5, 6)]
    spans.append(("collect", 0, 6.5))  # another phase has ended
    report.note_engine(spans, "generate", 7, 8)
    assert spans[-1] == ("generate", 7, 8)


def test_the_command(tmp_path, monkeypatch):
    a, b = (make_run(tmp_path / name, max_policy_age=age) for age, name in enumerate("ab"))
    command = [sys.executable, str(ROOT / "report.py")]
    done = subprocess.run([*command, str(a), str(b)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{a}/report.html\n", done.stderr
    labels = [g["label"] for g in Scripts(a / "report.html").data()["groups"]]
    assert labels == ["max_policy_age=0", "max_policy_age=1"]
    out = tmp_path / "out.html"
    subprocess.run([*command, str(b), f"--out={out}"], check=True)
    assert out.exists() and not (b / "report.html").exists()
    done = subprocess.run([*command, str(tmp_path / "c")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("report.py: ")
    assert len(done.stderr.splitlines()) == 1 and "c/metrics.jsonl" in done.stderr


# ---------------------------------------------------------------- live


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"log_to": "mlflow"}, "log_to=mlflow: known are tensorboard, wandb, trackio"),
        ({"log_to": "trackio,tensorbord"}, "log_to=trackio,tensorbord: known"),
        ({"profile_steps": "0"}, "profile_steps=0: give 3 or 3-5"),
        ({"profile_steps": "5-3"}, "profile_steps=5-3"),
        ({"profile_steps": "3,4"}, "profile_steps=3,4"),
        ({"profile_steps": "46"}, "profile_steps=46"),
    ],
)
def test_wrong_settings(settings, sentence, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert report.problem(grpo.Config(**settings)).startswith(sentence)


def test_right_settings(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name) or True)
    assert report.problem(grpo.Config()) == "" and not asked
    assert report.problem(grpo.Config(log_to="wandb,trackio", profile_steps="3-45")) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = report.problem(grpo.Config(log_to="wandb"))
    assert missing == "log_to=wandb: its package is not installed; type: pip install wandb"


def test_said_before_anything_is_loaded():
    done = run(1, "grpo.py", "--log_to=mlflow")
    said = [x for x in done.stderr.splitlines() if x.startswith("nanoforge:")]
    assert done.returncode != 0 and said == [
        "nanoforge: log_to=mlflow: known are tensorboard, wandb, trackio"
    ]


def test_the_page_is_drawn_seldom_and_costs_no_run(world, tmp_path, monkeypatch, capfd):
    run, drawn, clock = start(world, tmp_path / "r"), [], [1000.0]
    run.live.draw_at = 1020.0
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])

    def draw(folders, out):
        drawn.append(out)
        clock[0] += 3.0  # seconds
        if len(drawn) > 1:
            raise OSError("disk full")

    monkeypatch.setattr(report, "write_page", draw)
    log = lambda step: run.log(step, {"loss": 0.5, "tokens": 50, "reward": 0.5}, told())  # noqa: E731
    log(0)
    assert not drawn
    clock[0] = 1021.0
    log(1)
    assert drawn == [run.folder / "report.html"]
    clock[0] = 1200.0
    log(2)
    assert len(drawn) == 1  # 3 s of 300
    clock[0] = 1322.0
    log(3)
    assert len(drawn) == 2
    assert "report.html failed (OSError: disk full); the run goes on" in capfd.readouterr().err
    run.finish()
    assert len(drawn) == 3 and (run.folder / "curves.png").exists()


def test_a_sink_that_fails_is_left_out(world, tmp_path, monkeypatch, capfd):
    def open_sink(name, run, first):
        assert first == 4

        def log(line):
            got.append((name, line["step"]))
            if name == "wandb":
                raise RuntimeError("no network")

        return log, lambda: got.append((name, "closed"))

    got = []
    monkeypatch.setattr(report, "open_sink", open_sink)
    run = start(world, tmp_path / "r", log_to="wandb,trackio")
    for step in (4, 5):
        run.log(step, {"loss": 0.5, "tokens": 50}, told())
    part = {"version": 5, "rewards": [1.0], "of": 1}
    run.log(6, {}, told(evals=[part]))
    run.finish()
    assert [step for name, step in got if name == "trackio"] == [4, 5, 5, "closed"]
    assert [step for name, step in got if name == "wandb"] == [4]
    assert capfd.readouterr().err.count("wandb failed (RuntimeError: no network)") == 1


def needs(package):
    have = importlib.util.find_spec(package)
    return pytest.mark.skipif(not have, reason=f"needs the package {package}")


@needs("tensorboard")
def test_tensorboard(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(world, tmp_path / "r", log_to="tensorboard")
    for step in (0, 1):
        run.log(step, {"loss": 0.5 + step, "tokens": 50}, told())
    run.live.close()
    board = EventAccumulator(str(run.folder / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(0, 0.5), (1, 1.5)]
    assert "step" not in board.Tags()["scalars"]


@needs("wandb")
def test_wandb_offline(world, tmp_path, monkeypatch):
    import wandb

    axis, run_class = [], wandb.sdk.wandb_run.Run
    note = lambda self, *names, **how: axis.append((names, how))  # noqa: E731
    monkeypatch.setattr(run_class, "define_metric", note)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = start(world, tmp_path / "r", log_to="wandb")
    run.log(3, {"loss": 0.125, "tokens": 50}, told())
    run.log(4, {}, told(evals=[{"version": 2, "rewards": [1.0], "of": 1}]))
    run.live.close()
    assert run.live.wanted == ["wandb"]
    assert axis == [(("*",), {"step_metric": "step"})]  # else version 2's line would be refused
    files = list((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1 and not list(files[0].parent.glob("files/*"))  # metrics and settings
    end = time.monotonic() + 20  # a process of its own writes them
    while b"eval_reward" not in files[0].read_bytes():
        assert time.monotonic() < end
        time.sleep(0.1)


@needs("trackio")
def test_trackio(world, tmp_path, monkeypatch):
    got = []
    fake = types.SimpleNamespace(
        init=lambda **how: got.append(how["name"]),
        log=lambda line, step: got.append((step, line["loss"])),
        finish=lambda: got.append("end"),
    )
    import inspect

    import trackio

    assert {"project", "name", "config"} <= inspect.signature(trackio.init).parameters.keys()
    assert {"metrics", "step"} == inspect.signature(trackio.log).parameters.keys()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    run = start(world, tmp_path / "r", log_to="trackio")
    run.log(3, {"loss": 0.5, "tokens": 50}, told())
    run.live.close()
    assert got == ["r", (3, 0.5), "end"]


def test_a_profile_of_some_steps(world, tmp_path):
    run = start(world, tmp_path / "r", profile_steps="2-3")
    for step in range(6):
        assert (run.live.profiler is not None) == (step in (2, 3))
        torch.ones(2) * step
        run.log(step, {"loss": 0.5, "tokens": 50}, told())
    files = list((run.folder / "profile").iterdir())
    assert [f.name for f in files] == ["steps-2-3-rank0.json.gz"]
    events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"]
    assert sum(e["name"] == "aten::mul" for e in events) == 2
    run = start(world, tmp_path / "q")
    run.log(0, {"loss": 0.5, "tokens": 50}, told())
    assert run.live.profiler is None and not (run.folder / "profile").exists()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not PROGRAM:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two seeds at age 0 and a run at age 1, one of which holds a hostile sample."""
    base = tmp_path_factory.mktemp("compared")
    about = [{"seed": 0}, {"seed": 1}, {"max_policy_age": 1}]
    folders = [make_run(base / f"r{i}", **a) for i, a in enumerate(about)]
    with open(folders[0] / "samples.jsonl", "a") as f:
        f.write(json.dumps(sample(2, 9, step=7, turns=[EVIL, EVIL, "x" * 300])) + "\n")
    report.write_page(folders, base / "report.html")
    return base / "report.html"


VIEWS = [(1280, 900, False), (1280, 900, True), (390, 844, False), (390, 844, True)]


@pytest.mark.parametrize(("width", "height", "dark"), VIEWS)
def test_the_page_in_a_browser(chromium, compared, width, height, dark):
    page = chromium
    page.said.clear()
    page.open(compared, width, height, dark, phone=width < 500)
    assert page.said == []  # no error, no warning, no request to anywhere
    assert page.run("document.querySelector('.failed') === null")
    assert page.run("document.documentElement.scrollWidth") <= width  # nothing sticks out
    charts = page.run("document.querySelectorAll('figure canvas').length")
    assert charts == 10  # one for each metric, `mine` of no row of the table too
    inked = """[...document.querySelectorAll('figure canvas')].filter((c) =>
        c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v)).length"""
    assert page.run(inked) == charts
    light = page.run("getComputedStyle(document.body).backgroundColor")
    assert light == ("rgb(19, 21, 23)" if dark else "rgb(251, 251, 250)")
    # Two timelines on one scale: the bars of a step are as long in both.
    steps = page.run("""[...document.querySelectorAll('#timeline svg')].map((s) =>
        [...s.querySelectorAll('line')].map((l) => +l.getAttribute('x1')))""")
    assert len(steps) == 2 and len(steps[0]) == 5 and steps[0] == steps[1]
    words = "[...document.querySelectorAll('#timeline svg text')].map((t) => t.textContent)"
    # Of a step's second the engine waits 0.4 for the trainer, and the trainer 0.4 for its rows.
    assert [w for w in page.run(words) if w.startswith("waits")] == ["waits 40%"] * 4


def test_hostile_text_is_shown_as_text(chromium, compared):
    page = chromium
    page.open(compared)
    assert page.run("window.pwned === undefined && !document.getElementById('injected')")
    shown = page.run("document.querySelector('.sample .policy').textContent")
    written = EVIL.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    assert shown == written
    colours = """['.policy', '.given'].map((c) =>
        getComputedStyle(document.querySelector('.sample ' + c)).backgroundColor)"""
    assert len(set(page.run(colours))) == 2
    page.run("document.querySelector('#samples button').click()")
    assert page.run("document.querySelector('#samples .bar b').textContent") == "step 6"


def test_the_mean_of_seeds_and_its_band(chromium, compared):
    page = chromium
    page.open(compared)
    out = page.run("series(groups[0], 'reward')")
    assert out["mean"][:2] == [0.5, 0.625] and out["low"][0] == 0 and out["high"][0] == 1
    out = page.run("series(groups[1], 'eval_reward')")  # one run: its standard error
    assert (out["low"][0], out["high"][0]) == (0.4, 0.6)
    assert page.run("fact(groups[0], 'reward, first')") == "0.5 ± 0.71"
    assert page.run("fact(groups[1], 'accuracy, first')") == ""  # two functions: a sum
    assert page.run("fact(groups[1], 'held-out reward, first')") == "0.5 ± 0.1"


def test_what_a_rank_does_is_its_innermost_span(chromium, compared):
    page = chromium
    page.open(compared)
    spans = [("collect", 0, 10), ("generate", 2, 5), ("idle", 5, 7), ("arrive sync", 10, 20)]
    given = json.dumps([{"name": n, "start": a, "end": b} for n, a, b in spans])
    assert page.run(f"flat({given})") == [
        ["other", 0, 2], ["generate", 2, 5], ["wait", 5, 7], ["other", 7, 10], ["wait", 10, 20],
    ]  # fmt: skip


def test_a_long_run_opens_in_two_seconds(chromium, tmp_path):
    folder = make_run(tmp_path / "long", steps=2000)
    report.write_page([folder], folder / "report.html")
    times = []
    for _ in range(3):  # another program may take the processor
        chromium.open(folder / "report.html")
        times.append(chromium.run("+document.documentElement.dataset.drawn"))
    assert min(times) < 2000, times  # ms
