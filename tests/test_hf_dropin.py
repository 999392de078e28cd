"""attach: a stock Hugging Face model under a head map, and back."""

from __future__ import annotations

import pytest
import torch
from hf_tiny import (
    FAMILIES,
    GROUPS,
    NUM_LAYERS,
    assert_close,
    assert_greedy,
    greedy,
    native_rules,
    prompt,
    reference_rules,
    tiny_model,
)
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from redknot import ops
from redknot.errors import HeadMapError, InputError, ModelError
from redknot.heads import HeadMap
from redknot.models.attach import attach, detach
from redknot.models.hf_compat import register_attention
from redknot.models.seg_paged_cache import SegPagedCache
from redknot.models.sparse_ffn import SparseFFN

pytestmark = pytest.mark.transformers

CASES = [(family, group) for family in FAMILIES for group in GROUPS]


def every_head_global(model):
    return HeadMap.all_global(NUM_LAYERS, model.config.num_key_value_heads)


def mixed_heads(model, window=11, sink=3):
    """Local heads with windows of their own, and a global one in the middle layer."""
    num_heads = model.config.num_key_value_heads
    classes = [["local"] * num_heads for _ in range(NUM_LAYERS)]
    classes[1][0] = "global"
    windows = [[window + layer + 5 * head for head in range(num_heads)] for layer in range(3)]
    return HeadMap(classes, window=windows, sink=sink)


@pytest.fixture
def attention_calls(monkeypatch):
    """Counts calls of the op, and makes every other attention of torch an error."""
    calls = []
    op = ops.seg_paged_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape[0])
        return op(*args, **kwargs)

    def forbidden(*_, **__):
        raise AssertionError("dense attention was called")

    monkeypatch.setattr(ops, "seg_paged_attention", counted)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", forbidden)
    return calls


