// Preemption, changing rules, growth: what a scheduler asks of the allocator.
#include <set>

#include "check.h"
#include "redknot/segment_allocator.h"

namespace {

using namespace redknot;  // NOLINT: one file, one subject

constexpr int64_t kRows = 4;  // 2 layers x 2 KV heads

AllocatorConfig config(int32_t num_pages) {
  return {.num_layers = 2,
          .num_kv_heads = 2,
          .num_pages = num_pages,
          .page_size = 4,
          .bytes_per_page = 64,
          .poison = nullptr};
}

// Head 0 of each layer is global, head 1 local.
std::vector<HeadRule> mixed(int32_t window, int32_t sink) {
  return {{}, {window, sink}, {}, {window, sink}};
}

void append(SegmentAllocator& a, SessionId session, int64_t num_tokens, bool expire_first = false) {
  std::vector<PageCopy> copies;
  const AllocResult result = a.append_tokens({session}, {num_tokens}, expire_first, &copies);
  CHECK(result.status == AllocStatus::kOk);
}

std::vector<PageRef> row(const SegmentAllocator& a, SessionId s, int64_t layer, int64_t head) {
  const RowTable table = a.rows({s}, layer);
  return {table.page_refs.begin() + table.row_indptr[head],
          table.page_refs.begin() + table.row_indptr[head + 1]};
}

TEST(swapped_pages_come_back_and_forks_share_them_again) {
  SegmentAllocator a(config(64));
  const SessionId s = a.create_session(mixed(8, 1));
  append(a, s, 10);
  const SessionId fork = a.fork_session(s);
  CHECK(a.exclusive_pages({s}).empty());  // the fork holds them too
  const std::vector<int32_t> pages = a.exclusive_pages({s, fork});
  CHECK_EQ(pages.size(), 3 * kRows);
  const std::vector<int32_t> slots = a.swap_out({s, fork}, pages);
  CHECK_EQ(slots.size(), pages.size());
  CHECK_EQ(a.free_pages(), 64);
  CHECK_EQ(a.stats().swapped_pages, static_cast<int64_t>(pages.size()));
  CHECK_THROWS(a.rows({s}, 0), "is swapped out");
  CHECK_THROWS(a.fork_session(fork), "is swapped out");
  CHECK_EQ(a.session_length(fork), 10);
  std::vector<SlotMove> moves;
  CHECK(a.swap_in(s, &moves).status == AllocStatus::kOk);
  CHECK_EQ(moves.size(), pages.size());
  CHECK_EQ(a.stats().swapped_pages, 0);
  CHECK_EQ(row(a, s, 1, 0)[2].page, row(a, fork, 1, 0)[2].page);
  a.release_session(fork);
  a.release_session(s);
  CHECK_EQ(a.free_pages(), 64);
}

TEST(swap_in_without_pages_changes_nothing_and_a_released_slot_is_used_again) {
  SegmentAllocator a(config(3 * kRows));
  const SessionId s = a.create_session(mixed(8, 1));
  append(a, s, 9);
  const std::vector<int32_t> slots = a.swap_out({s}, a.exclusive_pages({s}));
  const SessionId other = a.create_session(mixed(8, 1));
  append(a, other, 9);
  std::vector<SlotMove> moves;
  const AllocResult result = a.swap_in(s, &moves);
  CHECK(result.status == AllocStatus::kOutOfPages);
  CHECK_EQ(result.pages_needed, 3 * kRows);
  CHECK(moves.empty());
  CHECK_EQ(a.stats().swapped_pages, 3 * kRows);
  a.release_session(s);
  CHECK_EQ(a.stats().swapped_pages, 0);
  const std::vector<int32_t> again = a.swap_out({other}, a.exclusive_pages({other}));
  CHECK(std::set<int32_t>(again.begin(), again.end()) ==
        std::set<int32_t>(slots.begin(), slots.end()));
  CHECK_THROWS(a.swap_out({other}, {0}),
               "held by the given sessions alone, got 0 at index 0");  // not its page any more
}

TEST(rules_narrow_for_good_and_widen_only_over_what_is_held) {
  SegmentAllocator a(config(64));
  const SessionId s = a.create_session(mixed(kGlobalWindow, 0));
  append(a, s, 30);
  int64_t num_freed = 0;
  CHECK_EQ(a.change_rules(s, mixed(8, 5), &num_freed), -1);
  CHECK_EQ(num_freed, 2 * (8 - 2 - 3));  // pages 0, 1 hold the sink; 23..29 lie in pages 5, 6, 7
  CHECK_EQ(a.change_rules(s, mixed(kGlobalWindow, 0), &num_freed), 1);
  CHECK_EQ(a.change_rules(s, mixed(12, 5), &num_freed), 1);
  CHECK_EQ(a.change_rules(s, mixed(8, 9), &num_freed), 1);
  CHECK_EQ(a.change_rules(s, mixed(11, 8), &num_freed), -1);  // what lies in the same pages
  CHECK_EQ(a.change_rules(s, mixed(8, 0), &num_freed), -1);
  CHECK_EQ(num_freed, 2 * 2);
  CHECK_EQ(row(a, s, 0, 1).size(), 3u);
}

TEST(growth_is_bounded_by_the_window) {
  SegmentAllocator a(config(512));
  const SessionId s = a.create_session(mixed(8, 1));
  append(a, s, 2);
  CHECK_EQ(a.growth_pages({s}, {0}), 0);
  CHECK_EQ(a.growth_pages({s}, {2}), 0);
  CHECK_EQ(a.growth_pages({s}, {3}), kRows);
  CHECK_EQ(a.growth_pages({s}, {100}), 2 * 25 + 2 * 3);  // a window of 8 lies in 3 pages
  const int64_t bound = a.growth_pages({s}, {100});
  const int64_t free = a.free_pages();
  for (int i = 0; i < 100; ++i) {
    append(a, s, 1, true);
    CHECK(free - a.free_pages() <= bound);
  }
  a.fork_session(s);
  CHECK_EQ(a.growth_pages({s}, {1}), kRows);  // the shared tail is copied
}

TEST(a_pool_grows_behind_its_pages) {
  SegmentAllocator a(config(kRows));
  const SessionId s = a.create_session(mixed(8, 1));
  append(a, s, 4);
  const PageRef before = row(a, s, 1, 1)[0];
  a.grow(3 * kRows, nullptr);
  CHECK_EQ(a.free_pages(), 2 * kRows);
  append(a, s, 8);
  CHECK_EQ(row(a, s, 1, 1)[0].page, before.page);
  CHECK_EQ(a.free_pages(), 0);
  CHECK_THROWS(a.grow(kRows, nullptr), "num_pages must be >= 12, got 4");
}

}  // namespace
