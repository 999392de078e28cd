"""Profiling: measurements against an oracle or the engine, and maps made from what was found."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models import GEMMA2, LLAMA3, YARN, random_tokens, tiny_model

from redknot import Engine, HeadMap, HeadMapError, HeadProfile, InputError, RedKnot, profile_heads
from redknot.eval.arrivals import make_prompt
from redknot.eval.demo import DEMO_MODEL
from redknot.eval.profiling import agreement, attention_mass, distance_grid
from redknot.eval.profiling.calibration import Ask, Sample
from redknot.eval.profiling.head_profile import ModelFacts, Rung
from redknot.eval.profiling.run import LayerRules, SampleRun
from redknot.models import Decoder, load_model, load_tokenizer
from redknot.recovery import ModelShape

# --- attention mass -------------------------------------------------------------------------------


def mass_oracle(q, k, positions, windows, sink, scale, softcap, native, page_size, top_p):
    """The same from whole matrices in double precision, one number at a time."""
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    covered, shares = torch.zeros(heads, len(windows)), torch.zeros(heads)
    for head in range(heads):
        for row in range(rows):
            i = int(positions[row])
            low = max(0, i - native + 1) if native >= 0 else 0
            scores = torch.full((i + 1,), -torch.inf, dtype=torch.float64)
            scores[low:] = k[low : i + 1, head // group].double() @ q[row, head].double() * scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
                scores[:low] = -torch.inf
            mass = scores.softmax(0)
            for column, window in enumerate(windows):
                inside = [j for j in range(i + 1) if j < sink or j > i - window]
                covered[head, column] += mass[inside].sum()
            pages = [float(part.sum()) for part in mass.split(page_size)]
            held = needed = 0
            for part in sorted(pages, reverse=True):
                if held >= top_p:
                    break
                held, needed = held + part, needed + 1
            shares[head] += needed / len(pages)
    return covered, shares


@pytest.mark.parametrize(
    ("native", "sink", "softcap"), [(-1, 4, 0.0), (-1, 0, 0.0), (9, 2, 0.0), (9, 2, 1.5)]
)
def test_attention_mass_is_that_of_the_whole_matrix(monkeypatch, native, sink, softcap):
    from redknot.eval.profiling import mass as module

    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 2 * 50 * 3)  # three rows at a time
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(11, 4, 16, generator=generator)
    k = torch.randn(50, 2, 16, generator=generator)
    positions = torch.tensor([0, 1, 3, 7, 8, 20, 21, 30, 41, 48, 49])
    windows = distance_grid(50)
    got = attention_mass(
        q, k, positions, torch.tensor(windows), sink=sink, softmax_scale=0.25, softcap=softcap,
        native_window=native, page_size=8,
    )  # fmt: skip
    covered, shares = mass_oracle(q, k, positions, windows, sink, 0.25, softcap, native, 8, 0.9)
    torch.testing.assert_close(got.covered.float(), covered, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.page_share.float(), shares, rtol=1e-5, atol=1e-5)
    assert got.covered[:, -1].tolist() == pytest.approx([11.0] * 4)


def test_the_grid_of_windows_ends_at_the_longest_prompt():
    assert distance_grid(1) == [1]
    assert distance_grid(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]


# --- runs under a map -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": 40}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {}),
        ("gemma2", GEMMA2),
    ],
)
def test_a_run_under_a_map_is_what_the_engine_computes(family, options):
    """RedKnot as published, for several questions at once and from any layer on."""
    model = tiny_model(family, 4, 2, **options)
    rng = np.random.default_rng(0)
    prefix, *documents = (np.array(random_tokens(rng, n)) for n in (5, 70, 33, 81))
    questions = [np.array(random_tokens(rng, n)) for n in (9, 4)]
    heads = HeadMap([["local", "global"], ["global", "local"], ["local", "local"]], window=16)
    sample = Sample(prefix, tuple(documents), tuple(Ask(q, np.array([7])) for q in questions))
    run = SampleRun(Decoder(model), sample)
    run.cache_documents()
    rules = LayerRules.of(heads, run.decoder)
    got = run.decoder.logits(run.run(rules))
    dense = {step.layer: step.hidden for step in run.dense_layers()}
    engine = Engine(model, heads, prefix=prefix, kv_budget="16MiB", page_size=16)
    ids = [engine.add(document) for document in documents]
    for row, question in zip(got, questions, strict=True):
        want = engine.prefill(ids, question, policy=RedKnot()).logits
        torch.testing.assert_close(row, want, rtol=1e-3, atol=1e-3)
    # The last layer alone under the map, from the dense hidden states.
    late = HeadMap([["global"] * 2] * 2 + [["local"] * 2], window=16)
    rules = LayerRules.of(late, run.decoder)
    torch.testing.assert_close(run.run(rules, dense[2], 2), run.run(rules), rtol=1e-4, atol=1e-4)


# --- the demo model -------------------------------------------------------------------------------


SEEDS = (100_000, 100_001)


def demo_rows(seeds, context, questions):
    for seed in seeds:
        prompt = make_prompt(seed, context, questions)
        for question in prompt.questions:
            yield {
                "documents": list(prompt.documents),
                "question": question.text,
                "answer": question.answer,
            }


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO_MODEL, dtype="float32"), load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def profile(demo):
    return profile_heads(*demo, demo_rows(SEEDS, 400, 8), window=32, mass_rows=64)


def test_the_profile_finds_the_shipped_global_heads(profile):
    shipped = HeadMap.from_json(DEMO_MODEL / "head_map.json")
    needed = shipped.is_global & (shipped.sensitivity > 0.05)  # the others need more questions
    found = profile.classify(global_fraction=0.15)
    assert np.array_equal(found.is_global, needed)
    assert found.metadata["model_fingerprint"] == shipped.metadata["model_fingerprint"]
    # Few heads were measured alone, and every head that matters was.
    assert profile.measured_alone.mean() < 0.5
    assert profile.measured_alone[needed].all()
    assert profile.kl[needed].min() > 50 * profile.kl[~needed].max()


def test_how_far_outputs_shift_does_not_tell_the_heads(profile):
    """Why sensitivity is measured at all: these signals rank the heads of this model wrong."""
    shipped = HeadMap.from_json(DEMO_MODEL / "head_map.json").is_global
    for signal in ("prefix_shift", "local_shift"):
        found = profile.classify(global_fraction=0.15, signal=signal)
        assert (found.is_global & shipped).sum() < shipped.sum()


def test_whole_maps_say_how_many_heads_are_needed(profile):
    counts = [rung.num_global for rung in profile.rungs]
    assert counts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 48]
    assert profile.rungs[-1].kl == 0
    few = profile.classify(max_kl=0.01)
    assert few.is_global.sum() == 5 and few.metadata["measured"]["kl"] <= 0.01
    assert profile.classify(max_loss_points=0).is_global.sum() <= 5
    assert profile.classify(max_loss_points=100).is_global.sum() == 0
    assert profile.classify(max_kl=0).global_fraction == 1


def test_the_map_loads_in_the_engine_and_answers(profile, demo, tmp_path):
    path = tmp_path / "heads.json"
    profile.classify(global_fraction=0.15).to_json(path)
    engine = Engine(demo[0], path, tokenizer=demo[1], kv_budget="64MiB", page_size=16)
    prompt = make_prompt(100_005, 600, 8)
    ids = [engine.add(document) for document in prompt.documents]
    answers = [engine.generate(ids, q.text, max_new_tokens=1).text for q in prompt.questions]
    right = sum(a.strip() == q.answer for a, q in zip(answers, prompt.questions, strict=True))
    assert right >= len(prompt.questions) - 1


def test_each_head_alone_gives_the_same_divergence(profile, demo):
    """The grouped measurement of a head alone is the exact one, to the arithmetic's noise."""
    rows = demo_rows(SEEDS[:1], 400, 8)
    alone = profile_heads(*demo, rows, window=32, mass_rows=8, method="alone", run_maps=False)
    assert alone.measured_alone.all() and alone.rungs == []
    measured, first = profile.measured_alone, profile.kl_by_set[0]
    np.testing.assert_allclose(first[measured], alone.kl[measured], rtol=1e-3, atol=1e-5)
    assert alone.kl[~measured].max() < profile.min_kl
    assert alone.stability(5) is None  # of one sample there is no half