# --- exact mode ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "group"), CASES)
@torch.no_grad()
def test_all_global_equals_the_stock_model(family, group):
    model = tiny_model(family, group)
    ids = prompt(2, 45)
    logits, tokens = model(ids).logits, greedy(model, ids, 24)
    with attach(model, every_head_global(model), page_size=16):
        output = model(ids)
        assert isinstance(output.past_key_values, SegPagedCache)
        assert_close(output.logits, logits)
        assert_close(model(ids, use_cache=False).logits, logits)
        assert_close(model(ids, past_key_values=DynamicCache(config=model.config)).logits, logits)
        assert torch.equal(greedy(model, ids, 24), tokens)
        assert torch.equal(greedy(model, ids, 4, use_cache=False), tokens[:, :49])
        cache = DynamicCache(config=model.config)
        assert torch.equal(greedy(model, ids, 24, past_key_values=cache), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bf16_error_is_no_worse_than_twice_the_stock_models(family):
    ids = prompt(2, 45)
    exact = tiny_model(family)(ids).logits
    model = tiny_model(family, dtype=torch.bfloat16)
    stock = (model(ids).logits.float() - exact).abs().max()
    with attach(model, every_head_global(model)):
        ours = (model(ids).logits.float() - exact).abs().max()
    assert ours <= 2 * stock


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding_changes_nothing(family):
    model = tiny_model(family)
    ids = prompt(3, 40)
    mask = torch.ones_like(ids)
    for row, pads in enumerate([0, 7, 33]):
        mask[row, :pads] = 0
    logits = model(ids, attention_mask=mask).logits[:, -1]
    tokens = greedy(model, ids, 16, attention_mask=mask)
    with attach(model, every_head_global(model), page_size=16):
        assert_close(model(ids, attention_mask=mask).logits[:, -1], logits)
        assert_close(model(ids, attention_mask=mask, use_cache=False).logits[:, -1], logits)
        assert torch.equal(greedy(model, ids, 16, attention_mask=mask), tokens)
        chunked = greedy(model, ids, 16, attention_mask=mask, prefill_chunk_size=9)
        assert torch.equal(chunked, tokens)
        dynamic = DynamicCache(config=model.config)
        options = {"attention_mask": mask, "past_key_values": dynamic}
        assert torch.equal(greedy(model, ids, 16, **options), tokens)


@torch.no_grad()
def test_rope_scaling_that_scales_the_scores_too():
    """Yarn multiplies cos and sin; cached keys carry it already."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    model = tiny_model("llama", rope_parameters=rope)
    ids = prompt(1, 70)
    logits, tokens = model(ids).logits, greedy(model, ids, 16)
    with attach(model, every_head_global(model)):
        assert_close(model(ids).logits, logits)
        assert torch.equal(greedy(model, ids, 16), tokens)


# --- local heads -----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "group"), CASES)
@torch.no_grad()
def test_local_heads_equal_the_visibility_rule(family, group):
    model = tiny_model(family, group)
    heads = mixed_heads(model)
    windows, sinks = native_rules(heads, model)
    ids = prompt(2, 45)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    with reference_rules(model, windows, sinks):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    exact = greedy(model, ids, 24, attention_mask=mask)
    real = mask.bool()
    with attach(model, heads, page_size=4):
        assert_close(model(ids, attention_mask=mask).logits[real], logits[real])
        uncached = model(ids, attention_mask=mask, use_cache=False).logits
        assert_close(uncached[real], logits[real])
        tokens = greedy(model, ids, 24, attention_mask=mask)
        chunked = greedy(model, ids, 24, attention_mask=mask, prefill_chunk_size=7)
    assert torch.equal(chunked, tokens) and not torch.equal(exact, tokens)
    assert_greedy(model, tokens, 45, (windows, sinks), mask)


@torch.no_grad()
def test_windows_that_cover_everything_are_exact():
    model = tiny_model()
    ids = prompt(1, 30)
    tokens = greedy(model, ids, 10)
    with attach(model, HeadMap.all_local(NUM_LAYERS, 2, window=40, sink=0), page_size=8):
        assert torch.equal(greedy(model, ids, 10), tokens)


# --- no dense fallback -----------------------------------------------------------------------


@torch.no_grad()
def test_every_layer_of_every_step_goes_through_the_op(attention_calls):
    model = tiny_model()
    ids = prompt(2, 20)
    with attach(model, mixed_heads(model)):
        greedy(model, ids, 6)
        assert attention_calls == [40] * NUM_LAYERS + [2] * NUM_LAYERS * 5
        attention_calls.clear()
        model(ids)
        model(ids, use_cache=False)
        model(ids, past_key_values=DynamicCache(config=model.config))
        assert attention_calls == [40] * NUM_LAYERS * 3
        attention_calls.clear()
        greedy(model, ids, 3, num_beams=2)
        assert len(attention_calls) == NUM_LAYERS * 3
    with pytest.raises(AssertionError, match="dense attention was called"):
        model(ids)


# --- generation modes ------------------------------------------------------------------------


@torch.no_grad()
def test_beam_search():
    model = tiny_model()
    ids = prompt(2, 33)
    options = {"num_beams": 4, "num_return_sequences": 2}
    tokens = greedy(model, ids, 20, **options)
    with attach(model, every_head_global(model), page_size=8):
        assert torch.equal(greedy(model, ids, 20, **options), tokens)
    heads = mixed_heads(model)
    with reference_rules(model, *native_rules(heads, model)):
        tokens = greedy(model, ids, 8, use_cache=False, **options)
    with attach(model, heads, page_size=8):
        assert torch.equal(greedy(model, ids, 8, **options), tokens)


@torch.no_grad()
def test_prompt_lookup_takes_tokens_back():
    """Assisted decoding crops; local heads must not have freed what it takes back."""
    model = tiny_model()
    ids = prompt(1, 12).repeat(1, 4)
    heads = mixed_heads(model)
    with attach(model, heads, page_size=4):
        tokens = greedy(model, ids, 30, prompt_lookup_num_tokens=4)
    assert_greedy(model, tokens, 48, native_rules(heads, model))


@torch.no_grad()
def test_sampling_is_the_stock_models():
    model = tiny_model()
    ids = prompt(2, 20)
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 2}
    torch.manual_seed(3)
    tokens = model.generate(ids, **options)
    with attach(model, every_head_global(model)):
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids, **options), tokens)


@torch.no_grad()
def test_a_cache_outlives_a_call_to_generate():
    model = tiny_model()
    heads = mixed_heads(model)
    first, more = prompt(2, 30), prompt(2, 9, seed=5)
    rules = native_rules(heads, model)
    with attach(model, heads, page_size=8):
        cache = SegPagedCache(model.config, heads, page_size=8)
        answer = greedy(model, first, 15, past_key_values=cache)
        # The last token was never fed back.
        assert cache.get_seq_length() == 44
        continued = torch.cat([answer, more], dim=1)
        again = greedy(model, continued, 15, past_key_values=cache)
    assert_greedy(model, answer, 30, rules)
    assert_greedy(model, again, 54, rules)


@torch.no_grad()
def test_without_attach_by_name_and_cache():
    model = tiny_model("mistral")
    ids = prompt(2, 40)
    tokens = greedy(model, ids, 12)
    register_attention()
    model.set_attn_implementation("redknot")
    cache = SegPagedCache(model.config, every_head_global(model))
    assert torch.equal(greedy(model, ids, 12, past_key_values=cache), tokens)
    # An ordinary cache: exact attention, the native sliding window respected.
    assert torch.equal(greedy(model, ids, 12), tokens)
    assert torch.equal(greedy(model, ids, 3, use_cache=False), tokens[:, :43])


# --- attach and detach -----------------------------------------------------------------------


def snapshot(model):
    """Everything about a model that attach could leave changed."""
    modules = {
        name: (id(module), sorted(vars(module)), list(vars(module)["_forward_pre_hooks"]))
        for name, module in model.named_modules()
    }
    return modules, model.config.to_dict(), model.config._attn_implementation, list(vars(model))


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_detach_restores_the_model(before):
    model = tiny_model()
    model.set_attn_implementation(before)
    clean, keys = snapshot(model), list(model.state_dict())
    sparse = SparseFFN(mass=0.3)
    with attach(model, mixed_heads(model), sparse_ffn=sparse):
        assert snapshot(model) != clean
        assert model.config._attn_implementation == "redknot"
        assert list(model.state_dict()) == keys
        with pytest.raises(ModelError, match="attached already"):
            attach(model, mixed_heads(model))
    assert snapshot(model) == clean
    with pytest.raises(ZeroDivisionError), attach(model, mixed_heads(model), sparse_ffn=sparse):
        raise ZeroDivisionError
    assert snapshot(model) == clean
    attach(model, mixed_heads(model))
    detach(model)
    detach(model)  # once is enough, twice is no harm
    assert snapshot(model) == clean
    assert isinstance(model(prompt(1, 4)).past_key_values, DynamicCache)


@torch.no_grad()
def test_a_wrapped_model_is_attached_inside():
    """As adapter libraries wrap one."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = torch.nn.ModuleDict({"model": model})

    model = tiny_model()
    wrapper = Wrapper(model)
    with attach(wrapper, mixed_heads(model)):
        tokens = greedy(model, prompt(1, 40), 8)
    assert_greedy(model, tokens, 40, native_rules(mixed_heads(model), model))
    assert model.config._attn_implementation == "sdpa"


def test_a_refused_attach_changes_nothing():
    model = tiny_model()
    clean = snapshot(model)
    for heads, options, error, message in [
        (HeadMap.all_global(4, 2), {}, HeadMapError, "for 4 layers of 2 KV heads"),
        ("heads.json", {}, InputError, "heads must be a HeadMap, got str"),
        (every_head_global(model), {"page_size": 0}, InputError, "page_size must be"),
        (every_head_global(model), {"prefill_chunk_size": 0}, InputError, "prefill_chunk_size"),
        (every_head_global(model), {"sparse_ffn": 0.5}, InputError, "sparse_ffn must be a Sparse"),
    ]:
        with pytest.raises(error, match=message):
            attach(model, heads, **options)
        assert snapshot(model) == clean
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)).eval()
    with pytest.raises(ModelError, match="GPT2LMHeadModel is no causal language"):
        attach(gpt2, HeadMap.all_global(1, 2))
    with pytest.raises(ModelError, match="no causal language model"):
        attach(model.model, every_head_global(model))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    scaled = tiny_model(rope_parameters=dynamic)
    with pytest.raises(ModelError, match="rope_type 'dynamic'"):
        attach(scaled, every_head_global(scaled))


