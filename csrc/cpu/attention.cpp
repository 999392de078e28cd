#include "redknot/attention.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"
#include "redknot/cpu.h"
#include "redknot/planner.h"
#include "rotation.h"
#include "scratch.h"

namespace redknot::cpu {
namespace {

// The angles of every distinct rotation offset, computed once per call.
class Rotations {
 public:
  explicit Rotations(const SegPagedAttentionParams& params) {
    if (params.maybe_inv_freq == nullptr) return;
    for (int64_t r = 0; r < params.num_refs; ++r) {
      const int32_t offset = params.page_refs[r].rotation_offset;
      if (offset != 0 && (offsets_.empty() || offsets_.back() != offset)) {
        offsets_.push_back(offset);
      }
    }
    std::sort(offsets_.begin(), offsets_.end());
    offsets_.erase(std::unique(offsets_.begin(), offsets_.end()), offsets_.end());
    const int64_t half = params.rotary_dim / 2;
    cos_.resize(offsets_.size() * half);
    sin_.resize(offsets_.size() * half);
    for (size_t i = 0; i < offsets_.size(); ++i) {
      rotation_angles(offsets_[i], params.maybe_inv_freq, half, &cos_[i * half], &sin_[i * half]);
    }
  }

  RotationTable table() const {
    return {offsets_.data(), cos_.data(), sin_.data(), static_cast<int64_t>(offsets_.size())};
  }

 private:
  std::vector<int32_t> offsets_;
  std::vector<float> cos_, sin_;
};

// Every worker runs its own items, then helps the others; which thread runs an item changes nothing
// in its result.
class Schedule {
 public:
  explicit Schedule(const PlanView& plan) : plan_(plan), next_(plan.header->num_workers) {
    for (int32_t w = 0; w < plan.header->num_workers; ++w) next_[w] = plan.worker_indptr[w];
  }

  template <typename Run>
  void run(int64_t worker, Run&& run_item) {
    const int64_t workers = plan_.header->num_workers;
    for (int64_t i = 0; i < workers; ++i) {
      const int64_t owner = (worker + i) % workers;
      const int32_t end = plan_.worker_indptr[owner + 1];
      while (true) {
        const int32_t item = next_[owner].fetch_add(1, std::memory_order_relaxed);
        if (item >= end) break;
        run_item(plan_.items[item], item + 1 < end ? &plan_.items[item + 1] : nullptr);
      }
    }
  }

 private:
  const PlanView& plan_;
  std::vector<std::atomic<int32_t>> next_;
};

}  // namespace

int64_t attention_tile_rows() { return kernels().attention_tile_rows; }

void seg_paged_attention(const SegPagedAttentionParams& params, const Executor& executor) {
  const PlanView plan(params.plan);
  const Rotations rotations(params);
  const RotationTable table = rotations.table();
  const Kernels& isa = kernels();
  const int64_t scratch_bytes = isa.attention_scratch_bytes(params);

  Schedule schedule(plan);
  executor.parallel_for(plan.header->num_workers, 1, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t worker = begin; worker < end; ++worker) {
      schedule.run(worker, [&](const WorkItem& item, const WorkItem* maybe_next) {
        isa.attention_item(params, table, item, maybe_next, scratch);
      });
    }
  });

  if (plan.header->num_partials == 0) return;
  executor.parallel_for(plan.header->num_items, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const WorkItem& item = plan.items[i];
      if (item.num_splits > 1 && item.split == 0) isa.attention_merge(params, item);
    }
  });
}

}  // namespace redknot::cpu