def test_a_stopped_profile_goes_on_where_it_was(profile, demo, tmp_path, monkeypatch):
    state = tmp_path / "profile.state"

    def stop_at(phase, done, total):
        if phase == "sensitivity, round 2" and done == 3:
            raise KeyboardInterrupt

    def again(seeds=SEEDS, **options):
        settings = {"window": 32, "mass_rows": 64, "state": state, "resume": True, **options}
        return profile_heads(*demo, demo_rows(seeds, 400, 8), **settings)

    with pytest.raises(KeyboardInterrupt):
        again(progress=stop_at)
    measured = sum(map(len, json.loads(state.read_text())["groups"].values()))
    assert measured == 2 * 6 + 3
    with pytest.raises(InputError, match="cannot resume: window was 32, now it is 16"):
        again(window=16)
    with pytest.raises(InputError, match="cannot resume: calibration was"):
        again(seeds=(100_002,))
    runs, totals = [], {}
    compare = SampleRun.compare
    monkeypatch.setattr(SampleRun, "compare", lambda *a: runs.append(1) or compare(*a))
    resumed = again(progress=lambda phase, done, total: totals.update({phase: total}))
    assert len(runs) == sum(totals.values()) - totals["signals"] - measured
    assert not state.exists()
    np.testing.assert_allclose(resumed.kl, profile.kl, atol=1e-5)
    np.testing.assert_allclose(resumed.covered, profile.covered, atol=1e-6)
    state.write_text("{")
    with pytest.raises(InputError, match="no state of a profile"):
        again()


