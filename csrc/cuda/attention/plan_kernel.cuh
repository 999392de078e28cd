#pragma once

#include "cuda/attention/plan.h"
#include "cuda/ptx/simt.cuh"

// seg_paged_plan on the device: plan.h says what a plan is.
//
//   totals over all rows -> how far rows are split -> items of each row -> their sum over the rows
//   before (scan) -> how many items of each class -> every item to its place
//
// One block of threads makes the plan of one layer, so that all layers go in one launch and nothing
// waits for the host. Rows are spread over the threads, then items, which find their row by a
// binary search. The sort by class is a stable counting sort: items keep their order within a
// class, so that neighbours read the same pages, and the plan does not depend on the order of
// threads.
namespace redknot::gpu {

constexpr int kPlanThreads = 512;
constexpr int kPlanWarps = kPlanThreads / kWarpSize;

struct PlanShared {
  int64_t totals[kPlanWarps][2];
  int32_t warp_sums[kPlanWarps];
  int32_t class_begin[kPlanClasses];               // where the next item of the class goes
  int32_t class_counts[kPlanWarps][kPlanClasses];  // of the items at hand
  int32_t num_prefill_items;
};

class PlanMaker {
 public:
  __device__ PlanMaker(const GpuPlanInput& in, int32_t* plan, PlanShared& shared)
      : in_(in),
        shared_(shared),
        layout_(in),
        num_rows_(static_cast<int32_t>(in.num_rows())),
        row_item_(plan + layout_.row_item),
        row_partial_(plan + layout_.row_partial),
        items_(reinterpret_cast<WorkItem*>(plan + layout_.items)),
        header_(reinterpret_cast<GpuPlanHeader*>(plan)) {}

  __device__ void make() {
    const PlanSplits splits(totals(), in_.page_size);
    const int32_t num_partial_rows = scan_rows(splits);
    const int32_t num_items = row_item_[num_rows_];
    count_classes(splits, num_items);
    place_items(splits, num_items);
    if (threadIdx.x == 0) {
      *header_ = {kGpuPlanMagic,
                  num_items,
                  shared_.num_prefill_items,
                  num_partial_rows,
                  num_rows_,
                  static_cast<int32_t>(in_.num_tokens),
                  static_cast<int32_t>(splits.refs_per_decode_item),
                  static_cast<int32_t>(splits.splits_per_prefill_tile)};
    }
  }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;

  __device__ static int warp() { return threadIdx.x / kWarpSize; }
  __device__ static int lane() { return threadIdx.x % kWarpSize; }

  __device__ PlanTotals totals() {
    int64_t refs = 0, tiles = 0;
    for (int32_t r = threadIdx.x; r < num_rows_; r += kPlanThreads) {
      const PlanRow row(in_, r);
      if (row.is_prefill) {
        tiles += row.num_tiles;
      } else if (row.num_tiles > 0) {
        refs += row.num_refs();
      }
    }
    for (int by = kWarpSize / 2; by > 0; by /= 2) {
      refs += __shfl_xor_sync(kAllLanes, refs, by);
      tiles += __shfl_xor_sync(kAllLanes, tiles, by);
    }
    if (lane() == 0) {
      shared_.totals[warp()][0] = refs;
      shared_.totals[warp()][1] = tiles;
    }
    __syncthreads();
    PlanTotals sum{0, 0};
    for (int w = 0; w < kPlanWarps; ++w) {
      sum.decode_refs += shared_.totals[w][0];
      sum.prefill_tiles += shared_.totals[w][1];
    }
    return sum;
  }

  // The sum of `value` over the threads before this one; *all is the sum over all threads.
  __device__ int32_t sum_before(int32_t value, int32_t* all) {
    int32_t up_to_here = value;
    for (int by = 1; by < kWarpSize; by *= 2) {
      const int32_t below = __shfl_up_sync(kAllLanes, up_to_here, by);
      if (lane() >= by) up_to_here += below;
    }
    __syncthreads();  // the sums of a scan before this one have been read
    if (lane() == kWarpSize - 1) shared_.warp_sums[warp()] = up_to_here;
    __syncthreads();
    int32_t before = up_to_here - value;
    *all = 0;
    for (int w = 0; w < kPlanWarps; ++w) {
      if (w < warp()) before += shared_.warp_sums[w];
      *all += shared_.warp_sums[w];
    }
    return before;
  }

