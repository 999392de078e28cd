"""Head maps: what is read and refused; every count follows from the visibility rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redknot.errors import HeadMapError
from redknot.heads import HeadMap
from redknot.heads.head_map_checks import CLASS_OF_NAME
from redknot.recovery import LiveSpan, RandomRows
from redknot.recovery.plan import Placement, PromptLayout

TINY = {
    "model": "tiny",
    "num_layers": 3,
    "num_kv_heads": 2,
    "kv_head_classification": [
        ["local_full", "limited"],
        ["sink_dominant", "global"],
        ["retrieval", "dense"],
    ],
    "kv_head_max_distance": [[8, 0], [-1, -1], [7, 7]],
    "kv_head_sink_size": [[1, 2], [3, 4], [5, 6]],
    "retrieval_top_p": 0.75,
    "dense_prefix_layers": 0,
    "notes": {"free": ["text", 1, None]},
}


def write(tmp_path, **changes):
    data = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
    path = tmp_path / "map.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


# --- reading ---------------------------------------------------------------------------------


def test_reads_classes_windows_sinks_and_keeps_metadata(tmp_path):
    heads = HeadMap.from_json(str(write(tmp_path)))
    assert (heads.num_layers, heads.num_kv_heads) == (3, 2)
    assert heads.classes == (("local", "local"), ("local", "global"), ("retrieval", "dense"))
    assert heads.class_names[0] == ("local_full", "limited")
    # A window <= 0 of a local head stands for 512; windows and sinks of other heads are not read.
    assert heads.windows.tolist() == [[8, 512], [512, -1], [-1, -1]]
    assert heads.sinks.tolist() == [[1, 2], [3, 0], [0, 0]]
    assert heads.windows.dtype == heads.sinks.dtype == np.int32
    assert heads.is_global.tolist() == [[False, False], [False, True], [True, True]]
    assert heads.global_fraction == 0.5
    assert (heads.first_global_layer, heads.last_global_layer) == (1, 2)
    assert heads.retrieval_top_p == 0.75
    assert heads.metadata == {"model": "tiny", "notes": {"free": ["text", 1, None]}}


def test_defaults_of_a_file(tmp_path):
    heads = HeadMap.from_json(
        write(
            tmp_path,
            kv_head_max_distance=None,
            kv_head_sink_size=None,
            retrieval_top_p=None,
            dense_prefix_layers=None,
        )
    )
    assert heads.windows[0].tolist() == [512, 512]
    assert heads.sinks[0].tolist() == [4, 4]
    assert (heads.retrieval_top_p, heads.dense_prefix_layers) == (0.9, 0)
    scalar = HeadMap.from_json(
        write(tmp_path, kv_head_max_distance=None, kv_head_sink_size=None, window=64, sink_size=2)
    )
    assert scalar.windows[0].tolist() == [64, 64]
    assert scalar.sinks[0].tolist() == [2, 2]
    # The matrix is trusted, not the scalar beside it.
    assert HeadMap.from_json(write(tmp_path, window=64)).windows[0].tolist() == [8, 512]


def test_dense_prefix_layers_are_global_but_keep_their_names(tmp_path):
    heads = HeadMap.from_json(write(tmp_path, dense_prefix_layers=1))
    assert heads.is_global[0].all() and heads.windows[0].tolist() == [-1, -1]
    assert heads.sinks[0].tolist() == [0, 0]
    assert heads.classes[0] == ("local", "local")
    assert HeadMap.from_json(write(tmp_path, **heads.to_json())) == heads


def test_duo_attention(tmp_path):
    scores = np.array([[0.9, 0.1], [0.5, 0.3], [0.0, 1.0]])
    np.savetxt(tmp_path / "full_attention_heads.tsv", scores, delimiter="\t")
    config = {"sink_size": 64, "recent_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    heads = HeadMap.from_duo_attention(tmp_path)
    assert heads.is_global.tolist() == [[True, False], [True, False], [False, True]]
    assert (heads.windows[0, 1], heads.sinks[0, 1]) == (256, 64)
    assert heads.metadata == {"duo_attention_config": config}
    assert HeadMap.from_duo_attention(tmp_path, threshold=0.95).is_global.sum() == 1
    sparse = HeadMap.from_duo_attention(tmp_path, sparsity=0.5)
    assert sparse.is_global.tolist() == [[True, False], [True, False], [False, True]]
    assert HeadMap.from_duo_attention(tmp_path, sparsity=1.0).global_fraction == 0
    with pytest.raises(HeadMapError, match="either threshold or sparsity"):
        HeadMap.from_duo_attention(tmp_path, threshold=0.5, sparsity=0.5)
    with pytest.raises(HeadMapError, match="sparsity must be between 0 and 1, got 2"):
        HeadMap.from_duo_attention(tmp_path, sparsity=2)
    (tmp_path / "config.json").write_text('{"sink_size": 64}')
    with pytest.raises(HeadMapError, match="recent_size is missing"):
        HeadMap.from_duo_attention(tmp_path)
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\tx\n")
    with pytest.raises(HeadMapError, match="cannot read a table"):
        HeadMap.from_duo_attention(tmp_path)
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\tnan\n")
    with pytest.raises(HeadMapError, match="finite score"):
        HeadMap.from_duo_attention(tmp_path)


# --- refusing --------------------------------------------------------------------------------

BAD_FILES = {
    "unknown class": (
        {"kv_head_classification": [["local", "local"], ["local", "globl"], ["local"] * 2]},
        r"layer 1, head 1: unknown class 'globl'; known are global, dense",
    ),
    "class is no string": (
        {"kv_head_classification": [["local", 3], ["local"] * 2, ["local"] * 2]},
        "layer 0, head 1: unknown class 3",
    ),
    "ragged": (
        {"kv_head_classification": [["local", "local"], ["local"], ["local"] * 2]},
        "layer 1 has 1 head classes, layer 0 has 2",
    ),
    "no heads": ({"kv_head_classification": [[], [], []]}, "layer 0 has 0 head classes"),
    "no layers": ({"kv_head_classification": []}, "non-empty list"),
    "no lists": ({"kv_head_classification": ["local", "local", "local"]}, "non-empty list"),
    "missing": ({"kv_head_classification": None}, "kv_head_classification is missing"),
    "layer count": ({"num_layers": 4}, "num_layers is 4, but kv_head_classification has 3"),
    "head count": ({"num_kv_heads": 8}, "num_kv_heads is 8, but kv_head_classification has 2"),
    "window layers": ({"kv_head_max_distance": [[1, 1]]}, "window has 1 layers, classes has 3"),
    "window heads": (
        {"kv_head_max_distance": [[1, 1], [1], [1, 1]]},
        "window, layer 1: needs 2 values, got 1 values",
    ),
    "window no row": ({"kv_head_max_distance": [1, [1, 1], [1, 1]]}, "window, layer 0: needs 2"),
    "window fraction": (
        {"kv_head_max_distance": [[8, 8.5], [1, 1], [1, 1]]},
        "layer 0, head 1: window must be an integer >= 1, got 8.5",
    ),
    "window bool": (
        {"kv_head_max_distance": [[8, True], [1, 1], [1, 1]]},
        "layer 0, head 1: window must be an integer >= 1, got True",
    ),
    "window huge": (
        {"kv_head_max_distance": [[8, 2**31], [1, 1], [1, 1]]},
        "layer 0, head 1: window must be an integer",
    ),
    "sink negative": (
        {"kv_head_sink_size": [[1, -2], [3, 4], [5, 6]]},
        "layer 0, head 1: sink must be an integer >= 0, got -2",
    ),
    "top_p": ({"retrieval_top_p": 1.5}, r"retrieval_top_p must be in \(0, 1\], got 1.5"),
    "prefix": ({"dense_prefix_layers": 4}, "dense_prefix_layers must be between 0 and 3, got 4"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, name):
    changes, message = BAD_FILES[name]
    path = write(tmp_path, **changes)
    with pytest.raises(HeadMapError, match=message) as error:
        HeadMap.from_json(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not JSON"), (b"[1]", "must hold a JSON object"), (b"\xff\xfe", "not UTF-8")],
)
def test_an_unreadable_file_is_refused(tmp_path, content, message):
    path = tmp_path / "map.json"
    path.write_bytes(content)
    with pytest.raises(HeadMapError, match=message):
        HeadMap.from_json(path)
    with pytest.raises(HeadMapError, match="cannot read it: No such file"):
        HeadMap.from_json(tmp_path / "absent.json")


def test_constructor_refuses():
    with pytest.raises(HeadMapError, match="layer 0, head 0: window must be an integer >= 1"):
        HeadMap([["local"]], window=0)
    with pytest.raises(HeadMapError, match="metadata cannot have the key 'window'"):
        HeadMap([["local"]], metadata={"window": 3})
    with pytest.raises(HeadMapError, match="what JSON can hold"):
        HeadMap([["local"]], metadata={"x": object()})


def test_a_map_of_another_model_is_refused():
    heads = HeadMap([["local"] * 2] * 3, metadata={"model_fingerprint": "aa"})
    heads.check_model(3, 2)
    heads.check_model(3, 2, "aa")
    with pytest.raises(HeadMapError, match="for 3 layers of 2 KV heads, but the model has 4 "):
        heads.check_model(4, 2)
    with pytest.raises(HeadMapError, match="model_fingerprint is aa, this model's is bb"):
        heads.check_model(3, 2, "bb")
    HeadMap([["local"]]).check_model(1, 1, "bb")


# --- rules, slices ---------------------------------------------------------------------------


def test_rules_fold_in_the_native_sliding_window():
    heads = HeadMap([["global", "local", "local"]] * 3, window=[[1, 8, 16]] * 3, sink=2)
    windows, sinks = heads.rules([None, 16, 4])
    assert windows.tolist() == [[-1, 8, 16], [16, 8, 16], [4, 4, 4]]
    assert sinks.tolist() == [[0, 2, 2], [0, 2, 0], [0, 0, 0]]
    assert windows.dtype == sinks.dtype == np.int32
    plain = heads.rules()
    assert (plain[0] == heads.windows).all() and (plain[1] == heads.sinks).all()
    with pytest.raises(HeadMapError, match="3 layers, but sliding windows of 2 layers"):
        heads.rules([None, 4])


def test_arrays_are_immutable():
    heads = HeadMap.all_local(2, 2)
    for array in (heads.windows, heads.sinks, heads.is_global):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
    heads.metadata["new"] = 1
    assert heads.metadata == {}
    windows, _ = heads.rules()
    windows[0, 0] = 1
    assert heads.windows[0, 0] == 512


def test_slices_for_tensor_parallel():
    heads = HeadMap(
        [["global", "local_full", "local", "dense"]] * 2, window=[[1, 2, 3, 4]] * 2, sink=1
    )
    left, right = heads.slice_heads(0, 2), heads.slice_heads(1, 2)
    assert left.class_names[0] == ("global", "local_full") and left.windows[0].tolist() == [-1, 2]
    assert right.class_names[1] == ("local", "dense") and right.windows[0].tolist() == [3, -1]
    assert heads.slice_heads(0, 1) == heads
    replicated = [heads.slice_heads(rank, 8).class_names[0][0] for rank in range(8)]
    assert replicated == ["global"] * 2 + ["local_full"] * 2 + ["local"] * 2 + ["dense"] * 2
    assert heads.slice([3, 0]).class_names[0] == ("dense", "global")
    kl = {"kv_head_kl": [[3, 0, 2]]}
    measured = HeadMap([["global", "local", "dense"]], window=4, metadata=kl)
    assert measured.slice([2, 0]).sensitivity.tolist() == [[2, 3]]
    assert heads.slice(slice(1, 3)).windows[0].tolist() == [2, 3]
    with pytest.raises(HeadMapError, match="4 KV heads cannot be split over 3 ranks"):
        heads.slice_heads(0, 3)
    with pytest.raises(HeadMapError, match="rank must be between 0 and 1, got 2"):
        heads.slice_heads(2, 2)
    with pytest.raises(HeadMapError, match="head 7"):
        heads.slice([7])
    with pytest.raises(HeadMapError, match="at least one KV head"):
        heads.slice([])


def test_ranks_plan_the_same_rows_in_the_same_layers():
    """A rank's own first and last global layer may be others: each plans by the whole map."""
    classes = [["local"] * 4 for _ in range(5)]
    classes[1][0] = classes[1][1] = classes[3][3] = "global"
    kl = [[0.0] * 4, [4.0, 1.0, 0.0, 0.0], [0.0] * 4, [0.0, 0.0, 0.0, 3.0], [0.0] * 4]
    heads = HeadMap(classes, window=8, sink=2, metadata={"kv_head_kl": kl})
    halves = [heads.slice_heads(rank, 2) for rank in range(2)]
    quarters = [half.slice_heads(rank, 2) for half in halves for rank in range(2)]
    assert quarters == [heads.slice_heads(rank, 4) for rank in range(4)]
    layout = PromptLayout(1, (Placement(1, 41, 0, True), Placement(41, 81, 40, False)), 81, 90)
    for policy in (LiveSpan(), LiveSpan(first_layer=3), RandomRows()):
        plan = policy.plan(layout, heads)
        for own in halves + quarters:
            assert policy.entry_layer(own) == policy.entry_layer(heads)
            for mine, whole in zip(policy.plan(layout, own).layers, plan.layers, strict=True):
                assert (mine.pick is None) == (whole.pick is None)
                for rows in ("live", "fresh", "fresh_local"):
                    assert np.array_equal(getattr(mine, rows), getattr(whole, rows))
    # Of the two global heads of layer 1 the weak one picks no rows, whoever holds it.
    picks = [LiveSpan().plan(layout, own).layers[1].pick for own in quarters]
    assert [pick.heads for pick in picks] == [None, (), None, None]