def test_a_map_of_another_model_is_refused(profile, demo):
    heads = profile.classify(global_fraction=0.15)
    other = load_model(DEMO_MODEL, dtype="float32")
    with torch.no_grad():
        other.model.embed_tokens.weight += 0.1
    with pytest.raises(HeadMapError, match="measured on another model"):
        Engine(other, heads, kv_budget="16MiB")


def test_a_profile_survives_its_file(profile, tmp_path):
    path = tmp_path / "profile.json"
    profile.to_json(path)
    read = HeadProfile.from_json(path)
    assert read.model == profile.model and read.rungs == profile.rungs
    criteria = {"global_fraction": 0.15, "retrieval_share": 0.3}
    assert read.classify(**criteria).classes == profile.classify(**criteria).classes
    np.testing.assert_allclose(read.covered, profile.covered, atol=1e-6)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(HeadMapError, match="no profile of this version"):
        HeadProfile.from_json(tmp_path / "other.json")


# --- classification, on numbers made up -----------------------------------------------------------


def made_up(**changes):
    """4 layers of 2 KV heads and 4 query heads; KL falls from 0.8 (0.0) to 0.1 (3.1)."""
    shape = ModelShape(4, 4, 2, 16, 64, 160, 50)
    windows = [1, 8, 32, 128, 512]
    covered = np.ones((4, 4, 5))
    covered[..., 0], covered[..., 1], covered[..., 2] = 0.1, 0.8, 0.96
    covered[0, 1, 2] = 0.5  # of KV head 0.0, one query head looks farther
    kl = np.arange(8, 0, -1).reshape(4, 2) / 10
    values = {
        "model": ModelFacts("made up", "ab" * 32, shape, 2, [None] * 4),
        "calibration": {"context_tokens": 512},
        "windows": windows,
        "sink": 4,
        "window": 64,
        "coverage": 0.95,
        "min_kl": 0.25,
        "covered": covered,
        "prefix_shift": np.zeros((4, 4)),
        "local_shift": np.arange(16).reshape(4, 4) / 16,
        "page_share": np.full((4, 4), 0.5),
        "kl": kl,
        "kl_by_set": np.stack([kl, kl[::-1]]),
        "measured_alone": np.ones((4, 2), dtype=bool),
        "rungs": [Rung(0, 0.5, 2.0, 0.4), Rung(2, 0.05, 1.0, 0.79), Rung(8, 0.0, 0.9, 0.8)],
    }
    return HeadProfile(**{**values, **changes})


def global_heads(heads):
    return [tuple(map(int, pair)) for pair in np.argwhere(heads.is_global)]


def test_a_fraction_takes_the_highest_heads_above_the_noise():
    profile = made_up()
    assert global_heads(profile.classify(global_fraction=0.25)) == [(0, 0), (0, 1)]
    assert profile.classify(global_fraction=1).is_global.sum() == 6  # 0.2 and 0.1 are noise
    assert profile.classify(global_fraction=1, min_kl=0).global_fraction == 1
    by_shift = profile.classify(global_fraction=0.25, signal="local_shift")
    assert global_heads(by_shift) == [(3, 0), (3, 1)]


def test_floors_come_first():
    heads = made_up().classify(global_fraction=0.625, layer_floor=1)
    assert global_heads(heads) == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]