  // First item and first partial row of every row; returns the number of partial rows.
  __device__ int32_t scan_rows(const PlanSplits& splits) {
    int32_t num_items = 0, num_partial_rows = 0;
    for (int32_t begin = 0; begin < num_rows_; begin += kPlanThreads) {
      const int32_t r = begin + static_cast<int32_t>(threadIdx.x);
      int32_t items = 0, partial_rows = 0;
      if (r < num_rows_) {
        const PlanRow row = split_row(splits, r);
        items = row.num_items();
        partial_rows = row.num_partial_rows();
      }
      int32_t all_items, all_partial_rows;
      const int32_t items_before = sum_before(items, &all_items);
      const int32_t partial_rows_before = sum_before(partial_rows, &all_partial_rows);
      if (r < num_rows_) {
        row_item_[r] = num_items + items_before;
        row_partial_[r] = num_partial_rows + partial_rows_before;
      }
      num_items += all_items;
      num_partial_rows += all_partial_rows;
    }
    if (threadIdx.x == 0) row_item_[num_rows_] = num_items;
    __syncthreads();
    return num_partial_rows;
  }

  __device__ PlanRow split_row(const PlanSplits& splits, int32_t r) const {
    PlanRow row(in_, r);
    row.split(splits, in_.page_size);
    return row;
  }

  // The last row that begins at or before item i, so one that is not empty.
  __device__ int32_t row_of(int32_t i) const {
    int32_t begin = 0, end = num_rows_;
    while (end - begin > 1) {
      const int32_t middle = begin + (end - begin) / 2;
      if (row_item_[middle] <= i) {
        begin = middle;
      } else {
        end = middle;
      }
    }
    return begin;
  }

  __device__ WorkItem item(const PlanSplits& splits, int32_t i, int* item_class) const {
    const int32_t r = row_of(i);
    const PlanRow row = split_row(splits, r);
    const WorkItem found = row.item(i - row_item_[r], row_partial_[r]);
    *item_class = plan_class(in_, found, row.is_prefill);
    return found;
  }

  // class_begin: the number of items of the classes before.
  __device__ void count_classes(const PlanSplits& splits, int32_t num_items) {
    for (int c = threadIdx.x; c < kPlanClasses; c += kPlanThreads) shared_.class_begin[c] = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num_items; i += kPlanThreads) {
      int item_class;
      item(splits, i, &item_class);
      atomicAdd(&shared_.class_begin[item_class], 1);
    }
    __syncthreads();
    const bool is_class = threadIdx.x < kPlanClasses;
    int32_t all;
    const int32_t before = sum_before(is_class ? shared_.class_begin[threadIdx.x] : 0, &all);
    if (is_class) shared_.class_begin[threadIdx.x] = before;
    if (threadIdx.x == kCostClasses) shared_.num_prefill_items = before;
    __syncthreads();
  }

  // kPlanThreads items at a time: an item's place is the class's, plus the items of its class in
  // the warps before and in the lanes before.
  __device__ void place_items(const PlanSplits& splits, int32_t num_items) {
    for (int32_t begin = 0; begin < num_items; begin += kPlanThreads) {
      const int32_t i = begin + static_cast<int32_t>(threadIdx.x);
      for (int c = lane(); c < kPlanClasses; c += kWarpSize) shared_.class_counts[warp()][c] = 0;
      __syncwarp();
      int item_class = -1;
      WorkItem mine{};
      if (i < num_items) mine = item(splits, i, &item_class);
      const uint32_t alike = __match_any_sync(kAllLanes, static_cast<uint32_t>(item_class));
      const int rank = __popc(alike & ((1u << lane()) - 1));
      if (i < num_items && rank == 0) shared_.class_counts[warp()][item_class] = __popc(alike);
      __syncthreads();
      int32_t place = 0;
      if (i < num_items) {
        place = shared_.class_begin[item_class] + rank;
        for (int w = 0; w < warp(); ++w) place += shared_.class_counts[w][item_class];
        items_[place] = mine;
      }
      __syncthreads();
      for (int c = threadIdx.x; c < kPlanClasses; c += kPlanThreads) {
        for (int w = 0; w < kPlanWarps; ++w) shared_.class_begin[c] += shared_.class_counts[w][c];
      }
      __syncthreads();
    }
  }

  const GpuPlanInput& in_;
  PlanShared& shared_;
  GpuPlanLayout layout_;
  int32_t num_rows_;
  int32_t* row_item_;
  int32_t* row_partial_;
  WorkItem* items_;
  GpuPlanHeader* header_;
};

// Block l makes the plan of layer l: its rows follow those of the layer before in every array, and
// so do the plans.
static __global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(GpuPlanInput in, int32_t* plans) {
  RK_DYNAMIC_SMEM(smem);
  const int64_t layer = blockIdx.x;
  in.row_indptr += layer * (in.num_rows() + 1);
  in.row_window += layer * in.num_rows();
  in.row_sink += layer * in.num_rows();
  PlanMaker(in, plans + layer * GpuPlanLayout(in).num_words, *reinterpret_cast<PlanShared*>(smem))
      .make();
}

}  // namespace redknot::gpu
