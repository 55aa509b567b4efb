"""The 25 ways in which RL of language models goes wrong without a sign: a test for each.

Each fails when its pitfall is put back: `python tests/mutate.py` does that, MUTATIONS.md is what it
printed.
"""

import functools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, judge, lines, logs, run
from pitfall_rows import LENGTHS, batch, complete, gradient, random_row, row, settings, train

import data
import grpo
import losses
import report
import sft
import tasks
from examples.calculator import Calculator
from generator import Generator
from model import Policy, head_logprobs, pack_rows
from report import load_rollouts
from rollouts import Rollouts, from_rows
from runtime import UserError, World
from trainer import Trainer
from workers import Workers

SPLIT_TOLERANCE = 1e-12  # of the gradient's norm, in float64

# ---------------------------------------------------------------- what the tests share


@pytest.fixture(scope="module")
def world():
    """One trainer in this process, connected."""
    env = dict(TORCHELASTIC_RUN_ID="x", RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, str(value))
        made = World(None)
        made.connect()
        yield made
        made.close()


def test_uneven_shards_travel_whole(two_trainers):
    """Two trainers' shards, in buckets from one tensor to all: cast, nothing else."""
    pairs = two_trainers.found["travels"]
    assert len(pairs) == 4 * 6
    assert all(torch.equal(there, full.bfloat16()) for full, there in pairs)


@pytest.fixture(scope="module")
def two_trainers(tiny, tmp_path_factory):
    """What pitfall_rows.py found on two ranks: name -> (gradient, metrics); and how it ended."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    done = run(2, "tests/pitfall_rows.py", str(out), tiny("qwen2"), timeout=900)
    return SimpleNamespace(found=torch.load(out) if out.exists() else {}, done=done)


TASK = """
import random, tasks

class Few(tasks.Task):
    # Six long prompts that every step asks again; a reply with more different letters is better.
    def __init__(self, cfg):
        super().__init__(cfg)
        rng = random.Random(0)
        self.train = [{"prompt": "".join(rng.choices("0123456789", k=150))} for _ in range(6)]
        self.heldout, self.rewards = self.train[:1], [self.variety]

    def variety(self, episode):
        return len(set(episode.text)) / 10
"""


@pytest.fixture(scope="module")
def engine_run(tiny, tmp_path_factory):
    """grpo.py with a real engine beside a trainer: three steps of large updates at temperature
    0.6.
    """
    base = tmp_path_factory.mktemp("engine")
    (base / "few.py").write_text(TASK)
    args = [f"--task={base}/few.py:Few", f"--model={tiny('qwen3')}", f"--run_dir={base}/r"]
    args += [
        "--steps=3",
        "--lr=0.03",
        "--temperature=0.6",
        "--prompts_per_step=6",
        "--group_size=2",
    ]
    args += ["--max_prompt_tokens=160", "--max_new_tokens=12", "--eval_size=0"]
    args += ["--deterministic=true", "--save_rollouts=true"]
    done = run(2, "grpo.py", *args, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:] + logs(base / "r")
    return base / "r"


@functools.cache
def reference(path: str):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


@torch.no_grad()
def brute_force(path: str, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """log p(token | those before), each from a forward of these alone; 0 for the first."""
    out = [0.0]
    for t in range(1, len(tokens)):
        logits = reference(path)(input_ids=torch.tensor([tokens[:t]])).logits[0, -1]
        out.append(float((logits / temperature).log_softmax(-1)[tokens[t]]))
    return out


def policy(path: str, chunk: int = 0, **settings) -> Policy:
    how = dict(dtype=torch.float64, attn_implementation="packed")
    lm = transformers.AutoModelForCausalLM.from_pretrained(path, **how, **settings)
    return Policy(lm, 1.0, chunk)


def logprobs_of(policy, table: Rollouts) -> torch.Tensor:
    return policy(pack_rows(table.tokens, table.length, table.mask))[0]


def assert_brute_force(path: str, table: Rollouts, found: torch.Tensor, temperature: float = 1.0):
    for i, n in enumerate(table.length.tolist()):
        expected = brute_force(path, table.tokens[i, :n].tolist(), temperature)
        for t in range(n):
            wanted = expected[t] if table.mask[i, t] else 0.0
            assert found[i, t].item() == pytest.approx(wanted, abs=1e-9), (i, t)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two gradients, relative to the second."""
    assert b.norm() > 1e-3
    return float((a - b).norm() / b.norm())