def test_windows_follow_the_curve_up_to_the_measured_one():
    heads = made_up().classify(global_fraction=0)
    assert heads.windows.tolist() == [[64, 32], [32, 32], [32, 32], [32, 32]]
    assert made_up().classify(global_fraction=0, coverage=0.7).windows[0, 1] == 16  # the floor
    assert (made_up().classify(global_fraction=0, coverage=1).windows == 64).all()
    assert (heads.sinks == 4).all()


def test_budgets_hold_as_many_heads_as_they_can():
    profile = made_up(min_kl=0.0)

    def held(heads):
        return heads.kv_bytes(2048, head_dim=16, bytes_per_element=2)

    heads = profile.classify(kv_bytes=500_000, context=2048)
    more = profile.head_map(int(heads.is_global.sum()) + 1)
    assert held(heads) <= 500_000 < held(more)
    with pytest.raises(HeadMapError, match=r"kv_bytes of 9 is too little: all heads local already"):
        profile.classify(kv_bytes=9)
    counts = [
        int(profile.classify(flops=flops, context=2048).is_global.sum())
        for flops in (1.2e9, 1.6e9, 1e12)
    ]
    assert counts[0] < counts[1] < counts[2] == 8


def test_heads_that_find_their_mass_in_few_pages_retrieve():
    shares = np.full((4, 4), 0.5)
    shares[0, :2] = 0.1
    heads = made_up(page_share=shares).classify(
        global_fraction=0.25, retrieval_share=0.2, retrieval_top_p=0.8
    )
    assert heads.classes[0] == ("retrieval", "global") and heads.retrieval_top_p == 0.8
    assert heads.is_global.sum() == 2


def test_stability_compares_the_halves():
    alike = made_up().stability(2)
    assert alike == {"global_heads_in_common": 0.0, "heads_alike": 0.5}
    assert made_up(kl_by_set=None).stability(2) is None
    same = HeadMap.all_local(4, 2)
    assert agreement(same, same) == {"global_heads_in_common": 1.0, "heads_alike": 1.0}
    with pytest.raises(HeadMapError, match="cannot be compared"):
        agreement(same, HeadMap.all_local(2, 2))


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ({}, "give exactly one of .*; got none"),
        ({"max_kl": 1, "flops": 1}, "got max_kl, flops"),
        ({"global_fraction": 1.5}, r"global_fraction must be in \[0, 1\], got 1.5"),
        ({"max_kl": -1}, "max_kl must be >= 0, got -1"),
        ({"max_kl": 1, "layer_floor": 1}, "none was with another signal, coverage or layer_floor"),
        ({"global_fraction": 0.1, "layer_floor": 3}, "layer_floor must be between 0 and 2"),
        ({"global_fraction": 0.1, "coverage": 0}, r"coverage must be in \(0, 1\]"),
        ({"global_fraction": 0.1, "signal": "luck"}, "signal must be kl, local_shift"),
    ],
)
def test_criteria_that_make_no_sense_are_refused(criteria, message):
    with pytest.raises(HeadMapError, match=message):
        made_up().classify(**criteria)
    with pytest.raises(HeadMapError, match="none was at all"):
        made_up(rungs=[]).classify(max_kl=1)


# --- calibration ----------------------------------------------------------------------------------


def test_plain_texts_are_cut_and_only_signals_can_be_measured(demo):
    prompt = make_prompt(100_009, 900, 1)
    found = profile_heads(
        *demo, ["\n".join(prompt.documents)], context_tokens=256, answer_tokens=16,
        method="signals", mass_rows=16,
    )  # fmt: skip
    assert found.calibration["samples"] == 2 and found.calibration["answer_tokens"] == 32
    assert found.window == 16 and found.kl is None and found.rungs == []
    heads = found.classify(global_fraction=0.25)
    assert heads.is_global.sum() == 12 and "kv_head_kl" not in heads.metadata


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there is no text to calibrate on"),
        (["Ulla lands 21:00 ."], {"context_tokens": 64}, "too short to calibrate on"),
        (["a"], {"document_tokens": 90, "context_tokens": 99}, "holds fewer than two documents"),
        ([{"documents": ["a"], "answer": "b"}], {}, "question is missing"),
        ([{"documents": "a", "question": "b", "answer": "c"}], {}, "must be a list"),
        ([{"documents": ["a"], "question": "b", "answer": ""}], {}, "the answer is empty"),
        (["a"], {"method": "luck"}, "method must be one of grouped, alone, signals"),
        (["a " * 9000], {"context_tokens": 8192}, "more than the model's context of 8192"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(demo, texts, options, message):
    with pytest.raises(InputError, match=message):
        profile_heads(*demo, texts, **options)
