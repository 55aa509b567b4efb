"""Data for SFT: forms, masks, sources and their weights, bad rows, batches, streams."""

import contextlib
import io
import json
import re
import shutil

import pytest
from conftest import ROOT, lines, run
from test_checkpoints import learned
from test_record import start
from test_runs import good
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import report
import sft
import weights
from data import Examples
from generator import eos_tokens
from model import check_config
from runtime import UserError, load_symbol
from trainer import Trainer

# Two templates with transformers' own mark of what the assistant says: the one all keep as it is,
# the other leaves out the thoughts of earlier turns, as Qwen3's does.
PLAIN = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>"
    "{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKS = PLAIN.replace(
    "{{ m.content }}", "{% if loop.last %}<think></think>{% endif %}{{ m.content }}", 1
)
PREFIX = PLAIN.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>{% endif %}")
encode = load_symbol(f"{ROOT}/examples/forms.py:encode", "form")
CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and +1?"},
    {"role": "assistant", "content": "3"},
]


def chat_tokenizer(template: str | None, eos: str = "<|end|>"):
    """A token a byte, and the template's marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    marks = {"additional_special_tokens": ["<|start|>", "<think>", "<|end|>"], "eos_token": eos}
    made = PreTrainedTokenizerFast(tokenizer_object=bare, **marks)
    made.chat_template = template
    return made


def trained(row: dict, template=PLAIN, loss_on="assistant") -> list[tuple[str, str]]:
    """[(the whole, what is trained of it)] of an example; ValueError: what is wrong with it."""
    tokenizer = chat_tokenizer(template)
    out = encode({k: [v] for k, v in row.items()}, [0], "here", tokenizer, loss_on)
    if out["bad"][0]:
        raise ValueError(out["bad"][0])
    assert out["length"] == [len(x) for x in out["tokens"]]
    assert out["given"] == [mask.index(True) for mask in out["mask"]]
    some = [[t for t, on in zip(*x) if on] for x in zip(out["tokens"], out["mask"])]
    return [tuple(map(tokenizer.decode, x)) for x in zip(out["tokens"], some)]


def test_a_chat_is_trained_where_the_template_itself_marks_the_assistant():
    [(whole, said)] = trained({"messages": CHAT})
    assert said == "2<|end|>3<|end|>"  # every turn, and its end, which is what stops a reply
    tokenizer = chat_tokenizer(PLAIN)
    own = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )  # by {% generation %}, which few templates have
    out = encode({"messages": [CHAT]}, [0], "here", tokenizer, "assistant")
    assert out["tokens"] == [own["input_ids"]]
    assert out["mask"] == [[bool(x) for x in own["assistant_masks"]]]
    assert trained({"messages": CHAT}, loss_on="last") == [(whole, "3<|end|>")]
    [(same, everything)] = trained({"messages": CHAT}, loss_on="all")
    assert same == whole and whole == "<|start|>" + everything  # nothing is before the first token


def test_a_turn_that_the_template_shows_otherwise_later_is_trained_as_it_was_sampled():
    first, second = trained({"messages": CHAT}, THINKS)
    assert first[1] == "<think></think>2<|end|>" and second[1] == "<think></think>3<|end|>"
    assert first[0].endswith("1+1=<|end|>\n<|start|>assistant\n<think></think>2<|end|>\n")
    assert "assistant\n2<|end|>" in second[0]
    [last] = trained({"messages": CHAT}, THINKS, "last")
    assert last == second
    with pytest.raises(ValueError, match="here, row 1: the chat template does not go on from its"):
        trained({"messages": CHAT}, PREFIX)


def test_a_template_that_ends_a_turn_otherwise_than_eos(world, tmp_path):
    """As those of base models may: the end of turn is trained, not the newline behind it, and the
    model that is exported says that replies end there."""
    tokenizer = chat_tokenizer(PLAIN, eos="<|stop|>")
    out = encode({"messages": [CHAT]}, [0], "here", tokenizer, "assistant")
    said = [t for t, on in zip(out["tokens"][0], out["mask"][0], strict=True) if on]
    assert tokenizer.decode(said) == "2<|end|>3<|end|>"
    assert report.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    for template in (PLAIN, None):
        assert report.end_of_turn(chat_tokenizer(template)) is None
    model = shutil.copytree(ROOT / "assets/calculator", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<bos>{% endfor %}"
    tokenizer.save_pretrained(model)
    path = write(tmp_path / "a.jsonl", *sums(20))
    made = start(world, tmp_path / "r", model=str(model), data=path, epochs=1.0)
    data = Examples(made.cfg, tokenizer)
    made.screen = io.StringIO()
    report.before(data, made, check_config(str(model)), True)
    said = "the chat template ends a turn with '<bos>', not with the EOS '<eos>'"
    assert said in made.screen.getvalue()
    assert f"steps: {data.steps}\n" in (made.folder / "config.yaml").read_text()  # not the default
    trainer = Trainer(made.cfg, world, tokenizer)
    report.after(data, trainer, made)
    weights.export(trainer, tmp_path / "out", world)
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert eos_tokens(str(tmp_path / "out"), tokenizer) == ends


def test_forms_without_a_template_and_with_one():
    alpaca = {"instruction": "Add.", "input": "1 1", "output": "2"}
    heads = "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
    assert trained(alpaca, None) == [(f"{heads}2<|end|>", "2<|end|>")]
    bare = heads.replace("### Input:\n1 1\n\n", "")
    assert trained({**alpaca, "input": ""}, None) == [(f"{bare}2<|end|>", "2<|end|>")]
    [(whole, said)] = trained(alpaca)
    assert whole == "<|start|>user\nAdd.\n\n1 1<|end|>\n<|start|>assistant\n2<|end|>\n"
    assert said == "2<|end|>"
    pair = {"prompt": "1+1=", "completion": "2"}
    chat = "<|start|>user\n1+1=<|end|>\n<|start|>assistant\n2<|end|>\n"  # as RL asks a prompt
    assert trained(pair) == [(chat, "2<|end|>")]
    assert trained({"prompt": "1+1=", "answer": 2}) == [(chat, "2<|end|>")]
    pieces = {"pieces": [["1+1=", False], ["2", True]]}  # a task's own: as they stand
    assert trained(pieces) == [("1+1=2<|end|>", "2<|end|>")]
    assert trained(pieces, loss_on="all") == [("1+1=2<|end|>", "+1=2<|end|>")]
    whole = make(loss_on="all").batch(0)  # of a task, too
    assert (whole.sampled == whole.length - 1).all()


@pytest.mark.parametrize(
    ("row", "template", "why"),
    [
        ({"text": "x"}, PLAIN, "no 'messages', no 'instruction' with 'output', no 'prompt'"),
        ({"messages": CHAT[:2]}, PLAIN, "nothing in it is to be trained"),
        ({"prompt": "1+1=", "completion": ["2"]}, None, "the reply to 'prompt' is no text: ['2']"),
        ({"messages": "x"}, PLAIN, "not a list of texts with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, PLAIN, "not a list of texts"),
        ({"messages": CHAT}, None, "the model has no chat template"),
        ({"messages": CHAT}, "{{ raise_exception('roles must alternate') }}", "must alternate"),
    ],
)
def test_a_bad_row_is_named(row, template, why):
    with pytest.raises(ValueError, match=f"here, row 1: .*{re.escape(why)}"):
        trained(row, template)


# ---------------------------------------------------------------- sources


def write(path, *rows) -> str:
    path.write_text("".join(x + "\n" if isinstance(x, str) else json.dumps(x) + "\n" for x in rows))
    return str(path)


def sums(n, first=0, long=""):
    return [{"prompt": f"{i}=", "completion": f"{i}{long}"} for i in range(first, first + n)]


def make(**settings) -> Examples:
    how = {"model": f"{ROOT}/assets/calculator", "eval_size": 0, "rows_per_step": 4, "steps": 10}
    cfg = sft.Config(**{**how, **settings})
    return Examples(cfg, AutoTokenizer.from_pretrained(cfg.model))


def texts(data, steps) -> list[list[str]]:
    """The prompts of each batch, as numbers."""
    out = []
    for step in steps:
        rows = data.batch(step)
        words = [data.tokenizer.decode(x[:n]) for x, n in zip(rows.tokens, rows.length)]
        out.append([int(w.replace(" ", "").removeprefix("<bos>").split("=")[0]) for w in words])
    return out


def test_every_row_once_an_epoch_in_another_order(tmp_path):
    a, b = write(tmp_path / "a.jsonl", *sums(10)), write(tmp_path / "b.jsonl", *sums(5, 100))
    data = make(data=f"{a},{b}", epochs=2.0)
    found = texts(data, range(data.steps))
    assert data.steps == 8 and [len(x) for x in found] == [4] * 7 + [2]  # 30 rows, no more
    flat = sum(found, [])
    everything = [*range(10), *range(100, 105)]
    assert sorted(flat[:15]) == sorted(flat[15:]) == everything and flat[:15] != flat[15:]
    again = make(data=f"{a},{b}", epochs=2.0)
    assert texts(again, [5, 7]) == [found[5], found[7]]  # as a resumed run asks
    assert texts(make(data=f"{a},{b}", epochs=2.0, seed=1), range(8)) != found
    assert make(data=a, epochs=0.5).steps == 2  # 5 rows


def test_weights_are_shares_of_the_rows(tmp_path):
    a, b = write(tmp_path / "a.jsonl", *sums(200)), write(tmp_path / "b.jsonl", *sums(20, 1000))
    for streaming in (False, True):
        data = make(data=f"{a}=1,{b}=3", streaming=streaming)
        flat = sum(texts(data, range(50)), [])
        assert 0.68 < sum(x >= 1000 for x in flat) / len(flat) < 0.82, streaming


def test_a_batch_holds_what_fits_into_its_tokens(tmp_path):
    rows = [{"prompt": "1", "completion": "1" * (i % 9)} for i in range(60)]
    data = make(data=write(tmp_path / "a.jsonl", *rows), tokens_per_step=50, epochs=1.0)
    batches = [data.batch(step) for step in range(data.steps)]
    assert sum(len(x) for x in batches) == 60 and all(x.length.sum() <= 50 for x in batches)
    for one, following in zip(batches, batches[1:]):  # the next row would not have fitted
        assert one.length.sum() + following.length[0] > 50


def test_what_is_too_long_is_dropped_or_cut_and_counted(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        *sums(3),
        *sums(2, 10, "1" * 20),
        {"prompt": "1" * 30, "completion": "1"},
    )
    data = make(data=path, max_tokens=12)
    assert set(sum(texts(data, range(3)), [])) == {0, 1, 2} and (data.seen, data.long) == (6, 3)
    assert report.left_out(data) == "of 6 examples 3 longer than max_tokens=12 (drop)"
    data = make(data=path, max_tokens=12, too_long="cut")
    assert set(sum(texts(data, range(4)), [])) == {0, 1, 2, 10, 11}  # of the last no reply is left
    assert max(int(data.batch(step).length.max()) for step in range(4, 8)) == 12
    with pytest.raises(UserError, match="no example has at most max_tokens=2"):
        make(data=path, max_tokens=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_stop_the_run_beyond_a_share(tmp_path, streaming):
    path = write(tmp_path / "a.jsonl", *sums(8), "oops", "", {"text": "1"}, *sums(10, 20))
    with pytest.raises(UserError, match=r"a\.jsonl, line 9: not a JSON object"):
        make(data=path, streaming=streaming).batch(0)
    if not streaming:  # a stream's share is of 1000 rows, until it has seen more
        with pytest.raises(UserError, match="line 9: .*more are bad than max_bad=0.05 allows"):
            make(data=path, max_bad=0.05)
        good = write(tmp_path / "b.jsonl", *sums(40, 100))
        for both in (f"{path},{good}", f"{good},{path}"):  # the share is of what was seen so far
            fits = both.startswith(good)
            with contextlib.nullcontext() if fits else pytest.raises(UserError, match="more are"):
                assert len(make(data=both, max_bad=0.05).bad) == 2
    data = make(data=path, max_bad=0.1, streaming=streaming, steps=4)
    assert len(set(sum(texts(data, range(4)), []))) == 16  # behind the last nothing is read
    said = report.left_out(data)
    assert "2 were bad" in said and "line 9: not" in said and "line 11: no 'messages'" in said


def test_a_source_is_tokenised_once_and_a_changed_form_is_not_taken_for_it(tmp_path):
    path, form = write(tmp_path / "a.jsonl", *sums(5)), tmp_path / "form.py"
    text = (ROOT / "examples/forms.py").read_text()
    count = f"open({str(tmp_path / 'calls')!r}, 'a').write('x')\n"
    form.write_text(text + count.replace("open", "import builtins; builtins.open"))
    marked = text.replace("    made = []\n", f"    made = []\n    {count}", 1)
    form.write_text(marked)
    calls = lambda: len((tmp_path / "calls").read_text())  # noqa: E731
    make(data=path, form=f"{form}:encode")
    once = calls()
    again = make(data=path, form=f"{form}:encode")
    assert calls() == once == 1 and len(again.table) == 5
    form.write_text(marked + "# changed\n")
    make(data=path, form=f"{form}:encode")
    assert calls() == 2
    make(data=path, form=f"{form}:encode", loss_on="all")
    assert calls() == 3


def test_held_out_is_not_trained_and_a_source_of_its_own_is_judged_whole(tmp_path):
    a, b = write(tmp_path / "a.jsonl", *sums(40)), write(tmp_path / "b.jsonl", *sums(30, 100))
    data = make(data=f"{a},{b}", eval_size=100, epochs=1.0)
    assert {k: len(v) for k, v in data.heldout.items()} == {a: 4, b: 3}  # a tenth
    assert len(set(sum(texts(data, range(data.steps)), []))) == 63
    data = make(data=a, eval_data=b, eval_size=2, epochs=1.0)
    assert len(data.heldout[b]) == 30 and len(sum(texts(data, range(data.steps)), [])) == 40


@pytest.mark.parametrize("kind", ["parquet", "folder", "split"])
def test_other_sources(tmp_path, kind):
    import datasets

    rows = datasets.Dataset.from_list(sums(20))
    if kind == "parquet":
        rows.to_parquet(source := str(tmp_path / "x.parquet"))
    else:
        (tmp_path / "x/data").mkdir(parents=True)
        rows.to_parquet(tmp_path / "x/data/train-00000-of-00001.parquet")  # as the hub has it
        source = f"{tmp_path}/x" + ("@train[:50%]" if kind == "split" else "")
    data = make(data=source, epochs=1.0)
    assert sorted(sum(texts(data, range(data.steps)), [])) == [
        *range(10 if kind == "split" else 20)
    ]


def test_a_stream_goes_on_where_it_was(tmp_path):
    a, b = write(tmp_path / "a.jsonl", *sums(30)), write(tmp_path / "b.jsonl", *sums(30, 100))
    data = make(data=f"{a},{b}", streaming=True)
    found = texts(data, range(30))
    assert sorted(sum(found[:15], [])) == sorted(sum(found[15:], []))  # epoch after epoch
    assert found[:15] != found[15:] and data.heldout == {}
    assert texts(make(data=f"{a},{b}", streaming=True), [7, 20]) == [found[7], found[20]]
    with pytest.raises(UserError, match="no example of at most"):
        make(data=a, streaming=True, max_tokens=2).batch(0)


def test_what_is_wrong_with_the_batch_read_ahead_is_said_when_it_is_asked_for(tmp_path):
    (path := tmp_path / "late.py").write_text(
        "from examples.calculator import Calculator\nclass Late(Calculator):\n"
        "    def demonstration(self, name, progress):\n"
        "        assert progress <= 0.5, 'too late'\n"
        "        return super().demonstration(name, progress)\n"
    )
    data = make(task=f"{path}:Late", steps=4)
    for step in range(2):
        assert len(data.batch(step)) == 4
        data.begin()
        assert data.ahead
    with pytest.raises(AssertionError, match="too late"):
        data.batch(2)
    data, again = make(steps=2), make(steps=2)
    for step in range(2):
        assert data.batch(step).tokens.tolist() == again.batch(step).tokens.tolist()
        data.begin()  # none is behind the last
    assert data.ahead is None


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_tokenise_alike(tmp_path, streaming):
    """Large enough for two processes, which are started anew and know the form by its place."""
    path = write(tmp_path / "a.jsonl", *sums(10_000 if not streaming else 20))
    data = make(data=path, data_workers=2, streaming=streaming)
    assert texts(data, [0])[0] and (streaming or len(data.table) == 10_000)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("rank", [0, 4])
def test_memory_is_counted_by_the_parameters_that_there_are(world, rank):
    """All but the norms, which are less than 1% of the smallest model."""
    cfg = sft.Config(model=f"{ROOT}/assets/calculator", lora_rank=rank, tokens_per_microbatch=1)
    trainer = Trainer(cfg, world)
    config = trainer.policy.lm.config
    parts = report.count_memory(cfg, config, shards=1, master=4, compute=4)
    every = sum(p.numel() for n, p in trainer.policy.named_parameters() if ".lora_" not in n)
    some = sum(p.numel() for p in trainer.trained.values())
    assert parts["weights"] == pytest.approx(4e-9 * every, rel=0.01)
    assert parts["AdamW"] == 2 * parts["gradient"] == pytest.approx(8e-9 * some, rel=0.01)
    shared = report.count_memory(cfg, config, shards=4, master=4, compute=2)
    assert shared["weights"] == parts["weights"] / 4 and shared["gathered weights"] > 0


def test_a_model_that_cannot_fit_says_so(world, tmp_path):
    shape = json.loads((ROOT / "assets/blank/config.json").read_text())
    shape |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 100}
    del shape["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match="counted: .* of .* GB .*, which cannot fit: more ranks"):
        sft.check(sft.Config(model=str(tmp_path)), world)
    sft.check(sft.Config(), world)
    for settings in ({"tokens_per_step": 100}, {"epochs": 1.0}):  # of a task, which has no end
        with pytest.raises(UserError, match="of data without a known length; give --steps"):
            sft.check(sft.Config(**settings), world)
    with pytest.raises(UserError, match="epochs=1, .*of data without a known length"):
        sft.check(sft.Config(data="a.jsonl", epochs=1.0, streaming=True), world)
    assert report.problem(sft.Config(data="a.jsonl", epochs=3.0, profile_steps="900")) == ""
    assert "profile_steps" in report.problem(sft.Config(profile_steps="900"))


# ---------------------------------------------------------------- whole runs


@pytest.mark.long
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_on_files_resumes_to_the_same_result(tmp_path, streaming):
    """Two trainers, two sources, each judged on exactly one pass; batches by tokens."""
    a, b = write(tmp_path / "a.jsonl", *sums(60)), write(tmp_path / "b.jsonl", *sums(40, 100, "1"))
    held = [write(tmp_path / f"{x}.jsonl", *sums(9, n)) for x, n in (("c", 500), ("d", 700))]
    args = [f"--data={a}=1,{b}=2", f"--eval_data={','.join(held)}", f"--streaming={streaming}"]
    args += ["--tokens_per_step=120", "--eval_every=2", "--save_every=2", "--keep_checkpoints=0"]
    args += ["--steps=6", "--lr_schedule=constant"]
    whole = good(run(2, "sft.py", *args, f"--run_dir={tmp_path}/r"), tmp_path / "r")
    again = tmp_path / "again"
    resume = f"--resume={whole}/checkpoints/step-4"
    good(run(2, "sft.py", *args, f"--run_dir={again}", resume), again)
    assert learned(again) == learned(whole)[4:] and len(learned(again)) == 2
    one, two = ((f / "model/model.safetensors").read_bytes() for f in (again, whole))
    assert one == two
    judged = [x for x in lines(whole) if "eval_loss" in x]
    for x in judged:
        each = [x[f"eval_loss/{name}"] for name in held]
        tokens = [sum(len(f"{i}") + 1 for i in range(n, n + 9)) for n in (500, 700)]
        mean = sum(loss * n for loss, n in zip(each, tokens)) / sum(tokens)
        assert x["eval_loss"] == pytest.approx(mean) and each[0] != each[1]
    assert len(judged) == 3
    assert AutoTokenizer.from_pretrained(whole / "model").encode("1+1=")
