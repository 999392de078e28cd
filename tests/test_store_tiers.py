"""Tiers: what is found where, what a fault costs, and what a full tier drops."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from store_case import expected_of, heads_needed, key_of, make_segment

from redknot.store import Loaded, Missed, Status, Tier, TieredStore, open_tiers, parse_url
from redknot.store.layout import REGIONS
from redknot.store.mem_backend import MemBackend


class Engine(MemBackend):
    """A storage engine in memory that can be slow, fail, and damage what it gives out."""

    name = "test"
    may_block = True

    def __init__(self) -> None:
        super().__init__()
        self.delay = 0.0
        self.fail: Status | None = None
        self.flip: int | None = None
        self.go_on = threading.Event()
        self.hangs = False
        self.calls = 0

    def _trouble(self, count):
        self.calls += 1
        if self.hangs:
            self.go_on.wait(20)
        time.sleep(self.delay)
        return None if self.fail is None else [self.fail] * count

    def get(self, keys, timeout):
        return self._trouble(len(keys)) or super().get(keys, timeout)

    def get_ranges(self, reads, timeout):
        answer = self._trouble(len(reads)) or super().get_ranges(reads, timeout)
        if self.flip is not None:
            reads[-1].out[self.flip] ^= 4
        return answer

    def put(self, items, timeout):
        return self._trouble(len(items)) or super().put(items, timeout)


def store_of(*options: str, engine: type = Engine):
    tiers = [Tier(engine(), parse_url(f"mem:?{option}")) for option in options or ["timeout=5"]]
    return TieredStore(tiers), [tier.backend for tier in tiers], tiers


def put(store, number, **options):
    manifest, objects, pages = make_segment(number, **options)
    store.save(manifest, objects)
    assert store.flush(10)
    return manifest, pages


def load(store, manifest, wanted=None, **options):
    return store.load(manifest.key, expected_of(manifest), wanted, **options)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "redknot.store"]


def test_what_is_saved_is_loaded_with_and_without_hidden_states():
    store, _, _ = store_of()
    for number, hidden_bytes in ((0, 0), (1, 24)):
        manifest, pages = put(store, number, hidden_bytes=hidden_bytes)
        for hidden in (False, True):
            loaded = load(store, manifest, hidden=hidden)
            assert loaded.buffer.tobytes() == pages.tobytes()
            assert (loaded.hidden is not None) == (hidden and hidden_bytes > 0)


def test_only_the_needed_pages_are_read():
    store, _, [tier] = store_of()
    manifest, pages = put(store, 0, heads=8, tokens=500)
    loaded = load(store, manifest, heads_needed(manifest, (1, 6)))
    assert tier.counts.bytes_read == loaded.num_bytes <= 0.3 * manifest.num_bytes
    k_row, v_row, token = manifest.layout.rows(loaded.selection)
    all_k, all_v, all_token = manifest.layout.rows(manifest.layout.selection(None))
    rows, all_rows = loaded.buffer.reshape(-1, 64), pages.reshape(-1, 64)
    place = {int(t): i for i, t in enumerate(all_token)}
    index = [place[int(t)] for t in token]
    assert np.array_equal(rows[k_row], all_rows[all_k[index]])
    assert np.array_equal(rows[v_row], all_rows[all_v[index]])


def test_nothing_is_read_of_what_nothing_is_needed_of():
    store, _, [_, tier] = store_of("capacity=1MiB", "timeout=5")
    manifest, _ = put(store, 0)
    loaded = load(store, manifest, heads_needed(manifest, ()))
    assert loaded.num_bytes == 0 and len(loaded.tiers) == 1 and tier.counts.bytes_read == 0


def test_another_model_or_place_is_not_found(caplog):
    store, _, [tier] = store_of()
    manifest, _ = put(store, 0)
    from dataclasses import replace

    for change in ({"fingerprint": "b"}, {"dtype": "float16"}, {"num_tokens": 99},
                   {"row_bytes": 32}, {"first_position": 0}):  # fmt: skip
        missed = store.load(manifest.key, replace(expected_of(manifest), **change))
        assert isinstance(missed, Missed) and "damaged" in missed.reason
    assert isinstance(store.load(key_of(9), expected_of(manifest)), Missed)
    assert tier.counts.misses == 6 and len(lines(caplog)) == 5


@pytest.mark.parametrize("flip", [0, -1, 777])
def test_a_flipped_bit_is_one_miss_one_line_and_then_gone(flip, caplog):
    store, [engine], [tier] = store_of()
    manifest, _ = put(store, 0)
    engine.flip = flip
    missed = load(store, manifest)
    assert isinstance(missed, Missed) and missed.reason == "test: damaged"
    assert (tier.counts.misses, tier.counts.failures) == (1, {"damaged": 1})
    assert len(lines(caplog)) == 1 and "counted as a miss" in lines(caplog)[0]
    assert not engine.sizes("", 1)
    engine.flip = None
    put(store, 0)
    assert isinstance(load(store, manifest), Loaded)


@pytest.mark.parametrize("where", ["manifest", "read"])
def test_a_hanging_tier_costs_one_timeout_and_is_then_left_alone(where, caplog):
    store, [engine], [tier] = store_of("timeout=0.15")
    manifest, _ = put(store, 0)
    if where == "manifest":
        engine.hangs = True
    else:
        whole = engine.get_ranges
        engine.get_ranges = lambda *args: engine.go_on.wait(20) and whole(*args)
    begin = time.monotonic()
    for _ in range(5):
        missed = load(store, manifest)
        assert isinstance(missed, Missed) and "timed out" in missed.reason
    assert time.monotonic() - begin < 0.6
    assert tier.counts.failures == {"timed out": 1} and tier.counts.skipped_down == 4
    assert len(lines(caplog)) == 1
    engine.hangs = False
    engine.go_on.set()
    time.sleep(1.0)  # the pause after a first failure
    assert isinstance(load(store, manifest), Loaded)


def test_a_late_answer_is_never_seen():
    """What a call that timed out writes later lands in a buffer that nobody reads."""
    store, [slow, _], _ = store_of("timeout=0.1", "timeout=5")
    manifest, pages = put(store, 0)
    right, done = slow.get_ranges, threading.Event()

    def late(reads, timeout):
        slow.go_on.wait(10)
        for read in reads:
            read.out[:] = bytes(len(read.out))
        done.set()
        return [Status.OK] * len(reads)

    slow.get_ranges = late
    loaded = load(store, manifest)
    slow.go_on.set()
    assert done.wait(5) and right is not None
    assert loaded.buffer.tobytes() == pages.tobytes() and loaded.tiers[0].backend is not slow


@pytest.mark.parametrize("status", [Status.UNREACHABLE, Status.ERROR, Status.FULL])
def test_a_failed_write_is_one_line_and_no_half_segment(status, caplog):
    store, [engine], [tier] = store_of()
    engine.fail = status
    manifest, _ = put(store, 0)
    engine.fail = None
    assert len(lines(caplog)) == 1 and status.value in lines(caplog)[0]
    assert tier.counts.failures == {status.value: 1} and not engine.sizes("m/", 1)
    if status is not Status.UNREACHABLE:
        assert isinstance(load(store, manifest), Missed)


def test_a_load_that_would_be_slower_than_computing_is_skipped_and_says_so():
    store, [engine], [tier] = store_of()
    first, second = put(store, 0)[0], put(store, 1)[0]
    engine.delay = 0.05
    for _ in range(2):  # nothing is known before them
        load(store, first, recompute_seconds=lambda m: 0.001).done(0.0)
    engine.delay = 0.0
    before = engine.calls
    missed = load(store, second, recompute_seconds=lambda m: 0.001)
    assert isinstance(missed, Missed)
    assert "would take about" in missed.reason and "computing 1.0 ms" in missed.reason
    assert engine.calls == before + 1 and tier.counts.skipped_slower == 1
    assert isinstance(load(store, second, recompute_seconds=lambda m: 10.0), Loaded)
    tries = [load(store, second, recompute_seconds=lambda m: 0.001) for _ in range(16)]
    assert sum(isinstance(t, Loaded) for t in tries) == 1  # a tier that recovered is noticed


def test_reading_ahead_is_taken_over_and_bounded():
    store, [engine], [tier] = store_of()
    manifest, pages = put(store, 0)
    engine.delay = 0.05
    assert store.prefetch(manifest.key, expected_of(manifest))
    assert store.prefetch(manifest.key, expected_of(manifest))
    loaded = load(store, manifest)
    assert loaded.buffer.tobytes() == pages.tobytes() and tier.counts.hits == 1
    from dataclasses import replace

    assert not store.prefetch(key_of(5), replace(expected_of(manifest), num_tokens=10**9))
    store.prefetch(manifest.key, expected_of(manifest), heads_needed(manifest, (1,)))
    whole = load(store, manifest)  # asks for more than was read ahead
    assert whole.num_bytes == manifest.num_bytes
    store.prefetch(manifest.key, expected_of(manifest))
    store.forget_prefetched()
    assert store._queued_bytes == 0


def test_segments_move_nearer_when_they_are_read():
    store, _, [near, far] = store_of("capacity=1MiB", "timeout=5", engine=MemBackend)
    manifest, objects, pages = make_segment(0)
    assert far.write(manifest, objects) is Status.OK
    assert load(store, manifest).tiers == (far,)
    assert store.flush(5)
    again = load(store, manifest)
    assert again.tiers == (near,) and again.buffer.tobytes() == pages.tobytes()


def test_the_middle_of_local_heads_goes_first_and_comes_from_the_next_tier():
    manifest, _, pages = make_segment(0, tokens=300)
    room = manifest.num_bytes + manifest.num_bytes // 3
    store, [near_engine, _], [near, far] = store_of(f"capacity={room}", "timeout=5")
    for number in (0, 1):
        put(store, number, tokens=300)
    left = {item.rsplit("/", 1)[1] for item in near_engine.sizes(f"d/{key_of(0)}", 1)}
    assert "middle-0" not in left and "global-0" in left
    assert near.counts.evictions > 0 and near.used_bytes <= room
    loaded = load(store, manifest)
    assert loaded.buffer.tobytes() == pages.tobytes() and loaded.tiers == (near, far)
    assert near.counts.bytes_read > 0


def test_a_tier_counts_what_is_there_already_and_keeps_its_capacity(tmp_path):
    url = f"lmdb://{tmp_path}/s"
    size = make_segment(0)[0].num_bytes
    with_all = TieredStore(open_tiers(url))
    for number in range(6):
        put(with_all, number)
    with_all.close()
    store = TieredStore(open_tiers(f"{url}?capacity={3 * size + 10}&policy=s3fifo"))
    put(store, 7)
    [tier] = store.tiers
    assert tier.used_bytes <= 3 * size + 10
    assert sum(tier.backend.sizes("d/", 1).values()) == tier.used_bytes
    assert isinstance(load(store, make_segment(7)[0]), Loaded)
    store.close()


@pytest.mark.parametrize("jump", [-1e9, 0.0, 1e9])
def test_clock_jumps_cost_misses_at_most(jump):
    now = [1000.0]
    tier = Tier(Engine(), parse_url("mem:?ttl=60"), wall_clock=lambda: now[0])
    store = TieredStore([tier])
    manifest, pages = put(store, 0, created=now[0])
    now[0] += jump
    loaded = load(store, manifest)
    if jump > 60:
        assert isinstance(loaded, Missed) and tier.counts.expired == 1
        put(store, 0, created=now[0])
        loaded = load(store, manifest)
    assert loaded.buffer.tobytes() == pages.tobytes()


def test_what_two_writers_store_is_never_mixed():
    """Of two writers of one segment the first stays; a nearer tier's other copy is whole too."""
    store, [near_engine, _], [near, far] = store_of("timeout=5", "timeout=5")
    manifest, objects, pages = make_segment(0)
    from dataclasses import replace

    other = replace(manifest, write_id="ffffffffffff")
    assert near.write(other, objects) is Status.OK and far.write(manifest, objects) is Status.OK
    assert near.write(manifest, objects) is Status.OK
    assert {key.split("/")[2] for key in near_engine.sizes("d/", 1)} == {"ffffffffffff"}
    near_engine.remove([key for key in other.object_keys if REGIONS[0] in key], 1)
    loaded = load(store, manifest)
    assert loaded.tiers == (far,) and loaded.buffer.tobytes() == pages.tobytes()
