#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "redknot/paged_kv.h"

// The work list of seg_paged_attention: which (row, query tile, page range) is done by whom.
// What is summed in which order follows from the shapes alone, never from the number of workers,
// so results do not change with the thread count.
namespace redknot {

// --- what a tile of keys and queries has in common --------------------------------------------

enum class TileClass : int8_t { kSkip, kPartial, kFull };

// Keys lie within positions [key_first, key_last], queries within [query_first, query_last].
// kSkip: no pair is visible. kFull: every pair is. kPartial: compare positions one by one.
constexpr TileClass classify_tile(int64_t key_first,
                                  int64_t key_last,
                                  int64_t query_first,
                                  int64_t query_last,
                                  int64_t window,
                                  int64_t sink) {
  if (key_first > query_last) return TileClass::kSkip;
  const bool windowed = window >= 0;
  if (windowed && key_first >= sink && key_last <= query_first - window) return TileClass::kSkip;
  if (key_last > query_first) return TileClass::kPartial;
  const int64_t key_first_behind_sink = key_first < sink ? sink : key_first;
  const bool all_in_window = !windowed || key_last < sink ||  //
                             key_first_behind_sink > query_last - window;
  return all_in_window ? TileClass::kFull : TileClass::kPartial;
}

// Slots [begin, end) of a reference; empty when begin == end.
struct SlotRange {
  int32_t begin;
  int32_t end;
};

// The slots of a reference that some query of a tile may see: future keys are cut off, and keys
// behind the window unless the reference starts in the sink.
constexpr SlotRange visible_slots(
    const PageRef& ref, int64_t query_first, int64_t query_last, int64_t window, int64_t sink) {
  const int64_t first = ref.first_position;
  int64_t begin = 0;
  int64_t end = query_last - first + 1;
  if (window >= 0 && first >= sink) begin = query_first - window + 1 - first;
  if (begin < 0) begin = 0;
  if (end > ref.num_valid) end = ref.num_valid;
  if (begin >= end) return {0, 0};
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// --- tiles and splits ---------------------------------------------------------------------------

// Query rows (tokens x query heads of a group) per tile: a page read and packed once serves them
// all. With 512 rows of 128 dimensions packing is 1/20 of the work, and Q in bf16, O in fp32 and a
// tile of keys take 450 KiB of L2. Kernels whose arithmetic is faster ask for more.
constexpr int64_t kTileRows = 512;
constexpr int64_t kMaxTileRows = 1024;
constexpr int64_t kMinTileRows = 64;
// Tiles that a sequence is cut into, all heads together, before its tiles grow: the threads of a
// large machine want their share of a short prompt.
constexpr int64_t kTilesPerSequence = 32;
// Keys per split of a tile that is bound by reading pages (decode): 512 KiB of K and V at 128
// dimensions in bf16, some ten microseconds; a partial result is 1/250 of it.
constexpr int64_t kDecodeSplitKeys = 1024;
// Keys per split of a tile bound by arithmetic: 1 ms of work. Splitting only serves the tail of a
// schedule there, and writes every sum to memory: a sequence whose tiles are so many that threads
// share them evenly is not split.
constexpr int64_t kPrefillSplitKeys = 16384;
constexpr int64_t kItemsPerSequence = 128;
// Below this many rows a tile is bound by reading pages.
constexpr int64_t kDecodeRows = 16;

// Tokens per tile of a sequence of `num_tokens` queries, of at most `tile_rows` rows; from its own
// shape alone.
constexpr int64_t tile_tokens(int64_t num_tokens,
                              int64_t num_q_heads,
                              int64_t group_size,
                              int64_t tile_rows) {
  const int64_t share = num_tokens * num_q_heads / kTilesPerSequence;
  int64_t rows = tile_rows;
  if (share < rows) rows = kTileRows;
  if (share < rows) rows = 4 * kMinTileRows;
  if (share < rows) rows = kMinTileRows;
  return group_size >= rows ? 1 : rows / group_size;
}

// The longest tile of any sequence.
constexpr int64_t max_tile_tokens(int64_t group_size) {
  return group_size >= kMaxTileRows ? 1 : kMaxTileRows / group_size;
}

// Splits follow from the number of references, not of valid slots, so a plan stays right while
// tokens are appended to the last page.
constexpr int64_t refs_per_split(int64_t num_query_rows, int64_t page_size) {
  const int64_t keys = num_query_rows < kDecodeRows ? kDecodeSplitKeys : kPrefillSplitKeys;
  return keys <= page_size ? 1 : keys / page_size;
}

// Splits of a tile over `num_refs` references; its sequence has `num_tiles`, all heads together.
constexpr int64_t splits_of(int64_t num_query_rows,
                            int64_t num_refs,
                            int64_t page_size,
                            int64_t num_tiles) {
  const int64_t per_split = refs_per_split(num_query_rows, page_size);
  int64_t splits = (num_refs + per_split - 1) / per_split;
  if (num_query_rows >= kDecodeRows) splits = std::min(splits, kItemsPerSequence / num_tiles);
  return std::max<int64_t>(1, splits);
}

// --- the plan
// -------------------------------------------------------------------------------------

// One unit of work: queries [q_begin, q_end) against page_refs [ref_begin, ref_end) of a row. With
// num_splits > 1 its result is number `partial` of the workspace, merged in the order of `split`.
struct WorkItem {
  int32_t row;
  int32_t q_begin;
  int32_t q_end;
  int32_t ref_begin;
  int32_t ref_end;
  int32_t split;
  int32_t num_splits;
  int32_t partial;  // -1: writes its result directly
};
static_assert(sizeof(WorkItem) == 8 * sizeof(int32_t));

// A plan is int32: this header, worker_indptr [num_workers + 1], items [num_items] by worker.
struct PlanHeader {
  int32_t magic;
  int32_t fingerprint;  // of row_indptr and cu_seqlens_q, what the items depend on
  int32_t num_q_heads;
  int32_t page_size;
  int32_t num_workers;
  int32_t num_items;
  int32_t num_partials;
  int32_t partial_rows;  // query rows of the largest tile that is split
};
static_assert(sizeof(PlanHeader) == 8 * sizeof(int32_t));
constexpr int32_t kPlanMagic = 0x524b5031;

struct PlanInput {
  const int32_t* row_indptr = nullptr;    // [num_seqs * num_kv_heads + 1]
  const int32_t* cu_seqlens_q = nullptr;  // [num_seqs + 1]
  const int32_t* q_positions = nullptr;   // [num_tokens], for the costs alone
  const int32_t* row_window = nullptr;    // [num_rows], for the costs alone
  const int32_t* row_sink = nullptr;      // [num_rows], for the costs alone
  int64_t num_seqs = 0;
  int64_t num_kv_heads = 0;
  int64_t num_q_heads = 0;
  int64_t page_size = 0;
  int64_t tile_rows = kTileRows;  // at most kMaxTileRows
};

// Longest item first to the least loaded worker; a worker then goes through its items row by row,
// so that neighbours find the row's pages in its cache.
std::vector<int32_t> make_plan(const PlanInput& input, int64_t num_workers);

// Empty when the plan [length] fits the call; else what is wrong, for an error message.
std::string plan_mismatch(const PlanInput& input, const int32_t* plan, int64_t length);

// Reads a plan in place.
struct PlanView {
  const PlanHeader* header;
  const int32_t* worker_indptr;
  const WorkItem* items;

  explicit PlanView(const int32_t* plan)
      : header(reinterpret_cast<const PlanHeader*>(plan)),
        worker_indptr(plan + sizeof(PlanHeader) / sizeof(int32_t)),
        items(reinterpret_cast<const WorkItem*>(worker_indptr + header->num_workers + 1)) {}
};

// A partial result is, per query row, head_dim sums, the maximum and the denominator.
inline int64_t plan_workspace_floats(const int32_t* plan, int64_t head_dim) {
  const PlanHeader& header = *PlanView(plan).header;
  return int64_t{header.num_partials} * header.partial_rows * (head_dim + 2);
}

}  // namespace redknot