@pytest.fixture
def make_generator():
    """A rank's generator without its engine: what comes out of one is handed to `turns_ended`."""

    def make(task, tokenizer, **values) -> Generator:
        cfg = settings(str(ROOT / "assets/calculator"), deterministic=True, **values)
        world = SimpleNamespace(generates=False, cuda=False, engine=0, leads=True)
        world.engines, world.lap = [[0]], lambda: None
        made = Generator(cfg, world, task, tokenizer, version=1)
        made.rows, made.groups, made.complete = {}, {}, {}
        made.refills, made.open, made.queue = {}, {}, []
        made.workers = Workers(task, 1, seconds=60)
        made.told = {"notes": [], "evals": []}
        made.prepare_prompts()
        return made

    return make


def few_problems(**values):
    """The calculator with nine prompts."""
    task = Calculator(settings(**values))
    task.train, task.heldout = task.train[:9], task.heldout[:3]
    return task


def calculator_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "assets/calculator")


# ---------------------------------------------------------------- the sum and its divisor


def test_01_gradient_does_not_depend_on_the_split(tiny, world):
    """A mean per micro-batch makes the gradient depend on how the batch was split."""
    for aggregation in ("token", "sequence", "prompt", "fixed"):
        cfg = settings(tiny("qwen2"), aggregation=aggregation, max_grad_norm=0.0)
        trainer = Trainer(cfg, world)
        whole, _ = gradient(trainer, batch(cfg), budget=10_000)
        for budget in (8, 25, 40):
            split, _ = gradient(trainer, batch(cfg), budget)
            assert distance(split, whole) < SPLIT_TOLERANCE, (aggregation, budget)


def test_02_gradient_does_not_depend_on_the_ranks(tiny, world, two_trainers):
    """FSDP averages over its ranks, but a sum with one divisor needs their sum."""
    assert "all" in two_trainers.found, two_trainers.done.stderr[-2000:]
    cfg = settings(tiny("qwen2"), max_grad_norm=0.0)
    alone, _ = gradient(Trainer(cfg, world), batch(cfg))
    assert distance(two_trainers.found["all"][0], alone) < SPLIT_TOLERANCE


def test_03_each_aggregation_by_hand():
    """Means over tokens, over rows and over a constant, silently swapped, bring a length bias."""
    # A group of 2 and 6 tokens, another of 4; at ratio 1 a token's loss is minus its advantage.
    by_hand = {
        "token": -(2 * 1 + 6 * 0.5 + 4 * 2) / 12,
        "sequence": -(1 + 0.5 + 2) / 3,
        "prompt": -((2 * 1 + 6 * 0.5) / 8 + 2) / 2,
        "fixed": -(2 * 1 + 6 * 0.5 + 4 * 2) / (3 * 10),
    }
    for aggregation, expected in by_hand.items():
        cfg = settings(aggregation=aggregation, max_new_tokens=10)
        rows = batch(cfg, [(1, 2), (1, 6), (1, 4)])
        rows.advantage = torch.tensor([[1.0], [0.5], [2.0]]) * rows.mask
        value = losses.grpo(rows.logprobs, rows, cfg)[0] / losses.divisor(rows, cfg)
        assert value.item() == pytest.approx(expected, rel=1e-6), aggregation
    own = {"grpo": "token", "dr_grpo": "fixed", "dapo": "token", "gspo": "sequence"}
    assert {name: settings(loss=name).aggregation for name in own} == own


def test_04_groups_that_teach_nothing_are_exactly_zero():
    """A group of one or of equal rewards divides by a std of 0, and dilutes the divisor."""
    for kind in ("mean", "mean_std", "leave_one_out"):
        cfg = settings(advantage=kind)
        rows = batch(cfg, [(1, 3)] * 10)
        rows.index = torch.tensor([0] * 7 + [1] + [2] * 2)  # seven equal ones, one alone, a pair
        rows.reward = torch.tensor([0.1] * 7 + [5.0] + [1.0, 0.0])
        rows.returns = rows.reward[:, None]
        complete(rows, cfg)
        logprobs = rows.logprobs.clone().requires_grad_()
        losses.grpo(logprobs, rows, cfg)[0].backward()
        assert not rows.advantage[:8].any() and not logprobs.grad[:8].any(), kind
        scale = {"mean": 0.5, "mean_std": 0.5 / (math.sqrt(0.5) + 1e-4), "leave_one_out": 1.0}
        assert rows.advantage[8:, 1].tolist() == pytest.approx([scale[kind], -scale[kind]]), kind
    cfg.equal_rewards = "mask"
    complete(rows, cfg)
    assert rows.weight.tolist() == [0.0] * 8 + [1.0] * 2
    assert losses.divisor(rows, cfg) == 6  # the pair's tokens alone


