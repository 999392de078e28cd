"""The Python face of the allocator: types, shapes, errors, poison, and its stub."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redknot import _memory
from redknot._memory import OutOfPages, SegmentAllocator

NUM_LAYERS, NUM_HEADS = 2, 2


def make(num_pages: int = 64, **options: Any) -> SegmentAllocator:
    return SegmentAllocator(NUM_LAYERS, NUM_HEADS, num_pages, 4, 128, **options)


def start_session(allocator: SegmentAllocator, window: int = 5, sink: int = 1) -> int:
    return allocator.create_session([[-1, window]] * NUM_LAYERS, np.full((NUM_LAYERS, 2), sink))


def test_arrays_have_the_stated_types_and_own_their_memory() -> None:
    a = make()
    segment = a.create_segment(6, 0)
    session = start_session(a)
    a.append_segment(session, segment)
    copies = a.append_tokens([session], [3])
    written = a.make_writable(session, [(np.ones((NUM_LAYERS, NUM_HEADS), bool), [1, 2])])
    row_indptr, page_refs = a.rows([session, session], 1)
    for array, dtype, shape in [
        (a.segment_slots(segment, 0), np.int64, (6, NUM_HEADS)),
        (a.tail_slots(session, 0, 3), np.int64, (3, NUM_HEADS)),
        (a.tail_slots(session, 0, 0), np.int64, (0, NUM_HEADS)),
        (a.position_slots(session, 0, [0, 8]), np.int64, (2, NUM_HEADS)),
        (copies, np.int32, (0, 2)),
        (written, np.int32, (4, 2)),
        (row_indptr, np.int32, (2 * NUM_HEADS + 1,)),
        (page_refs, np.int32, (2 * NUM_HEADS * 3, 4)),
    ]:
        assert array.dtype == dtype and array.shape == shape
        assert array.flags.c_contiguous and array.flags.writeable
    before = page_refs.copy()
    del a
    np.testing.assert_array_equal(page_refs, before)


@pytest.mark.parametrize("integers", [list, tuple, np.int32, np.int64, np.uint8])
def test_integers_may_come_in_any_array_or_sequence(integers: Callable[[Any], Any]) -> None:
    a = make()
    session = start_session(a)
    a.append_tokens(integers([session]), integers([6]))
    assert a.session_length(session) == 6
    assert a.position_slots(session, 0, integers([2, 5])).shape == (2, NUM_HEADS)
    assert a.append_tokens([], []).shape == (0, 2)


def test_out_of_pages_is_an_error_of_its_own() -> None:
    a = make(num_pages=8)
    session = start_session(a)
    with pytest.raises(OutOfPages, match=r"append_tokens: needs 12 pages, 8 are free") as caught:
        a.append_tokens([session], [9])
    assert isinstance(caught.value, RuntimeError)
    assert (caught.value.pages_needed, caught.value.pages_free) == (12, 8)
    assert pickle.loads(pickle.dumps(caught.value)).pages_needed == 12
    assert a.session_length(session) == 0 and a.free_pages() == 8
    with pytest.raises(OutOfPages, match=r"create_segment: needs 12 pages, 8 are free"):
        a.create_segment(9, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a, s: a.release_session(99), "release_session: session 99 is unknown"),
        (lambda a, s: a.append_tokens([s, s], [1, 1]), "is given twice"),
        (lambda a, s: a.append_tokens([s], [1.5]), "num_tokens must be a list of integers, got fl"),
        (lambda a, s: a.append_tokens([[s]], [1]), r"sessions must be .*, got int64 \(1, 1\)"),
        (lambda a, s: a.append_tokens([s], "x"), "num_tokens must be a list of integers, got <U1"),
        (lambda a, s: a.create_session([[1]], [[1]]), r"= \[2, 2\], got int64 \(1, 1\)"),
        (lambda a, s: a.create_session([[2**40] * 2] * 2, [[0] * 2] * 2), "got 1099511627776"),
        (lambda a, s: a.create_session([[0] * 2] * 2, [[0] * 2] * 2), "window must be >= 1"),
        (lambda a, s: a.make_writable(s, [([[1, 1]], [0])]), r"head_mask must be .* \(1, 2\)"),
        (lambda a, s: a.position_slots(s, 0, [1, 0]), "sorted and unique"),
        (lambda a, s: a.rows([s], NUM_LAYERS), r"layer must be in \[0, 2\), got 2"),
        (lambda a, s: a.create_segment(0, 0), "num_tokens must be >= 1, got 0"),
        (lambda a, s: make(storage=[(0, 8, 8)]), r"storage must be .*, got \(0, 8, 8\)"),
        (lambda a, s: make(storage=[(64, 4, 8)]), "page_bytes <= page_stride_bytes"),
        (lambda a, s: make(poison=True), "poison=True needs host storage"),
        (lambda a, s: make(num_pages=0), "num_pages must be >= 1, got 0"),
    ],
)
def test_broken_rules_raise_in_the_callers_words(
    call: Callable[[SegmentAllocator, int], Any], words: str
) -> None:
    a = make()
    session = start_session(a)
    a.append_tokens([session], [4])
    with pytest.raises(ValueError, match=words):
        call(a, session)
    assert a.session_length(session) == 4


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_poison_is_nan_in_freed_pages_only(dtype: type[np.floating]) -> None:
    pages = np.zeros((8, 4), dtype)
    region = (pages.ctypes.data, pages.strides[0], pages.strides[0])
    a = make(num_pages=8, storage=[region], poison=True)
    assert a.poisons_freed_pages
    segment = a.create_segment(4, 0)
    used = np.unique(a.segment_slots(segment, 0) // 4)
    a.create_segment(1, 0)
    a.release_segment(segment)
    assert np.isnan(pages[used]).all()
    assert np.isnan(pages).all(axis=1).sum() == NUM_LAYERS * NUM_HEADS
    assert not make(num_pages=8, storage=[region], poison=False).poisons_freed_pages
    assert not make().poisons_freed_pages


def test_stub_names_every_method_and_parameter() -> None:
    stub = Path(_memory.__file__).with_name("_memory.pyi").read_text()
    classes = {n.name: n for n in ast.parse(stub).body if isinstance(n, ast.ClassDef)}
    stated = {
        node.name: [arg.arg for arg in node.args.args]
        for node in classes["SegmentAllocator"].body
        if isinstance(node, ast.FunctionDef)
    }
    public = {name for name in vars(SegmentAllocator) if not name.startswith("_")}
    assert public | {"__init__"} == set(stated)
    for name, parameters in stated.items():
        signature = getattr(SegmentAllocator, name).__doc__
        if name in ("poisons_freed_pages", "hole_page"):
            continue
        positions = [signature.find(f"{parameter}: ") for parameter in parameters]
        assert -1 not in positions and positions == sorted(positions), signature
    assert set(make().stats()) == {
        node.target.id
        for node in classes["AllocatorStats"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_a_prompt_goes_through_the_layers_one_after_the_other():
    """A layer's local rows give up their middle before the next layer takes its pages."""
    allocator = SegmentAllocator(3, 2, 23, 4, 0)
    rules = [[-1, 6], [5, 6], [4, -1]], [[0, 2], [0, 0], [3, 0]]
    session = allocator.create_session(*rules)
    # 21 tokens are 6 pages; a local row keeps its sink's page and the last 2.
    kept = [6 + 3, 2 + 2, 3 + 6]
    assert allocator.layerwise_pages([session], [21]) == 9 + 4 + 12 == 25
    with pytest.raises(OutOfPages) as error:
        for layer in range(3):
            allocator.append_layer([session], [21], layer)
            assert len(allocator.tail_slots(session, layer, 21)) == 21
            allocator.expire_layer(session, layer)
            assert allocator.session_pages(session) == sum(kept[: layer + 1])
    assert (error.value.pages_needed, error.value.pages_free) == (12, 10)
    assert allocator.session_length(session) == 0
    with pytest.raises(
        ValueError, match=r"append_tokens: session .* is in the middle of append_la"
    ):
        allocator.append_tokens([session], [1])
    assert allocator.truncate(session, 0) and allocator.free_pages() == 23
    with pytest.raises(ValueError, match="has come to layer 0, got layer 1"):
        allocator.append_layer([session], [21], 1)

    allocator.grow(25)
    for layer in range(3):
        allocator.append_layer([session], [21], layer)
        allocator.expire_layer(session, layer)
    assert allocator.session_length(session) == 21 and allocator.free_pages() == 25 - sum(kept)
    whole = SegmentAllocator(3, 2, 40, 4, 0)
    other = whole.create_session(*rules)
    whole.append_tokens([other], [21])
    whole.expire(other)
    for layer in range(3):  # the same rows as when all layers are appended at once
        ours, theirs = allocator.rows([session], layer), whole.rows([other], layer)
        assert ours[0].tolist() == theirs[0].tolist()
        assert ours[1][:, 1:].tolist() == theirs[1][:, 1:].tolist()
    with pytest.raises(ValueError, match="must be empty, it has 21 tokens"):
        allocator.append_layer([session], [1], 0)