# --- counting --------------------------------------------------------------------------------


def visible(j, i, window, sink):
    return j <= i and (window < 0 or j < sink or j > i - window)


@settings(max_examples=60, deadline=None)
@example(context=1, window=1, sink=0, page_size=2, native=None)  # the next token sees itself alone
@given(
    context=st.integers(0, 40),
    window=st.integers(1, 45),
    sink=st.integers(0, 45),
    page_size=st.integers(1, 9),
    native=st.none() | st.integers(1, 45),
)
def test_counts_follow_from_the_visibility_rule(context, window, sink, page_size, native):
    heads = HeadMap([["global", "local"]], window=window, sink=sink)
    windows, sinks = heads.rules([native])
    pairs = heads.attention_pairs(context, [native])
    kept = pages = 0
    for head in range(2):
        rule = (int(windows[0, head]), int(sinks[0, head]))
        expected = sum(visible(j, i, *rule) for i in range(context) for j in range(i + 1))
        assert pairs[0, head] == expected
        # What a session holds: every page with a token that the next token can still see.
        held = {j // page_size for j in range(context) if visible(j, context, *rule)}
        pages += len(held)
        kept += context if rule[0] < 0 else min(context, sum(rule))
    cost = {"head_dim": 8, "bytes_per_element": 2, "sliding_windows": [native]}
    assert heads.kv_bytes(context, **cost) == 2 * 8 * 2 * kept
    assert heads.kv_bytes(context, page_size=page_size, **cost) == 2 * 8 * 2 * page_size * pages


def test_the_published_ceiling():
    """Fraction .15 global, window 256: 6.3x fewer bytes at 32K."""
    classes = np.where(np.arange(100).reshape(10, 10) < 15, "global", "local").tolist()
    heads = HeadMap(classes, window=256, sink=4)
    cost = {"head_dim": 128, "bytes_per_element": 2}
    ratio = heads.kv_bytes_full(32768, **cost) / heads.kv_bytes(32768, **cost)
    assert ratio == pytest.approx(1 / (0.15 + 0.85 * 260 / 32768))
    assert round(ratio, 1) == 6.4
    assert heads.kv_bytes_full(100, page_size=64, **cost) == 100 * 128 * 2 * 128 * 2


# --- round trip, text ------------------------------------------------------------------------


@st.composite
def head_maps(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))

    def matrix(element):
        return [[draw(element) for _ in range(shape[1])] for _ in range(shape[0])]

    one_of = st.booleans()
    return HeadMap(
        matrix(st.sampled_from(sorted(CLASS_OF_NAME))),
        window=matrix(st.integers(1, 9999)) if draw(one_of) else draw(st.integers(1, 9999)),
        sink=matrix(st.integers(0, 99)) if draw(one_of) else draw(st.integers(0, 99)),
        retrieval_top_p=draw(st.floats(0.01, 1)),
        dense_prefix_layers=draw(st.integers(0, shape[0])),
        metadata=draw(
            st.dictionaries(st.sampled_from(["model", "a", "é"]), st.none() | st.text(max_size=9))
        ),
    )