# ---------------------------------------------------------------- tokens


def test_05_eos_is_trained_when_pad_is_eos(tiny, make_generator):
    """With pad = EOS, the mask `ids != pad` never trains the model to stop."""
    table = from_rows([row(0, [5, 6], [7, 0, 8, 0]), row(1, [5], [7])], ["correct"])  # 0 is the pad
    assert table.mask.tolist() == [[False] * 2 + [True] * 4, [False, True] + [False] * 4]
    assert table.sampled.tolist() == [4, 1]
    model = policy(tiny("qwen2"))
    found = logprobs_of(model, table)
    assert_brute_force(tiny("qwen2"), table, found)
    found[0, 5].backward()  # the EOS
    assert model.lm.get_output_embeddings().weight.grad.norm() > 1e-3
    generator = make_generator(few_problems(), calculator_tokenizer())
    generator.rows["a"] = made = row(0, [5, 6], [])
    generator.turns_ended([("a", [7, 2], [-1.0, -1.0], "stop")])
    assert made.finished and made.mask == [False, False, True, True]
    made = {"tokens": [5, 6, 0], "mask": [False, True, True]}
    assert data.to_table([made], 0, 3).mask.tolist() == [[False, True, True]]


def test_06_logprobs_do_not_depend_on_padding(tiny):
    """Padding without mask or positions changes the log-probs of what it surrounds."""
    rows = [random_row(i, *n) for i, n in enumerate(LENGTHS)]
    table, model = from_rows(rows, ["correct"]), policy(tiny("qwen3"))
    found = logprobs_of(model, table)
    for i, each in enumerate(rows):  # as it was before there was any padding
        expected = torch.tensor(brute_force(tiny("qwen3"), each.tokens), dtype=torch.float64)
        found_here = found[i, table.mask[i]]
        assert torch.allclose(found_here, expected[torch.tensor(each.mask)], atol=1e-9)
    padding = torch.arange(table.tokens.shape[1]) >= table.length[:, None]
    table.tokens[padding] = 9
    assert torch.equal(logprobs_of(model, table), found)
    for i in range(len(table)):
        alone = table.take([i])
        assert torch.allclose(
            logprobs_of(model, alone)[0], found[i, : alone.tokens.shape[1]], atol=1e-12
        )


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_07_the_ratio_of_stale_tokens_is_not_one(loss):
    """`exp(lp - lp.detach())` is 1 whatever sampled the tokens: stale data pass as fresh."""
    cfg = settings(loss=loss)
    fresh = batch(cfg)
    present = fresh.logprobs.clone()
    stale = batch(cfg)
    stale.logprobs = (present - math.log(2)) * stale.mask  # the policy that sampled gave half
    gradients = []
    for rows in (fresh, stale):
        logprobs = present.clone().requires_grad_()
        losses.LOSSES[loss](logprobs, rows, cfg)[0].backward()
        gradients.append(logprobs.grad)
    ratio = losses.figures(present, stale, cfg)["ratio"] / stale.sampled.sum()
    assert ratio.item() == pytest.approx(2, rel=1e-5)
    assert distance(*gradients) > 0.05
    if loss == "reinforce":  # no clip: twice the weight
        assert torch.allclose(gradients[1], 2 * gradients[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_08_logits_are_of_the_token_that_follows(tiny, name):
    """An alignment that is off by one trains each token by its neighbour's log-prob."""
    table = from_rows([random_row(i, *n) for i, n in enumerate(LENGTHS[1:4])], ["correct"])
    for chunk in (0, 5):
        found = logprobs_of(policy(tiny(name), chunk), table)
        assert_brute_force(tiny(name), table, found)


def test_09_trainer_has_the_temperature_of_the_sampling(tiny, world, request):
    """Without the sampling's temperature in the trainer, on-policy ratios are not 1."""
    for chunk in (0, 5):
        cfg = settings(tiny("qwen2"), temperature=0.6, head_chunk=chunk)
        table = batch(cfg, LENGTHS[1:4])
        found = logprobs_of(Trainer(cfg, world).policy, table)
        assert_brute_force(tiny("qwen2"), table, found, temperature=0.6)
    for x in lines(request.getfixturevalue("engine_run")):
        assert abs(x["ratio"] - 1) < 1e-4 and x["mismatch_max"] < 1e-4


def test_10_filtered_sampling_is_refused(make_generator, world):
    """top-p and top-k renormalise what is sampled, so that the ratio's mean is the kept mass."""
    for top_p in (0.9, 0.0, 1.1):
        with pytest.raises(UserError, match="top_p=.*: must be at"):
            grpo.check(settings(top_p=top_p), world)
    generator = make_generator(few_problems(), calculator_tokenizer())
    generator.start_group(0, 0, attempt=0)
    for _, _, _, sampling in generator.queue:
        assert sampling.keys() == {"temperature", "max_tokens", "seed"}


def ambiguous_tokenizer():
    """`a` and `b` have the text of `ab`, which is how that text would be tokenised."""
    from tokenizers import Tokenizer, decoders, models

    names = ["<eos>", "a", "b", "ab", "]", "="]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("a", "b")]))
    made.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


