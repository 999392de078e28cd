"""Layout, manifest and partial reads of stored segments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_case import heads_needed, make_segment

from redknot.store.layout import REGIONS, Regions, SegmentLayout, SegmentShape
from redknot.store.manifest import DamagedError, Manifest


def naive_pages(layout: SegmentLayout, region_of) -> list[tuple[int, int, int]]:
    """Pages in storage order, by their definition: region by region, global heads first."""
    layers, heads, pages = layout.shape.pages
    every = [(a, h, p) for a in range(layers) for h in range(heads) for p in range(pages)]
    return [page for region in reversed(REGIONS) for page in every if region_of(*page) == region]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_page_lies_where_the_format_says(data):
    shape = SegmentShape(
        num_layers=data.draw(st.integers(1, 4)),
        num_kv_heads=data.draw(st.integers(1, 4)),
        num_tokens=data.draw(st.integers(1, 70)),
        page_size=data.draw(st.sampled_from([1, 4, 16, 64])),
        row_bytes=8,
    )
    size = (shape.num_layers, shape.num_kv_heads)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    is_global = rng.random(size) < 0.3
    windows, sinks = rng.integers(1, 40, size).astype(np.int32), rng.integers(0, 9, size)
    sinks = sinks.astype(np.int32)
    regions = Regions.of_heads(is_global, windows, sinks, shape.page_size, shape.num_pages)
    layout = SegmentLayout(shape, regions)

    def region_of(layer, head, page):
        first, end = page * shape.page_size, min((page + 1) * shape.page_size, shape.num_tokens)
        if is_global[layer, head]:
            return "global"
        if first < sinks[layer, head]:
            return "sink"
        # One page more than the window fills: it may begin inside a page.
        pages = min(-(-windows[layer, head] // shape.page_size) + 1, shape.num_pages)
        assert pages * shape.page_size >= min(windows[layer, head], shape.num_tokens) or end
        return "window" if page >= shape.num_pages - pages else "middle"

    flat = [np.ravel_multi_index(page, shape.pages) for page in naive_pages(layout, region_of)]
    assert layout.order.tolist() == flat
    assert layout.num_bytes == 2 * 8 * shape.num_tokens * size[0] * size[1]
    # Any selection of pages is read as exactly its bytes, each from the right place.
    wanted = rng.random(shape.pages) < 0.4
    content = rng.integers(0, 256, layout.num_bytes, dtype=np.uint8)
    begins = np.cumsum([0, *layout.object_sizes])
    selection = layout.selection(wanted)
    read = [
        content[begins[run.object_index] + offset :][:length]
        for run in layout.runs(selection)
        for offset, length in run.ranges
    ]
    sizes = layout.page_bytes[layout.order]
    offsets = np.cumsum(sizes) - sizes
    truth = [
        content[offsets[i] : offsets[i] + sizes[i]]
        for i, page in enumerate(layout.order)
        if wanted.reshape(-1)[page]
    ]
    assert np.concatenate([np.empty(0, np.uint8), *read]).tobytes() == b"".join(
        part.tobytes() for part in truth
    )
    # Every token of a selected page has one K row and one V row, in order.
    k_row, v_row, token = layout.rows(selection)
    assert sorted([*k_row, *v_row]) == list(range(sum(map(len, truth)) // 8))
    expected = []
    for page in layout.order[selection]:
        layer, head, number = np.unravel_index(page, shape.pages)
        first = number * shape.page_size
        for t in range(first, min(first + shape.page_size, shape.num_tokens)):
            expected.append((layer * size[1] + head) * shape.num_tokens + t)
    assert token.tolist() == expected


@pytest.mark.parametrize("heads", [(0, 1), (1, 6), (3, 7)])
def test_two_of_eight_heads_move_less_than_thirty_percent(heads):
    manifest, _, _ = make_segment(0, layers=4, heads=8, tokens=500, global_heads=(1,))
    layout = manifest.layout
    pages = heads_needed(manifest, heads).pages(manifest.shape.page_size)
    moved = sum(run.num_bytes for run in layout.runs(layout.selection(pages)))
    assert moved + len(manifest.to_bytes()) <= 0.30 * manifest.num_bytes
    assert moved == manifest.num_bytes // 4


def test_large_segments_are_cut_at_layers():
    manifest, _, _ = make_segment(0, layers=9, heads=2, tokens=4096, row_bytes=1024, page_size=512)
    sizes = manifest.object_sizes
    assert len(sizes) > len(REGIONS) and max(sizes) <= (32 << 20) + 2 * 2 * 4096 * 1024
    assert len(set(manifest.object_keys)) == len(sizes)


def test_a_manifest_survives_its_bytes():
    manifest, _, _ = make_segment(3, hidden_bytes=32)
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again.to_bytes() == manifest.to_bytes()
    assert again.object_keys == manifest.object_keys and again.shape == manifest.shape
    assert again.object_sizes[-1] == 100 * 32


def test_a_damaged_manifest_is_never_read():
    data = bytearray(make_segment(3)[0].to_bytes())
    for at in range(len(data)):
        data[at] ^= 1 << (at % 8)
        with pytest.raises(DamagedError):
            Manifest.from_bytes(bytes(data))
        data[at] ^= 1 << (at % 8)
    for length in range(0, len(data), 7):
        with pytest.raises(DamagedError):
            Manifest.from_bytes(bytes(data[:length]))
    newer = bytes(data[:4]) + (2).to_bytes(2, "little") + bytes(data[6:])
    with pytest.raises(DamagedError, match="format 2"):
        Manifest.from_bytes(newer)
