"""The policy in one process, against plain forwards: the shift, packing, the chunked head."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import Policy, check_config, checkpointed, few_sizes, head_logprobs, pack_rows
from runtime import UserError

LENGTHS = [9, 2, 14, 5]


def rows(seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 28, (len(LENGTHS), max(LENGTHS)), generator=g)
    mask = torch.rand(tokens.shape, generator=g) < 0.6
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    mask = mask & real
    mask[:, 0] = False
    return tokens * real, torch.tensor(LENGTHS), mask


def policy(path, chunk=0, temperature=1.0, dtype=torch.float64):
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="packed")
    return Policy(lm, temperature, chunk)


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2"])
def test_logprobs_are_those_of_each_row_alone(tiny, name):
    """Packed rows against one forward per row: shift, positions and the attention's borders."""
    tokens, length, mask = rows()
    ours, entropy = policy(tiny(name), temperature=0.7)(pack_rows(tokens, length, mask))
    plain = AutoModelForCausalLM.from_pretrained(
        tiny(name), dtype=torch.float64, attn_implementation="sdpa"
    )
    for i, n in enumerate(LENGTHS):
        logits = plain(input_ids=tokens[i : i + 1, :n]).logits[0] / 0.7  # (T, V)
        logp = logits.log_softmax(-1)
        for t in range(n):
            if mask[i, t]:
                assert abs(ours[i, t] - logp[t - 1, tokens[i, t]]) < 1e-10
                assert abs(entropy[i, t] + (logp[t - 1].exp() * logp[t - 1]).sum()) < 1e-10
            else:
                assert ours[i, t] == 0 and entropy[i, t] == 0


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_head_equals_dense(chunk):
    torch.manual_seed(0)
    inputs = [torch.randn(23, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)]
    targets, weight = torch.randint(50, (23,)), torch.randn(23, dtype=torch.float64)
    results = []
    for c in (0, chunk):
        h, w = (x.clone().requires_grad_() for x in inputs)
        logprobs, entropy = head_logprobs(h, w, targets, 0.7, c)
        (logprobs * weight).sum().backward()
        results.append((logprobs, entropy, h.grad, w.grad))
    for dense, chunked in zip(*results):
        assert torch.allclose(dense, chunked, atol=1e-12, rtol=0)


def test_chunked_head_against_finite_differences():
    torch.manual_seed(0)
    h, w = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 6))
    targets = torch.randint(6, (5,))
    assert torch.autograd.gradcheck(lambda h, w: head_logprobs(h, w, targets, 1.3, 2)[0], (h, w))


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunked_head_equals_dense_in_float32(chunk):
    """Of its norm, as the gradient of a step."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(400, 32, generator=g), torch.randn(1000, 32, generator=g)
    targets, upstream = torch.randint(1000, (400,), generator=g), torch.randn(400, generator=g)
    results = []
    for c in (0, chunk):
        a, b = (x.clone().requires_grad_() for x in (h, w))
        logprobs, entropy = head_logprobs(a, b, targets, 0.7, c)
        (logprobs * upstream).sum().backward()
        results.append((logprobs.detach(), entropy, a.grad, b.grad))
    for dense, chunked in zip(*results):
        assert (dense - chunked).norm() / dense.norm() < 1e-5


def test_selective_checkpointing_makes_no_product_again(tiny):
    """Products of a step, counted: with `full` those of the layers are made twice."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products, attentions = 0, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            self.attentions += "attention" in func.__name__ and "backward" not in func.__name__
            return func(*args, **(kwargs or {}))

    counted = {}
    for kind in ("none", "selective", "full"):
        p = policy(tiny("qwen2"), chunk=64).train()
        for layer in p.lm.model.layers:
            layer.forward = checkpointed(layer.forward, kind)
        with Count() as count:
            p(pack_rows(*rows()))[0].sum().backward()
        counted[kind] = count.products, count.attentions
    layers, of_each = len(p.lm.model.layers), 6  # q, k, v, o, gate, up: not down, the last
    assert counted["none"] == counted["selective"]
    assert counted["full"] == (counted["none"][0] + layers * of_each, counted["none"][1] + layers)