class Echo(tasks.Task):
    stop = "]"
    train = heldout = [{"prompt": "ab=", "answer": ""}]

    def reply(self, episode):
        return "=ab"


def test_11_text_is_never_tokenised_again(make_generator):
    """Text of a reply that is tokenised again comes back as other tokens than were sampled."""
    tokenizer = ambiguous_tokenizer()
    generator = make_generator(Echo(settings()), tokenizer, group_size=1)
    sampled = [1, 2, 4]  # a b ]
    assert tokenizer.encode(tokenizer.decode(sampled)) != sampled
    generator.start_group(0, 0, attempt=0)
    name, prompt, *_ = generator.queue.pop()
    made = generator.rows[name]
    expected, start = [*prompt], len(prompt)
    for _ in range(2):
        generator.turns_ended([(name, sampled, [-1.0, -2.0, -3.0], "stop")])
        generator.apply_jobs()
        name, asked, *_ = generator.queue.pop()
        expected += sampled + tokenizer.encode("=ab")
        assert made.tokens == asked == expected
    assert made.logprobs[start : start + 3] == [-1.0, -2.0, -3.0]


# ---------------------------------------------------------------- the forward


def test_12_logits_are_not_rounded_to_bfloat16():
    """Logits in bfloat16 are off by up to a tenth for some tokens, though not in the mean."""
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    targets = torch.randint(500, (40,))
    expected = (hidden.double() @ head.double().T).log_softmax(-1)[torch.arange(40), targets]
    for chunk in (7, 0):
        found, entropy = head_logprobs(hidden, head, targets, 1.0, chunk)
        assert found.dtype == entropy.dtype == torch.float32
        assert (found - expected).abs().max() < 1e-4, chunk  # the worst token, not the mean


def test_13_two_forwards_are_equal(tmp_path):
    """Dropout in the trainer makes it another function than the sampler."""
    torch.manual_seed(0)
    shape = dict(vocab_size=28, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    shape |= dict(num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    shape |= dict(resid_pdrop=0.5, attention_dropout=0.5)
    transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape)).save_pretrained(tmp_path)
    model = policy(tmp_path).train()
    table = batch(settings())
    found = logprobs_of(model, table)
    assert torch.equal(logprobs_of(model, table), found)
    assert_brute_force(str(tmp_path), table, found)


def test_14_engine_has_the_present_weights(tiny, engine_run):
    """An engine that missed an update samples from an old policy under the new one's name."""
    for x in lines(engine_run):
        assert x["mismatch_max"] < 1e-4 and x["policy_age_max"] == 0, x["step"]
    for step in range(3):
        table = load_rollouts(engine_run / f"rollouts/{step}")
        expected = brute_force(tiny("qwen3"), table.tokens[0, : table.length[0]].tolist(), 0.6)
        old = [p for p, sampled in zip(expected, table.mask[0]) if sampled]
        away = (torch.tensor(old) - table.logprobs[0][table.mask[0]]).abs().max()
        assert away < 1e-4 if step == 0 else away > 0.1  # the updates are large enough to see


