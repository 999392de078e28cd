// The attention kernels against fp64, in every schedule.
#include "attention_case.hpp"

namespace {

using namespace redknot::gpu;
using redknot::kGlobalWindow;
using BF16 = __nv_bfloat16;

// Two sequences of two KV heads: a global and a local row each, prefill beside decode.
Case ragged(int32_t group, int32_t page_size) {
  return {.rows = {{{0, 75}}, {{0, 4}, {32, 43}}, {{0, 150}}, {{0, 8}, {100, 50}}},
          .q_positions = {range(45, 75), {149}},
          .group = group,
          .page_size = page_size,
          .window = {kGlobalWindow, 20, kGlobalWindow, 33},
          .sink = {0, 4, 0, 8}};
}

TEST(bf16_head_dim_64_group_1) { expect_right<BF16, 64>(ragged(1, 16)); }
TEST(bf16_head_dim_64_group_4) { expect_right<BF16, 64>(ragged(4, 64)); }
TEST(bf16_head_dim_64_group_8) { expect_right<BF16, 64>(ragged(8, 32)); }
TEST(bf16_head_dim_32) { expect_right<BF16, 32>(ragged(4, 48)); }
TEST(bf16_head_dim_128) { expect_right<BF16, 128>(ragged(4, 128)); }
TEST(bf16_head_dim_256) { expect_right<BF16, 256>(ragged(2, 256)); }
TEST(fp16_head_dim_32) { expect_right<__half, 32>(ragged(2, 64)); }
TEST(fp16_head_dim_64) { expect_right<__half, 64>(ragged(3, 16)); }
TEST(fp16_head_dim_128) { expect_right<__half, 128>(ragged(8, 64)); }
TEST(fp16_head_dim_256) { expect_right<__half, 256>(ragged(1, 32)); }

TEST(pages_of_any_multiple_of_8) {
  for (const int32_t page_size : {8, 24, 40, 80, 192}) expect_right<BF16, 64>(ragged(4, page_size));
  expect_right<BF16, 128>(ragged(4, 8));
  expect_right<BF16, 256>(ragged(2, 24));
}

TEST(head_dim_256_within_99_kib_of_shared_memory) {
  expect_right<BF16, 256, true>(ragged(2, 256));
  expect_right<__half, 256, true>(
      {.rows = {{{0, 20}, {20, 60, -20}}}, .q_positions = {range(50, 80)}, .softcap = 3.0f});
}

// One row; as decode, and with more query rows than its tile holds, as prefill.
void expect_right_row(std::vector<Run> keys,
                      std::vector<int32_t> queries,
                      int32_t window = kGlobalWindow,
                      int32_t sink = 0) {
  for (const int32_t group : {1, 4}) {
    expect_right<BF16, 64>({.rows = {keys},
                            .q_positions = {queries},
                            .group = group,
                            .window = {window},
                            .sink = {sink}});
  }
}

TEST(one_token) { expect_right_row({{0, 1}}, {0}); }
TEST(a_page_border) {
  expect_right_row({{0, 15}}, range(0, 15));
  expect_right_row({{0, 16}}, range(0, 16));
  expect_right_row({{0, 17}}, range(0, 17));
}
TEST(a_window_of_one) { expect_right_row({{0, 50}}, range(0, 50), 1); }
TEST(a_window_longer_than_the_text) { expect_right_row({{0, 40}}, range(0, 40), 100, 4); }
TEST(a_window_longer_than_any_text) { expect_right_row({{0, 40}}, range(0, 40), INT32_MAX, 4); }
TEST(a_sink_that_overlaps_the_window) { expect_right_row({{0, 60}}, range(0, 60), 40, 30); }
TEST(a_sink_inside_a_page) { expect_right_row({{0, 90}}, range(60, 90), 8, 5); }
TEST(a_sink_alone) { expect_right_row({{0, 70}}, range(40, 70), 0, 4); }
TEST(a_gap_behind_the_sink) { expect_right_row({{0, 5}, {64, 40}}, range(80, 104), 30, 5); }
TEST(queries_with_gaps) { expect_right_row({{0, 90}}, {0, 1, 17, 40, 41, 89}); }
TEST(queries_before_all_keys) { expect_right_row({{50, 20}}, range(40, 60)); }
TEST(keys_behind_the_window) { expect_right_row({{0, 20}}, range(60, 70), 10); }
TEST(far_positions) {
  expect_right_row({{2'000'000'000, 40}}, range(2'000'000'020, 2'000'000'040), 9);
}
TEST(a_long_row_that_is_mostly_unseen) { expect_right_row({{0, 1200}}, range(1190, 1200), 20, 4); }

TEST(empty_rows_and_sequences) {
  expect_right<BF16, 64>({.rows = {{}, {{0, 9}}, {{0, 3}}, {}, {{0, 5}}, {{0, 5}}},
                          .q_positions = {range(0, 9), {}, {4}},
                          .group = 2});
  expect_right<BF16, 64>({.rows = {{}}, .q_positions = {range(0, 30)}});
}

TEST(segments_that_moved) {
  // A prefix, two moved documents, fresh keys; offsets change within a block of keys.
  const std::vector<Run> global = {{0, 10}, {10, 70, 10}, {80, 45, 80}, {125, 20}};
  const std::vector<Run> local = {{0, 4}, {100, 25, 80}, {125, 20}};
  for (const int32_t rotary_dim : {64, 24}) {
    expect_right<BF16, 64>({.rows = {global, local, global, local},
                            .q_positions = {range(125, 145), {144}},
                            .group = 4,
                            .window = {kGlobalWindow, 40},
                            .sink = {0, 4},
                            .rotary_dim = rotary_dim});
  }
  expect_right<__half, 256>({.rows = {{{0, 20}, {20, 60, -20}}}, .q_positions = {{79}}});
  expect_right<BF16, 128>({.rows = {{{0, 20}, {20, 60, 100000}}}, .q_positions = {range(60, 80)}});
}

// A block of threads takes several of them; queries fill the tile and are turned between blocks of
// keys that all warps share.
TEST(decode_items_that_follow_each_other) {
  const std::vector<Run> moved = {{0, 70, 20}, {70, 90, -31}, {160, 128, 7}, {288, 10}};
  const std::vector<Run> local = {{0, 4}, {200, 98}};
  for (const int32_t group : {8, 16}) {
    expect_right<BF16, 64>({.rows = {moved, local, local, moved, moved, moved, local, moved},
                            .q_positions = {{297}, {297}, {250}, {299}},
                            .group = group,
                            .page_size = 32,
                            .window = {kGlobalWindow, 90, 40, kGlobalWindow},
                            .sink = {0, 4}});
  }
}

TEST(interleaved_pairs_that_moved) {
  for (const int32_t rotary_dim : {64, 24}) {
    expect_right<BF16, 64>({.rows = {{{0, 10}, {10, 70, 10}}, {{0, 4}, {60, 40, -33}}},
                            .q_positions = {range(80, 90)},
                            .group = 4,
                            .window = {kGlobalWindow, 30},
                            .sink = {0, 4},
                            .rotary_dim = rotary_dim,
                            .interleaved = true});
  }
  expect_right<__half, 128>({.rows = {{{0, 60, 17}}}, .q_positions = {{59}}, .interleaved = true});
}

// Caps that bend every score, and one that bends hardly any; products reach 50 here.
TEST(soft_caps) {
  for (const float softcap : {2.0f, 30.0f}) {
    Case c = ragged(4, 16);
    c.scale = 1.0f;
    c.softcap = softcap;
    expect_right<BF16, 64>(c);
  }
  for (const bool is_prefill : {false, true}) {
    expect_right<__half, 256>({.rows = {{{0, 90, 5}}},
                               .q_positions = {is_prefill ? range(60, 90) : range(89, 90)},
                               .softcap = 1.0f});
  }
}

TEST(rows_that_are_split) {
  PagedAttention<BF16, 64> decode(
      {.rows = {{{0, 2500}}, {{0, 1024}}}, .q_positions = {{2499}}, .group = 2, .page_size = 128});
  CHECK(decode.num_partial_rows() == 3 * 16);
  PagedAttention<BF16, 64> prefill(
      {.rows = {{{0, 4200}}}, .q_positions = {range(4180, 4200)}, .page_size = 256});
  CHECK(prefill.num_partial_rows() == 3 * 128);
  for (const simt::Schedule& schedule : {simt::kSchedules[1], simt::kSchedules[2]}) {
    CHECK(decode.error(schedule) < kTolerance);
    CHECK(prefill.error(schedule) < kTolerance);
  }
}

// What builds for debugging say of references that would otherwise be followed anywhere.
void expect_refused(std::vector<int32_t> queries,
                    const char* message,
                    const std::function<void(PagedAttention<BF16, 64>&)>& spoil) {
  PagedAttention<BF16, 64> attention({.rows = {{{0, 200}}}, .q_positions = {std::move(queries)}});
  spoil(attention);
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK_THROWS(attention.error(schedule), message);
  }
}

TEST(bad_references_are_found_before_they_are_followed) {
  for (const auto& queries : {range(199, 200), range(150, 200)}) {
    const char* page = "page_refs must name pages below num_pages";
    expect_refused(queries, page, [](auto& a) { a.page_ref(3).page = a.num_pages(); });
    expect_refused(queries, page, [](auto& a) { a.page_ref(12).page = -1; });
    // Even where no query looks: the reference behind it might be seen at the next step.
    const char* valid = "page_refs must have 0 to page_size valid slots";
    expect_refused(queries, valid, [](auto& a) { a.page_ref(0).num_valid = 17; });
    expect_refused(queries, valid, [](auto& a) { a.page_ref(5).num_valid = -2; });
  }
}

TEST(the_grid_changes_no_bit) {
  PagedAttention<BF16, 64> attention(ragged(4, 16));
  attention.error(simt::kSchedules[0], 1);
  const auto bits = [](const std::vector<BF16>& values) {
    std::vector<uint16_t> all;
    for (const BF16 value : values) all.push_back(value.bits);
    return all;
  };
  const std::vector<uint16_t> first = bits(attention.result());
  attention.error(simt::kSchedules[2], 7);
  CHECK(bits(attention.result()) == first);
}

}  // namespace
