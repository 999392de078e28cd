#include "redknot/planner.h"

#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "check.h"

namespace redknot {
namespace {

// The class of a tile by looking at every pair.
TileClass classify_pairs(int64_t key_first,
                         int64_t key_last,
                         int64_t query_first,
                         int64_t query_last,
                         int64_t window,
                         int64_t sink) {
  bool any = false;
  bool all = true;
  for (int64_t key = key_first; key <= key_last; ++key) {
    for (int64_t query = query_first; query <= query_last; ++query) {
      const bool visible = is_visible(key, query, window, sink);
      any |= visible;
      all &= visible;
    }
  }
  return all ? TileClass::kFull : any ? TileClass::kPartial : TileClass::kSkip;
}

template <typename Visit>
void for_each_small_tile(Visit&& visit) {
  for (const int64_t window : {-1, 0, 1, 3, 5, 20}) {
    for (const int64_t sink : {0, 1, 4, 20}) {
      for (int64_t key_first = 0; key_first < 12; ++key_first) {
        for (int64_t keys = 1; keys <= 5; ++keys) {
          for (int64_t query_first = 0; query_first < 14; ++query_first) {
            for (int64_t queries = 1; queries <= 4; ++queries) {
              visit(key_first,
                    key_first + keys - 1,
                    query_first,
                    query_first + queries - 1,
                    window,
                    sink);
            }
          }
        }
      }
    }
  }
}

// Rows of every sequence and head; positions count from 0 unless said.
struct Rows {
  int64_t num_kv_heads = 1;
  int64_t num_q_heads = 1;
  int64_t page_size = 16;
  std::vector<int32_t> refs_per_row = {};
  std::vector<int32_t> queries_per_seq = {};
  std::vector<int32_t> windows = {};  // empty: global

  // What input() points to.
  std::vector<int32_t> row_indptr = {}, cu_seqlens_q = {}, positions = {};
  std::vector<int32_t> row_window = {}, row_sink = {};