def test_15_prefixes_are_not_cached_over_an_update(engine_run):
    """A prompt that is asked again meets cache blocks that the old weights filled."""
    tables = [load_rollouts(engine_run / f"rollouts/{step}") for step in range(3)]
    prompts = [{tuple(t.tokens[i][:150].tolist()) for i in range(len(t))} for t in tables]
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) == 6
    assert all(x["mismatch_max"] < 1e-4 for x in lines(engine_run))


def test_16_a_rank_without_rows_takes_part(tiny, world, two_trainers):
    """A rank whose part of the plan is empty must still run FSDP's collectives and metrics."""
    assert two_trainers.done.returncode == 0, two_trainers.done.stderr[-2000:]
    cfg = settings(tiny("qwen2"), max_grad_norm=0.0)
    alone, metrics = gradient(Trainer(cfg, world), batch(cfg).take([1]))
    shared, found = two_trainers.found["one"]
    assert distance(shared, alone) < SPLIT_TOLERANCE
    assert report.derived(found) == pytest.approx(report.derived(metrics))


def test_17_a_gradient_that_is_not_finite_moves_nothing(tiny, world):
    """The host finds out after the optimizer was called: AdamW must have left all as it was."""
    cfg = settings(tiny("qwen2"), dtype="float32", max_skipped=0)
    trainer = Trainer(cfg, world)
    gradient(trainer, batch(cfg))  # moments
    everything = [*trainer.policy.parameters()]
    everything += [v for state in trainer.optimizer.state.values() for v in state.values()]
    before = [v.detach().clone() for v in everything]
    table = batch(cfg)
    table.advantage[0] = math.nan
    with pytest.raises(FloatingPointError, match="norm is nan"):
        train(trainer, table)
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))


def test_17_a_token_without_a_finite_logprob_counts_nowhere():
    """A log-prob that is NaN makes the loss NaN, or stays in the divisor."""
    cfg, bad = settings(), [float("nan"), -1.0, float("-inf"), -1.0]
    rows = [row(0, [5], [6, 7, 8, 9], bad), row(1, [5], [6, 7])]
    table = complete(from_rows(rows, ["correct"]), cfg)
    assert table.mask[0].tolist() == [False, False, True, False, True]
    assert table.sampled.tolist() == [2, 2] and losses.divisor(table, cfg) == 4
    logprobs = torch.full(table.mask.shape, -1.0, requires_grad=True)
    loss, sums = losses.policy_loss(losses.grpo)(logprobs, table, cfg)
    loss.backward()
    assert loss.isfinite() and all(v.isfinite().all() for v in sums.values())
    assert (logprobs.grad != 0)[0].tolist() == [False, False, True, False, True]


def test_18_gradient_is_clipped(tiny, world, two_trainers):
    """A clip that is configured and not applied, or applied to each rank's shard by itself."""
    cfg = settings(tiny("qwen2"), max_grad_norm=0.01)
    alone = gradient(Trainer(cfg, world), batch(cfg))
    for clipped, metrics in (alone, two_trainers.found["clipped"]):
        assert metrics["grad_norm"] > 0.02  # as it was before
        assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-4)


def test_rows_that_are_skipped_leave_the_gradient_as_it_is(tiny, world):
    """A group of equal rewards: not computed, but in the divisor."""
    found, tokens = [], []
    for kind in ("train", "skip"):
        cfg = settings(tiny("qwen2"), equal_rewards=kind)
        table = batch(cfg)
        table.advantage[:2] = 0
        table.share = losses.shares(table, cfg)
        whole, metrics = gradient(Trainer(cfg, world), table)
        found.append(whole)
        tokens.append(metrics["tokens"])
    assert tokens[0] - tokens[1] == int(table.sampled[:2].sum()) > 0
    assert found[0].norm() > 0.1 and torch.allclose(*found, rtol=1e-9, atol=1e-12)


def test_19_packed_rows_do_not_see_each_other(tiny):
    """Attention that leaks over the rows of a pack gives log-probs that no sampler has."""
    model, cfg = policy(tiny("llama")), settings()
    table = batch(cfg)
    before = logprobs_of(model, table)
    assert_brute_force(tiny("llama"), table, before)
    table.tokens[0, : table.length[0]] = 11  # another first row
    assert torch.equal(logprobs_of(model, table)[1:], before[1:])