# --- what is refused -------------------------------------------------------------------------


def test_unsupported_attention_is_refused_by_name():
    model = tiny_model(attention_dropout=0.1)
    ids = prompt(1, 8)
    with attach(model, every_head_global(model)):
        model.train()
        with pytest.raises(ModelError, match="dropout"):
            model(ids)
        model.config.attention_dropout = 0.0
        for block in model.model.layers:
            block.self_attn.attention_dropout = 0.0
        with pytest.raises(ModelError, match="no backward pass"):
            model(ids)
        model.eval()
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        with pytest.raises(ModelError, match=r"custom attention mask of shape \[1, 1, 8, 8\]"):
            model(ids, attention_mask=mask)
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
        with pytest.raises(ModelError, match="packed sequences"):
            model(ids, position_ids=packed, use_cache=False)
        model.model.layers[0].self_attn.is_causal = False
        with pytest.raises(ModelError, match="not causal"):
            model(ids)
        model.model.layers[0].self_attn.is_causal = True
        static = StaticCache(config=model.config, max_cache_len=32)
        with pytest.raises(ModelError, match="static cache"):
            model(ids, past_key_values=static)
        with pytest.raises(ModelError, match="static cache"):
            greedy(model, ids, 4, cache_implementation="static")


def test_a_paged_cache_needs_our_attention():
    model = tiny_model()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        cache = SegPagedCache(model.config, every_head_global(model))
        with pytest.raises(ModelError, match=r"call redknot.register_attention\(\)"):
            model(prompt(1, 8), past_key_values=cache)


def test_training_through_our_attention_is_refused_by_name():
    model = tiny_model()
    with attach(model, every_head_global(model)):
        for use_cache in (True, False):
            logits = model(prompt(1, 8), use_cache=use_cache).logits  # outside of no_grad
            with pytest.raises(NotImplementedError, match="seg_paged_attention has no derivative"):
                logits.sum().backward()


@torch.no_grad()
def test_a_cache_that_dropped_the_sinks_is_refused():
    model = tiny_model("mistral")
    heads = HeadMap.all_local(NUM_LAYERS, 2, window=8, sink=2)
    with (
        attach(model, heads),
        pytest.raises(InputError, match="dropped the first tokens"),
    ):
        greedy(model, prompt(1, 40), 4, past_key_values=DynamicCache(config=model.config))
