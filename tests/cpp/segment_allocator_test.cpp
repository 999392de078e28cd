#include "redknot/segment_allocator.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>

#include "check.h"

namespace {

using namespace redknot;  // NOLINT: one file, one subject

constexpr int32_t kPageSize = 4;
constexpr int64_t kRows = 4;  // 2 layers x 2 KV heads

AllocatorConfig config(int32_t num_pages) {
  return {.num_layers = 2,
          .num_kv_heads = 2,
          .num_pages = num_pages,
          .page_size = kPageSize,
          .bytes_per_page = 64,
          .poison = nullptr};
}

// Head 0 of each layer is global, head 1 local.
std::vector<HeadRule> mixed(int32_t window, int32_t sink) {
  return {{}, {window, sink}, {}, {window, sink}};
}

SegmentId segment_of(SegmentAllocator& a, int64_t num_tokens, int64_t first_position = 0) {
  SegmentId segment = 0;
  CHECK(a.create_segment(num_tokens, first_position, &segment).status == AllocStatus::kOk);
  return segment;
}

// Appends where it must fit; returns the copies.
std::vector<PageCopy> append(SegmentAllocator& a,
                             const std::vector<SessionId>& sessions,
                             const std::vector<int64_t>& num_tokens,
                             bool expire_first = false) {
  std::vector<PageCopy> copies;
  const int64_t free = a.free_pages();
  const AllocResult result = a.append_tokens(sessions, num_tokens, expire_first, &copies);
  CHECK(result.status == AllocStatus::kOk);
  CHECK_EQ(result.pages_free, free);
  CHECK_EQ(a.free_pages(), free - result.pages_needed);
  return copies;
}

std::vector<PageRef> row(const SegmentAllocator& a, SessionId s, int64_t layer, int64_t head) {
  const RowTable table = a.rows({s}, layer);
  return {table.page_refs.begin() + table.row_indptr[head],
          table.page_refs.begin() + table.row_indptr[head + 1]};
}

bool same(const PageRef& ref, const PageRef& expected) {
  return ref.page == expected.page && ref.first_position == expected.first_position &&
         ref.num_valid == expected.num_valid && ref.rotation_offset == expected.rotation_offset;
}

// Everything that "nothing changed" covers.
struct Snapshot {
  std::vector<RowTable> tables;
  std::vector<int64_t> numbers;
  Snapshot(const SegmentAllocator& a, const std::vector<SessionId>& sessions) {
    for (int64_t layer = 0; layer < 2; ++layer) tables.push_back(a.rows(sessions, layer));
    for (const SessionId s : sessions) {
      numbers.insert(numbers.end(), {a.session_length(s), a.session_private_pages(s)});
    }
    numbers.insert(numbers.end(), {a.free_pages(), a.stats().shared_pages});
  }
  bool operator==(const Snapshot& other) const {
    return numbers == other.numbers &&
           std::equal(tables.begin(), tables.end(), other.tables.begin(), [](auto& x, auto& y) {
             return x.row_indptr == y.row_indptr && std::equal(x.page_refs.begin(),
                                                               x.page_refs.end(),
                                                               y.page_refs.begin(),
                                                               y.page_refs.end(),
                                                               same);
           });
  }
};

TEST(ragged_segment_is_shared_with_its_rotation) {
  SegmentAllocator a(config(64));
  const SegmentId segment = segment_of(a, 10, 3);
  CHECK_EQ(a.free_pages(), 64 - 3 * kRows);
  const SessionId s = a.create_session(mixed(4, 1));
  append(a, {s}, {5});
  a.append_segment(s, segment);
  append(a, {s}, {1});
  CHECK_EQ(a.session_length(s), 16);
  const std::vector<PageRef> refs = row(a, s, 1, 1);
  const std::vector<int64_t> slots = a.segment_slots(segment, 1);
  const auto page = [&](int64_t token) {
    return static_cast<int32_t>(slots[token * 2 + 1] / kPageSize);
  };
  CHECK_EQ(refs.size(), 6u);
  CHECK(same(refs[1], {refs[1].page, 4, 1, 0}));  // the tail in front of the segment stays ragged
  CHECK(same(refs[2], {page(0), 5, 4, 2}));       // 5 - 3
  CHECK(same(refs[3], {page(4), 9, 4, 2}));
  CHECK(same(refs[4], {page(8), 13, 2, 2}));
  CHECK(same(refs[5], {refs[5].page, 15, 1, 0}));
  CHECK(a.tail_slots(s, 1, 11) == [&] {
    std::vector<int64_t> expected(slots);
    const std::vector<int64_t> last = a.tail_slots(s, 1, 1);
    expected.insert(expected.end(), last.begin(), last.end());
    return expected;
  }());
  CHECK_EQ(std::set<int64_t>(slots.begin(), slots.end()).size(), slots.size());
}

TEST(appended_tokens_never_enter_a_segments_page_even_at_rotation_zero) {
  SegmentAllocator a(config(64));
  const SegmentId segment = segment_of(a, 3);
  const SessionId s = a.create_session(mixed(8, 0));
  a.append_segment(s, segment);
  append(a, {s}, {1});
  CHECK_EQ(row(a, s, 0, 0).size(), 2u);
  CHECK(a.truncate(s, 3));
  a.release_segment(segment);  // now the page is the session's own
  append(a, {s}, {1});
  CHECK_EQ(row(a, s, 0, 0).size(), 1u);
  CHECK_EQ(row(a, s, 0, 0)[0].num_valid, 4);
}

TEST(segment_outlives_its_release_in_a_session_and_the_other_way_round) {
  SegmentAllocator a(config(8));
  const SegmentId segment = segment_of(a, 8);
  const SessionId s = a.create_session(mixed(4, 0));
  a.append_segment(s, segment);
  a.release_segment(segment);
  CHECK_EQ(a.free_pages(), 0);
  CHECK_EQ(a.session_private_pages(s), 8);
  CHECK_EQ(a.stats().session_global_pages, 4);
  a.release_session(s);
  CHECK_EQ(a.free_pages(), 8);
}

TEST(fork_copies_on_the_first_append_and_the_last_sharer_keeps_the_page) {
  SegmentAllocator a(config(64));
  const SessionId s = a.create_session(mixed(4, 1));
  append(a, {s}, {6});
  const SessionId fork = a.fork_session(s);
  CHECK_EQ(a.stats().shared_pages, 8);
  CHECK_EQ(a.session_private_pages(s), 0);
  const int32_t shared_tail = row(a, s, 0, 0)[1].page;
  const std::vector<PageCopy> copies = append(a, {s, fork}, {1, 1});
  CHECK_EQ(copies.size(), static_cast<size_t>(kRows));
  CHECK_EQ(copies[0].source, shared_tail);
  CHECK_EQ(row(a, s, 0, 0)[1].page, copies[0].destination);
  CHECK_EQ(row(a, fork, 0, 0)[1].page, shared_tail);
  CHECK_EQ(row(a, fork, 0, 0)[0].page, row(a, s, 0, 0)[0].page);
  CHECK(append(a, {s, fork}, {1, 1}).empty());
  CHECK(append(a, {s, fork}, {0, 0}).empty());
}

TEST(fork_with_a_full_tail_needs_no_copy) {
  SegmentAllocator a(config(64));
  const SessionId s = a.create_session(mixed(4, 1));
  append(a, {s}, {8});
  const SessionId fork = a.fork_session(s);
  CHECK(append(a, {fork}, {1}).empty());
  CHECK_EQ(row(a, s, 0, 0).size(), 2u);
}

TEST(expiry_frees_local_pages_only_and_decode_reuses_them_in_the_same_call) {
  SegmentAllocator a(config(4 * 3 + 2));
  const SessionId s = a.create_session(mixed(5, 1));
  append(a, {s}, {12});
  CHECK_EQ(a.free_pages(), 2);
  // Position 12 sees j > 7: page [4, 8) of each local row goes. Four new pages, two are there, two
  // come back.
  append(a, {s}, {1}, true);
  CHECK_EQ(a.free_pages(), 0);
  CHECK_EQ(row(a, s, 0, 0).size(), 4u);
  CHECK_EQ(row(a, s, 0, 1).size(), 3u);
  CHECK_EQ(row(a, s, 0, 1)[1].first_position, 8);
  CHECK_EQ(a.expire(s), 0);
  const std::vector<int64_t> slots = a.position_slots(s, 0, {0, 4, 7, 8, 12});
  CHECK(slots[2 * 1 + 1] == -1 && slots[2 * 2 + 1] == -1);
  CHECK_EQ(std::count(slots.begin(), slots.end(), -1), 2);
}

TEST(page_expired_by_two_forks_at_once_is_free_for_both) {
  SegmentAllocator a(config(4 * 3));
  const SessionId s = a.create_session(std::vector<HeadRule>(kRows, HeadRule{4, 0}));
  append(a, {s}, {12});
  const SessionId fork = a.fork_session(s);
  // Both drop [0, 4) and [4, 8), 8 pages together; each needs 4 new ones.
  append(a, {s, fork}, {1, 1}, true);
  CHECK_EQ(a.free_pages(), 0);
  CHECK_EQ(a.stats().session_local_pages, 12);
}

TEST(ragged_sink_page_in_front_of_a_gap_takes_no_more_tokens) {
  SegmentAllocator a(config(64));
  const SegmentId prefix = segment_of(a, 2);
  const SessionId s = a.create_session(mixed(1, 1));
  a.append_segment(s, prefix);
  append(a, {s}, {4});
  a.release_segment(prefix);
  CHECK_EQ(a.expire(s), 2);  // [2, 6) of the local rows: the prefix's page is their last one now
  append(a, {s}, {1});
  const std::vector<PageRef> refs = row(a, s, 0, 1);
  CHECK_EQ(refs.size(), 2u);
  CHECK(same(refs[0], {refs[0].page, 0, 2, 0}));
  CHECK(same(refs[1], {refs[1].page, 6, 1, 0}));
}

TEST(make_writable_copies_only_what_is_shared_and_partly_kept) {
  SegmentAllocator a(config(64));
  const SegmentId segment = segment_of(a, 10);
  const SessionId s = a.create_session(mixed(4, 1));
  a.append_segment(s, segment);
  a.append_segment(s, segment);
  std::vector<PageCopy> copies;
  const std::vector<WriteRequest> requests{{{1, 0, 0, 0}, {0, 1, 2, 3, 5, 18, 19}},
                                           {{0, 0, 0, 1}, {9}}};
  CHECK(a.make_writable(s, requests, &copies).status == AllocStatus::kOk);
  // Row 0: [0, 4) replaced, [4, 8) copied, [18, 20) replaced. Row 3: [8, 10) copied.
  CHECK_EQ(copies.size(), 2u);
  const std::vector<int64_t> slots = a.segment_slots(segment, 0);
  CHECK_EQ(copies[0].source, slots[4 * 2] / kPageSize);
  const std::vector<PageRef> refs = row(a, s, 0, 0);
  CHECK(same(refs[1], {copies[0].destination, 4, 4, 0}));
  CHECK(same(refs[5], {refs[5].page, 18, 2, 10}));
  CHECK(refs[5].page != refs[2].page);
  CHECK_EQ(a.session_private_pages(s), 4);
  CHECK_EQ(a.session_pages(s), 3 * kRows + 4);
  const Snapshot before(a, {s});
  CHECK(a.make_writable(s, requests, &copies).status == AllocStatus::kOk);
  CHECK(copies.empty());
  CHECK(Snapshot(a, {s}) == before);
}

TEST(make_writable_copies_every_page_whose_contents_are_kept) {
  SegmentAllocator a(config(64));
  const SegmentId segment = segment_of(a, 10);
  const SessionId s = a.create_session(mixed(4, 1));
  a.append_segment(s, segment);
  std::vector<PageCopy> copies;
  const std::vector<WriteRequest> requests{{{1, 0, 0, 0}, {0, 1, 2, 3, 5}}};
  CHECK(a.make_writable(s, requests, &copies, /*keep_contents=*/true).status == AllocStatus::kOk);
  CHECK_EQ(copies.size(), 2u);
  const std::vector<PageRef> refs = row(a, s, 0, 0);
  for (size_t page = 0; page < 2; ++page) {
    CHECK_EQ(copies[page].source, a.segment_slots(segment, 0)[page * 4 * 2] / kPageSize);
    CHECK_EQ(copies[page].destination, refs[page].page);
  }
}

TEST(make_writable_ignores_what_has_expired) {
  SegmentAllocator a(config(64));
  const SegmentId segment = segment_of(a, 16);
  const SessionId s = a.create_session(mixed(4, 1));
  a.append_segment(s, segment);
  a.expire(s);
  std::vector<PageCopy> copies;
  std::vector<int64_t> all(16);
  std::iota(all.begin(), all.end(), 0);
  const int64_t free = a.free_pages();
  CHECK(a.make_writable(s, {{{0, 1, 0, 0}, all}}, &copies).status == AllocStatus::kOk);
  CHECK_EQ(free - a.free_pages(), 2);  // [0, 4) with the sink, [12, 16)
}

TEST(truncate_gives_pages_back_and_refuses_what_local_rows_have_lost) {
  SegmentAllocator a(config(64));
  const SessionId s = a.create_session(mixed(6, 1));
  append(a, {s}, {22});
  CHECK(a.truncate(s, 21));
  CHECK_EQ(a.session_length(s), 21);
  CHECK_EQ(row(a, s, 0, 0).back().num_valid, 1);
  CHECK(a.truncate(s, 20));
  CHECK_EQ(row(a, s, 0, 0).size(), 5u);
  CHECK_EQ(a.expire(s), 4);  // [4, 8) and [8, 12) of the two local rows
  const Snapshot before(a, {s});
  CHECK(!a.truncate(s, 16));  // would see 11
  CHECK(Snapshot(a, {s}) == before);
  CHECK(a.truncate(s, 17));
  CHECK(a.truncate(s, 4));
  CHECK_EQ(a.session_pages(s), kRows);
  CHECK(a.truncate(s, 0));
  CHECK_EQ(a.free_pages(), 64);
}

TEST(append_behind_a_crop_into_a_shared_page_copies_it) {
  SegmentAllocator a(config(64));
  const SessionId s = a.create_session(mixed(6, 1));
  append(a, {s}, {4});
  const SessionId fork = a.fork_session(s);
  CHECK(a.truncate(fork, 2));
  CHECK_EQ(append(a, {fork}, {1}).size(), static_cast<size_t>(kRows));
  CHECK_EQ(row(a, s, 0, 0)[0].num_valid, 4);
}

TEST(out_of_pages_changes_nothing) {
  SegmentAllocator a(config(40));
  const SegmentId segment = segment_of(a, 8);
  const SessionId s = a.create_session(mixed(4, 0));
  a.append_segment(s, segment);
  append(a, {s}, {9});
  const SessionId fork = a.fork_session(s);
  const SessionId other = a.create_session(mixed(4, 0));
  append(a, {other}, {12});
  const Snapshot before(a, {s, fork, other});
  std::vector<PageCopy> copies;

  AllocResult result = a.append_tokens({other, s, fork}, {9, 1, 1}, true, &copies);
  CHECK(result.status == AllocStatus::kOutOfPages);
  CHECK(result.pages_needed > result.pages_free && result.pages_free == a.free_pages());
  CHECK(copies.empty());
  CHECK(Snapshot(a, {s, fork, other}) == before);

  result = a.append_tokens({s}, {std::numeric_limits<int32_t>::max() - 17}, false, &copies);
  CHECK(result.status == AllocStatus::kOutOfPages);
  CHECK(Snapshot(a, {s, fork, other}) == before);

  std::vector<int64_t> all(17);
  std::iota(all.begin(), all.end(), 0);
  result = a.make_writable(s, {{{1, 1, 1, 1}, all}}, &copies);
  CHECK(result.status == AllocStatus::kOutOfPages);
  CHECK_EQ(result.pages_needed, 20);
  CHECK(Snapshot(a, {s, fork, other}) == before);

  SegmentId untouched = -5;
  CHECK(a.create_segment(17, 0, &untouched).status == AllocStatus::kOutOfPages);
  CHECK_EQ(untouched, -5);
  CHECK(Snapshot(a, {s, fork, other}) == before);
}

TEST(statistics_count_every_page_once) {
  SegmentAllocator a(config(64));
  const SegmentId kept = segment_of(a, 4);
  const SegmentId dropped = segment_of(a, 4);
  const SessionId s = a.create_session(mixed(4, 0));
  a.append_segment(s, kept);
  a.append_segment(s, kept);  // one owner, though it holds the pages twice
  a.append_segment(s, dropped);
  append(a, {s}, {1});
  const SessionId swapped = a.create_session({{4, 0}, {}, {4, 0}, {}});
  a.append_segment(swapped, dropped);  // each of its heads is global in one of the sessions
  a.release_segment(dropped);
  const AllocatorStats stats = a.stats();
  CHECK_EQ(stats.segment_pages, 4);
  CHECK_EQ(stats.session_global_pages, 4 + 2);
  CHECK_EQ(stats.session_local_pages, 2);
  CHECK_EQ(stats.num_free_pages, 64 - 12);
  CHECK_EQ(stats.shared_pages, 8);
  CHECK_EQ(stats.num_segments, 1);
  CHECK_EQ(stats.num_sessions, 2);
  CHECK_EQ(stats.bytes_per_page, 64);
  CHECK_EQ(a.session_pages(s), 12);
  CHECK_EQ(a.session_private_pages(s), 4);
}

TEST(hostile_input_is_refused_in_the_callers_words) {
  SegmentAllocator a(config(64));
  const SegmentId segment = segment_of(a, 4);
  const SessionId s = a.create_session(mixed(4, 0));
  append(a, {s}, {6});
  SegmentId out = 0;
  std::vector<PageCopy> copies;
  const int64_t big = std::numeric_limits<int64_t>::max();
  const Snapshot before(a, {s});
  CHECK_THROWS(SegmentAllocator(AllocatorConfig{}), "num_layers must be >= 1, got 0");
  CHECK_THROWS(a.create_segment(0, 0, &out), "create_segment: num_tokens must be >= 1, got 0");
  CHECK_THROWS(a.create_segment(4, -1, &out), "first_position must be >= 0, got -1");
  CHECK_THROWS(a.create_segment(big, 1, &out), "first_position + num_tokens must be <= 2147483647");
  CHECK_THROWS(a.create_segment(1, big, &out), "first_position + num_tokens must be <= 2147483647");
  CHECK_THROWS(a.create_session({}), "rules must be [num_layers * num_kv_heads] = [4], got [0]");
  CHECK_THROWS(a.create_session(mixed(0, 0)), "got 0 in layer 0, head 1");
  CHECK_THROWS(a.create_session(mixed(4, -1)), "sink must be >= 0, got -1");
  CHECK_THROWS(a.append_tokens({s, s}, {1, 1}, false, &copies), "is given twice");
  CHECK_THROWS(a.append_tokens({s}, {1, 1}, false, &copies), "one entry per session");
  CHECK_THROWS(a.append_tokens({s}, {-1}, false, &copies), "num_tokens[0] must be >= 0, got -1");
  CHECK_THROWS(a.append_tokens({s}, {big}, false, &copies), "at most 2147483647 tokens");
  CHECK_THROWS(a.append_tokens({segment}, {1}, false, &copies), "session 1 is unknown");
  CHECK_THROWS(a.append_segment(s, s), "segment 2 is unknown");
  CHECK_THROWS(a.segment_slots(segment, 2), "layer must be in [0, 2), got 2");
  CHECK_THROWS(a.rows({s}, -1), "rows: layer must be in [0, 2), got -1");
  CHECK_THROWS(a.tail_slots(s, 0, 7), "num_tokens must be in [0, 6], got 7");
  CHECK_THROWS(a.position_slots(s, 0, {1, 1}), "sorted and unique, got 1 at index 1 behind 1");
  CHECK_THROWS(a.position_slots(s, 0, {6}), "positions must be in [0, 6), got 6 at index 0");
  CHECK_THROWS(a.make_writable(s, {{{1, 0}, {}}}, &copies), "head_mask must be");
  CHECK_THROWS(a.make_writable(s, {{{0, 1, 0, 0}, {1}}, {{0, 1, 1, 0}, {2}}}, &copies),
               "requests[1].head_mask names layer 0, head 1");
  CHECK_THROWS(a.truncate(s, 7), "length must be in [0, 6], got 7");
  CHECK(Snapshot(a, {s}) == before);

  a.release_session(s);
  a.release_segment(segment);
  CHECK_THROWS(a.release_session(s), "unknown (never created, or already released)");
  CHECK_THROWS(a.release_segment(segment), "release_segment: segment 1 is unknown");
  CHECK_THROWS(a.expire(s), "expire: session 2 is unknown");
  CHECK_EQ(a.free_pages(), 64);
}

}  // namespace