def test_20_chunked_head_is_the_dense_head():
    """A head in chunks that loses a tail, or a part of a gradient, still trains somehow."""
    g = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=g, dtype=torch.float64)
    inputs, upstream = [draw(23, 8), draw(50, 8)], draw(23)
    targets, results = torch.randint(50, (23,), generator=g), {}
    for chunk in (0, 1, 2, 7, 22, 23, 64):
        hidden, head = (x.clone().requires_grad_() for x in inputs)
        logprobs, entropy = head_logprobs(hidden, head, targets, 0.7, chunk)
        (logprobs * upstream).sum().backward()
        results[chunk] = (logprobs, entropy, hidden.grad, head.grad)
    for chunk, found in results.items():
        for value, dense in zip(found, results[0]):
            assert torch.allclose(value, dense, rtol=0, atol=1e-12), chunk


def test_21_cut_off_replies_can_be_left_out(tiny, world):
    """A reply that was cut off has reward 0 for its length and is trained as if it were wrong."""
    cfg = settings(tiny("qwen2"), overlong="mask", max_grad_norm=0.0, lr=0.01)
    rows = [random_row(i, *n) for i, n in enumerate(LENGTHS)]
    rows[0].finished = rows[3].finished = False
    masked = complete(from_rows(rows, ["correct"]), cfg)
    assert masked.weight.tolist() == [0, 1, 1, 0, 1, 1]
    assert losses.divisor(masked, cfg) == sum(n for i, (_, n) in enumerate(LENGTHS) if i % 3)
    trainer = Trainer(cfg, world)
    train(trainer, masked)
    assert trainer.optimizer.state  # it has a momentum
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    for each in rows:
        each.finished = False
    metrics = train(trainer, complete(from_rows(rows, ["correct"]), cfg))
    assert all(math.isfinite(v) for v in report.derived(metrics).values()), metrics
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))
    cfg.overlong = "train"
    assert complete(from_rows(rows, ["correct"]), cfg).weight.tolist() == [1] * 6


def test_22_a_resumed_run_is_the_same_run(tiny, world, tmp_path):
    """A resume that repeats or skips data, or forgets the optimizer, is another run."""
    cfg = settings(tiny("qwen2"), lr=0.01, steps=4)
    first = Trainer(cfg, world)
    for step in range(2):
        train(first, batch(cfg, step=step))
    first.save(tmp_path)
    first.saved()
    second = Trainer(cfg, world)
    second.load(tmp_path / "step-2")
    for step in range(2, 4):
        a, b = (train(t, batch(cfg, step=step)) for t in (first, second))
        assert a == b
    assert all(map(torch.equal, first.policy.parameters(), second.policy.parameters()))

    names = [(step, slot) for step in range(4) for slot in range(16)]  # seven epochs
    uninterrupted, resumed = few_problems(), few_problems()
    asked = [uninterrupted.problem(*name) for name in names]
    assert [resumed.problem(*name) for name in names[32:]] == asked[32:]
    assert [uninterrupted.problem(*name) for name in names] == asked  # the calls leave no trace
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "1"}) + "\n" for i in range(20))
    )
    mine = dict(data=str(tmp_path / "data.jsonl"), eval_size=0, rows_per_step=3)
    one, two = (data.Examples(sft.Config(**mine), calculator_tokenizer()) for _ in range(2))
    assert [one.batch(i).tokens.tolist() for i in range(20)][11:] == [
        two.batch(i).tokens.tolist() for i in range(11, 20)
    ]


def test_23_what_the_environment_says_is_not_trained(make_generator):
    """Tokens of a tool in the loss teach the policy to invent the tool's answers."""
    tokenizer = calculator_tokenizer()
    generator = make_generator(few_problems(), tokenizer, group_size=1)
    generator.start_group(0, 0, attempt=0)
    name, prompt, *_ = generator.queue.pop()
    made = generator.rows[name]
    spoken = [([*prompt], False)]
    for text, answer in (("[63*11]", "=693"), ("[693+48]", "=741")):
        tokens = generator.encode(text)
        generator.turns_ended([(name, tokens, [-1.0] * len(tokens), "stop")])
        generator.apply_jobs()
        name = generator.queue.pop()[0]
        spoken += [(tokens, True), (generator.encode(answer), False)]
    last = [*generator.encode("#741"), tokenizer.eos_token_id]
    generator.turns_ended([(name, last, [-1.0] * len(last), "stop")])
    generator.apply_jobs()
    spoken += [(last, True)]
    table = from_rows(generator.complete[0], ["correct"])
    assert table.tokens[0].tolist() == [t for tokens, _ in spoken for t in tokens]
    assert table.mask[0].tolist() == [own for tokens, own in spoken for _ in tokens]
    assert made.finished and table.sampled.tolist() == [
        sum(map(len, ("[63*11]", "[693+48]", last)))
    ]
    assert ((table.version[0] >= 0) == table.mask[0]).all()
    assert not table.logprobs[0][~table.mask[0]].any()