  PlanInput input() {
    const auto bounds = [](const std::vector<int32_t>& lengths) {
      std::vector<int32_t> result(1, 0);
      std::partial_sum(lengths.begin(), lengths.end(), std::back_inserter(result));
      return result;
    };
    row_indptr = bounds(refs_per_row);
    cu_seqlens_q = bounds(queries_per_seq);
    positions.clear();
    for (const int32_t count : queries_per_seq) {
      for (int32_t i = 0; i < count; ++i) positions.push_back(i);
    }
    row_window = windows.empty() ? std::vector<int32_t>(refs_per_row.size(), -1) : windows;
    row_sink.assign(refs_per_row.size(), 0);
    return {
        .row_indptr = row_indptr.data(),
        .cu_seqlens_q = cu_seqlens_q.data(),
        .q_positions = positions.data(),
        .row_window = row_window.data(),
        .row_sink = row_sink.data(),
        .num_seqs = static_cast<int64_t>(queries_per_seq.size()),
        .num_kv_heads = num_kv_heads,
        .num_q_heads = num_q_heads,
        .page_size = page_size,
    };
  }
};

Rows mixed_rows() {
  return {
      .num_kv_heads = 2,
      .num_q_heads = 8,
      .refs_per_row = {300, 5, 0, 70, 64, 65},
      .queries_per_seq = {1, 0, 100},
      .windows = {-1, 64, -1, 64, -1, 64},
  };
}

std::vector<WorkItem> items_of(const std::vector<int32_t>& plan) {
  const PlanView view(plan.data());
  return {view.items, view.items + view.header->num_items};
}

}  // namespace

TEST(tile_class_never_lies) {
  for_each_small_tile([](auto... tile) {
    const TileClass got = classify_tile(tile...);
    const TileClass want = classify_pairs(tile...);
    // kPartial is always right; the others must be true.
    CHECK(got == want || got == TileClass::kPartial);
  });
}

TEST(tile_class_is_exact_for_one_query_without_future_keys) {
  for_each_small_tile([](int64_t key_first,
                         int64_t key_last,
                         int64_t query_first,
                         int64_t query_last,
                         int64_t window,
                         int64_t sink) {
    if (query_first != query_last || key_last > query_first) return;
    CHECK(classify_tile(key_first, key_last, query_first, query_last, window, sink) ==
          classify_pairs(key_first, key_last, query_first, query_last, window, sink));
  });
}

TEST(visible_slots_keep_every_visible_key) {
  for_each_small_tile([](int64_t key_first,
                         int64_t key_last,
                         int64_t query_first,
                         int64_t query_last,
                         int64_t window,
                         int64_t sink) {
    const PageRef ref = {.page = 0,
                         .first_position = static_cast<int32_t>(key_first),
                         .num_valid = static_cast<int32_t>(key_last - key_first + 1),
                         .rotation_offset = 0};
    const SlotRange slots = visible_slots(ref, query_first, query_last, window, sink);
    CHECK(0 <= slots.begin && slots.begin <= slots.end && slots.end <= ref.num_valid);
    for (int64_t key = key_first; key <= key_last; ++key) {
      for (int64_t query = query_first; query <= query_last; ++query) {
        if (!is_visible(key, query, window, sink)) continue;
        CHECK(slots.begin <= key - key_first && key - key_first < slots.end);
      }
    }
  });
}

TEST(items_cover_every_query_and_page_once) {
  Rows rows = mixed_rows();
  const PlanInput input = rows.input();
  for (const int64_t workers : {1, 2, 7}) {
    std::map<std::pair<int32_t, int32_t>, std::vector<int32_t>> seen;  // (row, query) -> pages
    for (const WorkItem& item : items_of(make_plan(input, workers))) {
      CHECK(item.q_end - item.q_begin <= max_tile_tokens(4));
      for (int32_t q = item.q_begin; q < item.q_end; ++q) {
        auto& refs = seen[{item.row, q}];
        refs.resize(rows.row_indptr[item.row + 1] - rows.row_indptr[item.row]);
        for (int32_t r = item.ref_begin; r < item.ref_end; ++r) {
          ++refs[r - rows.row_indptr[item.row]];
        }
      }
    }
    CHECK_EQ(seen.size(), 2u * 1 + 2u * 100);
    for (const auto& [key, refs] : seen) {
      for (const int32_t times : refs) CHECK_EQ(times, 1);
    }
  }
}

TEST(workers_change_only_who_does_an_item) {
  Rows rows = mixed_rows();
  const auto sorted = [&](int64_t workers) {
    std::map<std::pair<int32_t, int32_t>, std::vector<WorkItem>> by_tile;
    for (const WorkItem& item : items_of(make_plan(rows.input(), workers))) {
      by_tile[{item.row, item.q_begin}].push_back(item);
    }
    std::vector<int32_t> flat;
    for (auto& [tile, items] : by_tile) {
      std::sort(items.begin(), items.end(), [](const WorkItem& a, const WorkItem& b) {
        return a.split < b.split;
      });
      for (const WorkItem& item : items) {
        flat.insert(flat.end(), {item.ref_begin, item.ref_end, item.num_splits, item.partial});
      }
    }
    return flat;
  };
  CHECK(sorted(1) == sorted(3));
  CHECK(sorted(1) == sorted(64));
}

TEST(decode_is_split_by_pages_and_merged_in_order) {
  Rows rows = {.num_q_heads = 4, .page_size = 64, .refs_per_row = {33}, .queries_per_seq = {1}};
  const std::vector<int32_t> plan = make_plan(rows.input(), 1);
  const std::vector<WorkItem> items = items_of(plan);
  CHECK_EQ(items.size(), 3u);  // 33 pages of 64 keys in shares of at most 1024 keys
  for (size_t i = 0; i < items.size(); ++i) {
    CHECK_EQ(items[i].partial, static_cast<int32_t>(i));
    CHECK_EQ(items[i].split, static_cast<int32_t>(i));
    CHECK_EQ(items[i].ref_end - items[i].ref_begin, 11);
  }
  CHECK_EQ(plan_workspace_floats(plan.data(), 128), 3 * 4 * (128 + 2));
}

TEST(short_rows_are_not_split) {
  Rows rows = {.num_q_heads = 4, .page_size = 64, .refs_per_row = {16}, .queries_per_seq = {1}};
  const std::vector<int32_t> plan = make_plan(rows.input(), 4);
  CHECK_EQ(items_of(plan).size(), 1u);
  CHECK_EQ(items_of(plan)[0].partial, -1);
  CHECK_EQ(plan_workspace_floats(plan.data(), 128), 0);
}

TEST(long_rows_of_many_tiles_are_not_split) {
  const auto most_splits = [](int32_t num_queries) {
    Rows rows = {.num_kv_heads = 2,
                 .num_q_heads = 8,
                 .page_size = 64,
                 .refs_per_row = {600, 600},
                 .queries_per_seq = {num_queries}};
    const std::vector<int32_t> plan = make_plan(rows.input(), 4);
    int32_t most = 0;
    for (const WorkItem& item : items_of(plan)) most = std::max(most, item.num_splits);
    CHECK_EQ(plan_workspace_floats(plan.data(), 128) > 0, most > 1);
    return most;
  };
  CHECK_EQ(most_splits(256), 3);    // 38,400 keys in shares of at most 16,384
  CHECK_EQ(most_splits(16384), 1);  // 256 tiles
}

TEST(work_is_balanced) {
  Rows rows = {.num_kv_heads = 8,
               .num_q_heads = 32,
               .page_size = 64,
               .refs_per_row = std::vector<int32_t>(8, 64),
               .queries_per_seq = {4096},
               .windows = {-1, 256, 256, 256, 256, 256, 256, 256}};
  const PlanInput input = rows.input();
  const std::vector<int32_t> plan = make_plan(input, 16);
  const PlanView view(plan.data());
  std::vector<int64_t> load(16);
  for (int32_t w = 0; w < 16; ++w) {
    for (int32_t i = view.worker_indptr[w]; i < view.worker_indptr[w + 1]; ++i) {
      const WorkItem& item = view.items[i];
      const int64_t last = item.q_end - 1;
      load[w] += item.row == 0 ? last + 1 : std::min<int64_t>(last + 1, 256 + 16);
    }
  }
  const auto [least, most] = std::minmax_element(load.begin(), load.end());
  CHECK(static_cast<double>(*most) < 1.02 * static_cast<double>(*least));
}

TEST(nothing_to_plan) {
  Rows rows;
  const std::vector<int32_t> plan = make_plan(rows.input(), 2);
  CHECK_EQ(items_of(plan).size(), 0u);
  CHECK_EQ(plan_mismatch(rows.input(), plan.data(), static_cast<int64_t>(plan.size())), "");
}

TEST(a_plan_for_other_rows_is_refused) {
  Rows rows = mixed_rows();
  const PlanInput input = rows.input();
  std::vector<int32_t> plan = make_plan(input, 2);
  const auto length = static_cast<int64_t>(plan.size());
  CHECK_EQ(plan_mismatch(input, plan.data(), length), "");
  Rows other = mixed_rows();
  other.refs_per_row[1] += 1;
  CHECK(plan_mismatch(other.input(), plan.data(), length) != "");
  plan.back() += 100000;  // the partial result of the last item
  CHECK_EQ(plan_mismatch(input, plan.data(), length), "an item is out of range");
  CHECK(plan_mismatch(input, plan.data(), 3) != "");
}

}  // namespace redknot
