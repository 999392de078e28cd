#pragma once

// The plan of seg_paged_attention by plain loops and a stable sort: what the kernel must produce,
// bit for bit, in whatever order its threads run.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cuda/attention/plan.h"

namespace redknot::gpu {

inline std::vector<int32_t> reference_plan(const GpuPlanInput& in) {
  PlanTotals totals{0, 0};
  for (int64_t r = 0; r < in.num_rows(); ++r) {
    const PlanRow row(in, r);
    if (row.is_prefill) {
      totals.prefill_tiles += row.num_tiles;
    } else if (row.num_tiles > 0) {
      totals.decode_refs += row.num_refs();
    }
  }
  const PlanSplits splits(totals, in.page_size);
  const GpuPlanLayout layout(in);
  std::vector<int32_t> plan(layout.num_words, 0);

  struct Item {
    WorkItem item;
    int order;
  };
  std::vector<Item> items;
  int32_t num_prefill_items = 0, num_partial_rows = 0;
  for (int64_t r = 0; r < in.num_rows(); ++r) {
    PlanRow row(in, r);
    row.split(splits, in.page_size);
    plan[layout.row_item + r] = static_cast<int32_t>(items.size());
    plan[layout.row_partial + r] = num_partial_rows;
    for (int32_t i = 0; i < row.num_items(); ++i) {
      const WorkItem item = row.item(i, num_partial_rows);
      items.push_back({item, plan_class(in, item, row.is_prefill)});
    }
    num_prefill_items += row.is_prefill ? row.num_items() : 0;
    num_partial_rows += row.num_partial_rows();
  }
  plan[layout.row_item + in.num_rows()] = static_cast<int32_t>(items.size());
  std::stable_sort(
      items.begin(), items.end(), [](const Item& a, const Item& b) { return a.order < b.order; });
  for (size_t i = 0; i < items.size(); ++i) {
    std::memcpy(&plan[layout.items + i * 8], &items[i].item, sizeof(WorkItem));
  }
  const GpuPlanHeader header{kGpuPlanMagic,
                             static_cast<int32_t>(items.size()),
                             num_prefill_items,
                             num_partial_rows,
                             static_cast<int32_t>(in.num_rows()),
                             static_cast<int32_t>(in.num_tokens),
                             static_cast<int32_t>(splits.refs_per_decode_item),
                             static_cast<int32_t>(splits.splits_per_prefill_tile)};
  std::memcpy(plan.data(), &header, sizeof(header));
  return plan;
}

}  // namespace redknot::gpu