def test_24_kl_has_the_right_sign_and_counts_once():
    """A KL of the wrong sign drives the policy away; one in reward and loss counts twice."""
    g = torch.Generator().manual_seed(0)
    theta, other = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(2))
    theta.requires_grad_()
    logp, logq = theta.log_softmax(-1), other.log_softmax(-1)
    true = (logp.exp() * (logp - logq)).sum()
    grad = torch.autograd.grad(true, theta, retain_graph=True)[0]
    p = logp.exp().detach()
    means = {k: (p * losses.kl(logp, logq, k)).sum() for k in ("k1", "k2", "k3")}
    gradients = {k: torch.autograd.grad(v, theta, retain_graph=True)[0] for k, v in means.items()}
    assert means["k1"].item() == pytest.approx(true.item())
    assert means["k3"].item() == pytest.approx(true.item()) and (losses.kl(logp, logq) >= 0).all()
    assert torch.allclose(gradients["k2"], grad) and gradients["k1"].norm() < 1e-12
    assert gradients["k3"] @ grad > 0  # both lead towards the reference

    cfg, free = settings(kl_coef=0.5), settings()
    rows = batch(cfg)
    logprobs = (rows.logprobs + 0.1) * rows.mask
    rows.ref_logprobs = (rows.logprobs - 0.3) * rows.mask
    with_kl, without = (losses.policy_loss(losses.grpo)(logprobs, rows, c) for c in (cfg, free))
    once = 0.5 * (math.exp(-0.4) - 1 + 0.4) * int(rows.mask.sum())
    assert (with_kl[0] - without[0]).item() == pytest.approx(once, rel=1e-4)
    assert with_kl[1]["kl_ref"].item() == pytest.approx(once / 0.5, rel=1e-4)
    again = losses.group_advantages(rows, cfg.advantage)
    assert torch.equal(again, rows.advantage)  # nothing of it in there
    each = (again * rows.mask).sum(1) / rows.mask.sum(1).clamp(min=1)
    for group in rows.index.unique():  # by the rewards alone it is 0 on average
        assert each[rows.index == group].mean().item() == pytest.approx(0, abs=1e-6)


def test_25_same_seed_same_run(tiny, world, make_generator):
    """An unseeded shuffle makes no run repeatable; a mean over rewards changes their scale."""
    made = row(0, [5], [6])
    half = tasks.Task(None)
    half.rewards = [lambda episode: 1.0, functools.wraps(half.correct)(lambda episode: 0.5)]
    judge(half, made, may_go_on=False)
    assert from_rows([made], list(made.rewards)).reward.tolist() == [1.5]  # their sum

    def started(seed: int, noise: int):
        """What a run asks of task and engine, whatever its process has drawn before."""
        random.seed(noise), torch.manual_seed(noise)
        task = few_problems(seed=seed)
        generator = make_generator(task, calculator_tokenizer(), seed=seed, group_size=2)
        for slot in range(9):
            generator.start_group(0, slot, attempt=0)
            generator.start_group(0, slot, attempt=1)
        return [(name, tokens, sampling["seed"]) for name, tokens, _, sampling in generator.queue]

    one, two, other = started(0, 1), started(0, 2), started(1, 1)
    assert one == two
    assert [t for _, t, _ in one] != [t for _, t, _ in other]
    seeds = {seed for _, _, seed in one}
    assert len(seeds) == 9 * 2 * 2 and not seeds & {seed for _, _, seed in other}
    weights = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        trainer = Trainer(settings(tiny("qwen2"), random_init=True), world)
        weights.append(list(trainer.policy.parameters()))
    assert all(map(torch.equal, *weights))
