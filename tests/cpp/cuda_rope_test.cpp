// Which keys a run of rope_realign turns, without a GPU: every key once, by its own offset.
#include <map>

#include "check.h"
#include "cuda/rope/key_rows.h"

namespace {

using namespace redknot;
using gpu::KeyRows;
using gpu::PageKeys;
using gpu::TokenKeys;

struct Turn {
  int64_t out;
  int32_t offset;
  bool operator==(const Turn&) const = default;
};

// Every key that a kernel over `keys` turns: element of k -> element of out and offset.
template <typename Keys>
std::map<int64_t, Turn> all_turns(const Keys& keys) {
  std::map<int64_t, Turn> turns;
  for (int64_t group = 0; group < keys.num_groups(); ++group) {
    for (int64_t run = 0; run < keys.num_runs(); ++run) {
      const KeyRows rows = keys(group, run);
      for (int64_t row = 0; row < rows.num_rows; ++row) {
        const Turn turn{rows.out_begin + row * rows.out_stride, rows.offset};
        const bool is_new = turns.emplace(rows.k_begin + row * rows.k_stride, turn).second;
        CHECK(is_new);
      }
    }
  }
  return turns;
}

TEST(every_head_of_every_token_turns_once) {
  for (const int64_t num_heads : {1, 7, 8, 9, 40}) {
    const std::vector<int32_t> offsets = {5, 0, -3};
    const int k = 0, out = 0;
    const TokenKeys keys{{.k = &k,
                          .out = const_cast<int*>(&out),
                          .maybe_offsets = offsets.data(),
                          .num_tokens = 3,
                          .num_heads = num_heads,
                          .k_token_stride = 10000,
                          .k_head_stride = 64,
                          .out_token_stride = 20000,
                          .out_head_stride = 128}};
    const auto turns = all_turns(keys);
    CHECK_EQ(static_cast<int64_t>(turns.size()), 3 * num_heads);
    for (int64_t token = 0; token < 3; ++token) {
      for (int64_t head = 0; head < num_heads; ++head) {
        const Turn expected{token * 20000 + head * 128, offsets[token]};
        CHECK(turns.at(token * 10000 + head * 64) == expected);
      }
    }
  }
}

TEST(keys_that_stay_are_not_touched_in_place) {
  int k = 0;
  const std::vector<int32_t> offsets = {0, 4};
  const TokenKeys keys{{.k = &k,
                        .out = &k,
                        .maybe_offsets = offsets.data(),
                        .num_tokens = 2,
                        .num_heads = 2,
                        .k_token_stride = 16,
                        .k_head_stride = 8,
                        .out_token_stride = 16,
                        .out_head_stride = 8}};
  const auto turns = all_turns(keys);
  CHECK_EQ(turns.size(), size_t{2});
  CHECK(turns.count(16) == 1 && turns.count(24) == 1);
}

TEST(every_valid_slot_of_a_page_turns_once) {
  const std::vector<PageRef> pages = {{2, 0, 16, 7}, {0, 16, 5, -2}, {1, 32, 16, 0}, {3, 48, 1, 9}};
  const PageKeys keys{{.page_refs = pages.data(),
                       .num_refs = static_cast<int64_t>(pages.size()),
                       .num_pages = 4,
                       .page_size = 16,
                       .k_page_stride = 4096,
                       .k_slot_stride = 64}};
  const auto turns = all_turns(keys);
  CHECK_EQ(turns.size(), size_t{16 + 5 + 1});
  for (const PageRef& page : pages) {
    for (int64_t slot = 0; page.rotation_offset != 0 && slot < page.num_valid; ++slot) {
      const int64_t at = page.page * int64_t{4096} + slot * 64;
      const Turn expected{at, page.rotation_offset};
      CHECK(turns.at(at) == expected);
    }
  }
}

}  // namespace
