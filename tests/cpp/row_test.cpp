#include "memory/row.h"

#include <deque>
#include <random>

#include "check.h"

namespace {

using redknot::HeadRule;
using redknot::kGlobalWindow;
using redknot::PageRef;
using redknot::memory::end_position;
using redknot::memory::Row;

constexpr int32_t kPageSize = 4;

// A row of full pages 100, 101, ... over [0, length), the last one possibly ragged.
Row make_row(HeadRule rule, int32_t length) {
  Row row(rule);
  for (int32_t first = 0; first < length; first += kPageSize) {
    row.reserve_back(1);
    row.push_back({100 + first / kPageSize, first, std::min(kPageSize, length - first), 0});
  }
  return row;
}

std::vector<int64_t> slots_of(const Row& row, const std::vector<int64_t>& positions) {
  std::vector<int64_t> slots(2 * positions.size(), -7);
  row.find_slots(positions, kPageSize, slots.data(), 2);
  for (size_t i = 0; i < positions.size(); ++i) {
    CHECK_EQ(slots[2 * i + 1], -7);  // the neighbour's column
    slots[i] = slots[2 * i];
  }
  slots.resize(positions.size());
  return slots;
}

TEST(page_expires_exactly_when_its_last_token_leaves_the_window) {
  const Row row = make_row({.window = 6, .sink = 0}, 12);  // pages end at 4, 8, 12
  // The query at position n sees j > n - 6: page [0, 4) goes when 3 <= n - 6.
  CHECK_EQ(row.expired(8).size(), 0u);
  CHECK_EQ(row.expired(9).size(), 1u);
  CHECK_EQ(row.expired(12).size(), 1u);
  CHECK_EQ(row.expired(13).size(), 2u);
}

TEST(global_row_never_expires) {
  CHECK_EQ(make_row({.window = kGlobalWindow, .sink = 2}, 400).expired(1 << 30).size(), 0u);
}

TEST(pages_with_a_sink_position_stay_in_front) {
  Row row = make_row({.window = 4, .sink = 5}, 20);  // pages 100 and 101 hold positions < 5
  CHECK_EQ(row.expired(20).size(), 2u);
  CHECK_EQ(row.expired(20)[0].page, 102);
  row.drop_expired(2);
  CHECK_EQ(row.size(), 3u);
  CHECK_EQ(row.refs()[0].page, 100);
  CHECK_EQ(row.refs()[1].page, 101);
  CHECK_EQ(row.refs()[2].page, 104);
  row.pop_back();
  row.pop_back();
  row.pop_back();
  CHECK_EQ(row.size(), 0u);
  CHECK_EQ(row.expired(1 << 20).size(), 0u);
}

TEST(tail_expires_only_with_a_window_of_one) {
  const Row narrow = make_row({.window = 1, .sink = 1}, 8);
  CHECK(narrow.tail_expires(narrow.expired(8).size()));
  const Row wider = make_row({.window = 2, .sink = 1}, 8);
  CHECK(!wider.tail_expires(wider.expired(8).size()));
  CHECK(!make_row({.window = 1, .sink = 9}, 8).tail_expires(0));
}

TEST(slots_of_held_and_missing_positions) {
  Row row = make_row({.window = 4, .sink = 2}, 18);
  row.drop_expired(row.expired(18).size());  // holds [0, 4) and [12, 18)
  const std::vector<int64_t> slots = slots_of(row, {0, 3, 4, 11, 12, 13, 16, 17});
  const std::vector<int64_t> expected{400, 403, -1, -1, 412, 413, 416, 417};
  CHECK(slots == expected);
  CHECK(slots_of(Row({}), {0, 5}) == (std::vector<int64_t>{-1, -1}));
}

TEST(truncation_is_refused_when_the_shorter_row_would_miss_a_token) {
  Row row = make_row({.window = 6, .sink = 2}, 40);
  row.drop_expired(row.expired(40).size());  // gap [4, 32)
  CHECK_EQ(row.refs()[1].first_position, 32);
  CHECK(row.can_truncate(40, 40));
  CHECK(row.can_truncate(40, 37));   // sees j > 31
  CHECK(!row.can_truncate(40, 36));  // sees 31
  CHECK(!row.can_truncate(40, 5));   // sees 4
  CHECK(row.can_truncate(40, 4));    // all of it is in the pinned page
  CHECK(row.can_truncate(40, 0));
  CHECK(make_row({.window = kGlobalWindow, .sink = 0}, 40).can_truncate(40, 1));
}

// The ring against a deque, over slides, growth, crops and bursts.
TEST(long_walk_agrees_with_a_deque) {
  std::mt19937 random(7);
  for (const HeadRule rule : {HeadRule{9, 0}, HeadRule{16, 6}, HeadRule{kGlobalWindow, 3}}) {
    Row row(rule);
    std::deque<PageRef> model;
    int32_t length = 0;
    for (int step = 0; step < 3000; ++step) {
      const int32_t action = random() % 8;
      if (action < 5) {
        const int32_t count = 1 + random() % kPageSize;
        const PageRef ref{step, length, count, step % 3};
        row.reserve_back(1);
        row.push_back(ref);
        model.push_back(ref);
        length += count;
      } else if (action == 5 && !model.empty()) {
        length = std::min<int64_t>(length, model.back().first_position);
        row.pop_back();
        model.pop_back();
      } else {
        row.drop_expired(row.expired(length).size());
        std::erase_if(model, [&](const PageRef& ref) {
          return rule.window >= 0 && ref.first_position >= rule.sink &&
                 end_position(ref) - 1 <= length - rule.window;
        });
      }
      CHECK_EQ(row.size(), model.size());
      for (size_t i = 0; i < model.size(); ++i) {
        CHECK_EQ(row.refs()[i].page, model[i].page);
        CHECK_EQ(row.refs()[i].first_position, model[i].first_position);
      }
    }
  }
}

}  // namespace