def test_few_sizes_by_hand():
    assert [few_sizes(n) for n in (1, 64, 65, 2048, 2049)] == [64, 64, 128, 2048, 2176]
    assert len({few_sizes(n) for n in range(8193, 16385)}) == 16
    assert all(0 <= few_sizes(n) - n < max(n / 16, 64) for n in range(1, 5000))


def test_two_forwards_are_equal_in_training_mode(tiny):
    """No dropout: what the trainer computes twice is the same."""
    p = policy(tiny("llama"), dtype=torch.float32).train()
    a, b = p(pack_rows(*rows()))[0], p(pack_rows(*rows()))[0]
    assert torch.equal(a, b)


def test_models_that_are_refused(tmp_path):
    import json

    def config(**values):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        (path / "config.json").write_text(json.dumps(values))
        return str(path)

    with pytest.raises(UserError, match="no model there"):
        check_config(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="not a causal language model"):
        check_config(config(model_type="bert", architectures=["BertModel"]))
    mistral = dict(model_type="mistral", architectures=["MistralForCausalLM"])
    with pytest.raises(UserError, match="sliding-window"):
        check_config(config(**mistral, sliding_window=4096))
    check_config(config(**mistral, sliding_window=None))
    with pytest.raises(UserError, match="soft-capped"):
        check_config(config(model_type="gemma2", architectures=["Gemma2ForCausalLM"]))
    with pytest.raises(UserError, match="sliding-window"):
        types = ["sliding_attention", "full_attention"]
        check_config(
            config(
                model_type="qwen3",
                architectures=["Qwen3ForCausalLM"],
                num_hidden_layers=2,
                layer_types=types,
            )
        )
    with pytest.raises(UserError, match="mixture-of-experts"):
        check_config(
            config(model_type="mixtral", architectures=["MixtralForCausalLM"], sliding_window=None)
        )


def test_every_eos_is_known(tiny):
    from transformers import AutoTokenizer

    from generator import eos_tokens

    path = tiny("qwen2", eos=(2, 7))
    assert eos_tokens(path, AutoTokenizer.from_pretrained(path)) == {2, 7}


@pytest.mark.parametrize(
    ("name", "extra", "refusal"),
    [
        ("LlamaForCausalLM", {}, None),
        ("Qwen2ForCausalLM", {}, None),
        ("Qwen3ForCausalLM", {}, None),
        ("GraniteForCausalLM", {"logits_scaling": 1.0}, None),
        ("GraniteForCausalLM", {"logits_scaling": 8.0}, "scaled by logits_scaling"),
        ("CohereForCausalLM", {}, "scaled by logit_scale"),
        ("PhiForCausalLM", {}, "head without bias"),
        ("GPTNeoXForCausalLM", {}, "lm.model.layers"),
        ("OPTForCausalLM", {}, "lm.model.layers"),
        ("GPT2LMHeadModel", {}, "not a causal language model"),
        ("StableLmForCausalLM", {}, "take packed rows"),
        ("Gemma2ForCausalLM", {}, "soft-capped"),
        ("MistralForCausalLM", {"sliding_window": 8}, "sliding-window"),
    ],
)
def test_models_whose_maths_is_another_are_refused(tmp_path, name, extra, refusal):
    """As transformers itself builds and names them."""
    import transformers

    shape = dict(vocab_size=28, hidden_size=32, intermediate_size=48, pad_token_id=0)
    shape |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    config = getattr(transformers, name).config_class(**shape, architectures=[name], **extra)
    config.save_pretrained(tmp_path)
    if refusal is None:
        assert check_config(str(tmp_path)).architectures == [name]
        return
    with pytest.raises(UserError, match=refusal) as error:
        check_config(str(tmp_path))
    assert "\n" not in str(error.value)
