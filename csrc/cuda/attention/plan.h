#pragma once

#include <cstdint>

#include "cuda/attention/tile_shape.h"
#include "cuda/common/host_device.h"
#include "redknot/attention.h"
#include "redknot/planner.h"

// The work list of seg_paged_attention on a GPU: which (row, query tile, range of pages) there is,
// and in which order. It is made on the device from row_indptr and cu_seqlens_q (plan_kernel.cuh),
// in a buffer whose size follows from shapes alone, so that a captured graph stays right when
// lengths change. Items are ordered longest first; block b of a persistent grid takes every item
// that item_of_round() gives it. What is summed in which order does not depend on the grid.
namespace redknot::gpu {

// Splitting long rows stops here: 1,024 items are 4 rounds of 2 blocks on each of 132 SMs, so that
// the last round costs little; partial results stay below 3 % of the pages they stand for.
constexpr int64_t kDecodeItemsGoal = 1024;
// Keys of a decode item at least: 512 KiB of K and V at 128 dimensions in bf16; a partial result is
// 8 KiB.
constexpr int64_t kDecodeItemKeys = 1024;
// Tiles of a prefill are split only when they are too few to fill the GPU: a question of some
// tokens over a long cached context.
constexpr int64_t kPrefillItemsGoal = 512;
constexpr int64_t kPrefillItemKeys = 2048;

struct GpuPlanHeader {
  int32_t magic;
  int32_t num_items;
  int32_t num_prefill_items;  // the first of the items
  int32_t num_partial_rows;
  int32_t num_rows;
  int32_t num_tokens;
  int32_t refs_per_decode_item;
  int32_t splits_per_prefill_tile;  // at most
};
static_assert(sizeof(GpuPlanHeader) == 8 * sizeof(int32_t));
constexpr int32_t kGpuPlanMagic = 0x524b4731;

// What a plan is made from; the arrays are one layer's.
struct GpuPlanInput {
  const int32_t* row_indptr;    // [num_rows + 1]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* q_positions;   // [num_tokens]
  const int32_t* row_window;    // [num_rows]
  const int32_t* row_sink;      // [num_rows]
  int64_t num_seqs;
  int64_t num_kv_heads;
  int64_t num_q_heads;
  int64_t num_tokens;
  int64_t page_size;

  RK_HOST_DEVICE int64_t num_rows() const { return num_seqs * num_kv_heads; }
  RK_HOST_DEVICE int64_t group_size() const { return num_q_heads / num_kv_heads; }
};

RK_HOST_DEVICE inline int64_t ceil_div(int64_t n, int64_t divisor) {
  return (n + divisor - 1) / divisor;
}

inline GpuPlanInput plan_input(const SegPagedAttentionParams& params) {
  return {params.row_indptr,
          params.cu_seqlens_q,
          params.q_positions,
          params.row_window,
          params.row_sink,
          params.num_seqs,
          params.num_kv_heads,
          params.num_q_heads,
          params.num_tokens,
          params.pool.page_size};
}

// --- sizes that follow from shapes
// ----------------------------------------------------------------
RK_HOST_DEVICE inline int64_t max_items(const GpuPlanInput& in) {
  const int64_t tokens_per_tile = kPrefillRows / in.group_size();
  return in.num_rows() + ceil_div(in.num_tokens * in.num_kv_heads, tokens_per_tile) +
         kDecodeItemsGoal + kPrefillItemsGoal;
}

// Of all split tiles: every decode item that is not its row's last holds a full share of the goal.
RK_HOST_DEVICE inline int64_t max_partial_rows(const GpuPlanInput& in) {
  const int64_t all = in.num_tokens * in.num_q_heads;
  const int64_t decode = 2 * kDecodeItemsGoal * kDecodeRows;
  const int64_t prefill = kPrefillItemsGoal * kPrefillRows;
  const bool may_prefill = in.num_tokens * in.group_size() > kDecodeRows;
  return all == 0 ? 0 : decode + (may_prefill ? prefill : 0);
}

// Offsets in words of 4 bytes.
struct GpuPlanLayout {
  int64_t row_item;     // [num_rows + 1] first item of each row, before sorting
  int64_t row_partial;  // [num_rows] first partial row of each row
  int64_t items;        // [max_items] WorkItem, 16-byte aligned
  int64_t num_words;

  RK_HOST_DEVICE explicit GpuPlanLayout(const GpuPlanInput& in) {
    row_item = sizeof(GpuPlanHeader) / sizeof(int32_t);
    row_partial = row_item + in.num_rows() + 1;
    items = (row_partial + in.num_rows() + 3) / 4 * 4;
    num_words = items + max_items(in) * static_cast<int64_t>(sizeof(WorkItem) / sizeof(int32_t));
  }
};

// What the attention kernels need to know of it: 64-bit divisions are slow on a GPU.
struct PlanShape {
  int64_t items;  // offset of the items in words
  int32_t group_size;

  explicit PlanShape(const GpuPlanInput& in)
      : items(GpuPlanLayout(in).items), group_size(static_cast<int32_t>(in.group_size())) {}
};

// --- one row ----------------------------------------------------------------------------------
// Sums over all rows that decide how far rows are split.
struct PlanTotals {
  int64_t decode_refs;
  int64_t prefill_tiles;
};

struct PlanSplits {
  int64_t refs_per_decode_item;
  int64_t splits_per_prefill_tile;