@settings(max_examples=60, deadline=None)
@given(heads=head_maps())
def test_round_trip_through_a_file(tmp_path_factory, heads):
    path = tmp_path_factory.mktemp("maps") / "map.json"
    written = heads.to_json(path)
    again = HeadMap.from_json(path)
    assert again == heads
    assert again.class_names == heads.class_names and again.metadata == heads.metadata
    assert (again.windows == heads.windows).all() and (again.sinks == heads.sinks).all()
    assert json.loads(path.read_text(encoding="utf-8")) == written
    assert str(again) == str(heads)
    json.dumps(heads.summary())


def test_equality_sees_every_field():
    base = HeadMap([["local", "global"]])
    for other in (
        HeadMap([["local", "dense"]]),
        HeadMap([["limited", "global"]]),
        HeadMap([["local", "global"]], window=1),
        HeadMap([["local", "global"]], sink=1),
        HeadMap([["local", "global"]], retrieval_top_p=0.5),
        HeadMap([["local", "global"]], dense_prefix_layers=1),
        HeadMap([["local", "global"]], metadata={"a": 1}),
        "no map",
    ):
        assert base != other
    assert base == HeadMap([["local", "global"]])


def test_text_groups_equal_layers():
    heads = HeadMap([["local", "local"]] * 3 + [["global", "retrieval"]], dense_prefix_layers=1)
    text = str(heads)
    assert "4 layers x 2 KV heads: 1 global, 1 retrieval, 6 local" in text
    assert "50.0% keep the whole context, in layers 0 to 3" in text
    assert [line.split() for line in text.splitlines()[-3:]] == [
        ["0", "DD"],
        ["1-2", ".."],
        ["3", "GR"],
    ]
    assert "no head keeps the whole context" in str(HeadMap.all_local(2, 2))
    assert "local heads" not in str(HeadMap.all_global(2, 2))
    assert repr(heads) == "HeadMap(4 layers x 2 KV heads, 50.0% global)"
    assert HeadMap.all_local(1, 1).summary()["first_global_layer"] is None