  RK_HOST_DEVICE PlanSplits(const PlanTotals& totals, int64_t page_size) {
    const int64_t least = kDecodeItemKeys > page_size ? kDecodeItemKeys / page_size : 1;
    const int64_t balanced = ceil_div(totals.decode_refs, kDecodeItemsGoal);
    refs_per_decode_item = balanced > least ? balanced : least;
    const int64_t splits = totals.prefill_tiles > 0 ? kPrefillItemsGoal / totals.prefill_tiles : 1;
    splits_per_prefill_tile = splits > 1 ? splits : 1;
  }
};

struct PlanRow {
  int32_t row;
  int32_t q_begin, q_end;
  int32_t ref_begin, ref_end;
  bool is_prefill;
  int32_t tile_tokens;
  int32_t num_tiles;
  int32_t num_splits;  // of every tile; before PlanSplits is known: 1

  RK_HOST_DEVICE PlanRow(const GpuPlanInput& in, int64_t number) {
    const auto seq = static_cast<int32_t>(number / in.num_kv_heads);
    const auto group = static_cast<int32_t>(in.group_size());
    row = static_cast<int32_t>(number);
    q_begin = in.cu_seqlens_q[seq];
    q_end = in.cu_seqlens_q[seq + 1];
    ref_begin = in.row_indptr[number];
    ref_end = in.row_indptr[number + 1];
    is_prefill = int64_t{q_end - q_begin} * group > kDecodeRows;
    tile_tokens = is_prefill ? kPrefillRows / group : q_end - q_begin;
    num_tiles = q_end > q_begin ? (q_end - q_begin + tile_tokens - 1) / tile_tokens : 0;
    num_splits = 1;
  }

  RK_HOST_DEVICE int32_t num_refs() const { return ref_end - ref_begin; }

  RK_HOST_DEVICE void split(const PlanSplits& splits, int64_t page_size) {
    const int64_t least = kPrefillItemKeys > page_size ? kPrefillItemKeys / page_size : 1;
    int64_t count = ceil_div(num_refs(), is_prefill ? least : splits.refs_per_decode_item);
    if (is_prefill && count > splits.splits_per_prefill_tile) {
      count = splits.splits_per_prefill_tile;
    }
    num_splits = count > 1 ? static_cast<int32_t>(count) : 1;
  }

  RK_HOST_DEVICE int32_t num_items() const { return num_tiles * num_splits; }
  RK_HOST_DEVICE int32_t rows_of_partial() const { return is_prefill ? kPrefillRows : kDecodeRows; }
  RK_HOST_DEVICE int32_t num_partial_rows() const {
    return num_splits > 1 ? num_items() * rows_of_partial() : 0;
  }

  // Item `number` of the row: all splits of a tile, then the next tile.
  RK_HOST_DEVICE WorkItem item(int32_t number, int32_t first_partial) const {
    const int32_t tile = number / num_splits;
    const int32_t split = number - tile * num_splits;
    const int32_t begin = q_begin + tile * tile_tokens;
    const int32_t end = begin + tile_tokens < q_end ? begin + tile_tokens : q_end;
    // Equal shares, so that no split is left with a single page.
    const int64_t refs = num_refs();
    return {row,
            begin,
            end,
            static_cast<int32_t>(ref_begin + refs * split / num_splits),
            static_cast<int32_t>(ref_begin + refs * (split + 1) / num_splits),
            split,
            num_splits,
            num_splits > 1 ? first_partial + number * rows_of_partial() : -1};
  }
};

// --- the order ----------------------------------------------------------------------------------
constexpr int kCostClasses = 32;
constexpr int kPlanClasses = 2 * kCostClasses;  // prefill, then decode

// Blocks of 64 keys that the item reads, from positions alone, and one for its beginning and end.
RK_HOST_DEVICE inline int32_t item_cost(const GpuPlanInput& in, const WorkItem& item) {
  const int64_t stored = int64_t{item.ref_end - item.ref_begin} * in.page_size;
  const int64_t first = in.q_positions[item.q_begin], last = in.q_positions[item.q_end - 1];
  const int64_t window = in.row_window[item.row];
  const int64_t reach = window < 0 ? last + 1 : in.row_sink[item.row] + window + last - first;
  const int64_t share = ceil_div(reach < last + 1 ? reach : last + 1, item.num_splits);
  return static_cast<int32_t>(ceil_div(stored < share ? stored : share, 64) + 1);
}

// Two classes per octave of the cost, the most expensive first: items of a class differ by less
// than half.
RK_HOST_DEVICE inline int cost_class(int32_t cost) {
  int octave = 0;
  while (octave < 15 && (cost >> (octave + 1)) != 0) ++octave;
  const int half = octave > 0 ? (cost >> (octave - 1)) & 1 : 0;
  const int number = cost >> 16 ? kCostClasses - 1 : 2 * octave + half;
  return kCostClasses - 1 - number;
}

RK_HOST_DEVICE inline int plan_class(const GpuPlanInput& in,
                                     const WorkItem& item,
                                     bool is_prefill) {
  return (is_prefill ? 0 : kCostClasses) + cost_class(item_cost(in, item));
}

// The items that block `block` of `num_blocks` takes, round by round: there and back, so that who
// took the longest of one round takes the shortest of the next.
RK_HOST_DEVICE inline int32_t item_of_round(int32_t round, int32_t block, int32_t num_blocks) {
  return round * num_blocks + (round % 2 == 0 ? block : num_blocks - 1 - block);
}

}  // namespace redknot::gpu
