// The plan that the device makes: the same as its host twin, bit by bit; complete; balanced.
#include <map>
#include <numeric>
#include <random>

#include "check.h"
#include "cuda/attention/plan_kernel.cuh"
#include "plan_reference.hpp"

namespace {

using namespace redknot;
using namespace redknot::gpu;

// Lengths alone: what a plan depends on.
struct Lengths {
  std::vector<int32_t> queries = {};  // per sequence
  std::vector<int32_t> context = {};  // per sequence, queries included
  std::vector<int32_t> window = {};   // of KV head h: entry h % size
  int32_t num_kv_heads = 2;
  int32_t group = 4;
  int32_t page_size = 64;
  int num_layers = 1;  // layer l: context shorter by 16 l keys
};

class Plan {
 public:
  explicit Plan(const Lengths& lengths) : lengths_(lengths) {
    cu_seqlens_ = {0};
    for (size_t s = 0; s < lengths.queries.size(); ++s) {
      cu_seqlens_.push_back(cu_seqlens_.back() + lengths.queries[s]);
      for (int32_t i = 0; i < lengths.queries[s]; ++i) {
        positions_.push_back(lengths.context[s] - lengths.queries[s] + i);
      }
    }
    for (int layer = 0; layer < lengths.num_layers; ++layer) {
      row_indptr_.push_back(0);
      for (const int32_t context : lengths.context) {
        for (int h = 0; h < lengths.num_kv_heads; ++h) {
          const int32_t window = lengths.window[h % lengths.window.size()];
          const int32_t keys = std::max(0, context - 16 * layer);
          const int32_t held = window < 0 ? keys : std::min(keys, window + 4);
          const auto pages = static_cast<int32_t>(ceil_div(held, lengths.page_size));
          row_indptr_.push_back(row_indptr_.back() + pages);
          window_.push_back(window);
          sink_.push_back(window < 0 ? 0 : 4);
        }
      }
    }
  }

  GpuPlanInput input(int layer = 0) const {
    const auto num_seqs = static_cast<int64_t>(lengths_.queries.size());
    const int64_t num_rows = num_seqs * lengths_.num_kv_heads;
    return {row_indptr_.data() + layer * (num_rows + 1),
            cu_seqlens_.data(),
            positions_.data(),
            window_.data() + layer * num_rows,
            sink_.data() + layer * num_rows,
            num_seqs,
            lengths_.num_kv_heads,
            int64_t{lengths_.num_kv_heads} * lengths_.group,
            static_cast<int64_t>(positions_.size()),
            lengths_.page_size};
  }

  std::vector<WorkItem> items() const {
    const std::vector<int32_t> plan = reference_plan(input());
    const auto* first = reinterpret_cast<const WorkItem*>(&plan[GpuPlanLayout(input()).items]);
    return {first, first + plan[1]};
  }

  void expect_same_from_the_kernel(const simt::Schedule& schedule) const {
    const auto num_words = static_cast<size_t>(GpuPlanLayout(input()).num_words);
    simt::Buffer<int32_t> plans("plans", num_words * lengths_.num_layers);
    std::fill(plans.begin(), plans.end(), 0);
    const GpuPlanInput in = input();
    const dim3 grid{static_cast<unsigned>(lengths_.num_layers)};
    simt::launch({grid, {kPlanThreads}, sizeof(PlanShared), schedule},
                 [&] { plan_kernel(in, plans.data()); });
    for (int layer = 0; layer < lengths_.num_layers; ++layer) {
      const std::vector<int32_t> expected = reference_plan(input(layer));
      const int32_t* made = plans.data() + layer * num_words;
      for (size_t i = 0; i < num_words; ++i) {
        if (made[i] != expected[i]) {
          test::fail(__FILE__,
                     __LINE__,
                     "layer ",
                     layer,
                     ", word ",
                     i,
                     ": ",
                     made[i],
                     " instead of ",
                     expected[i],
                     ", schedule ",
                     simt::name_of(schedule));
        }
      }
    }
  }

  // Every query of every row meets every reference once, in the order of the splits; nothing is
  // larger than the buffers whose sizes follow from shapes.
  void expect_complete() const {
    const GpuPlanInput in = input();
    const std::vector<WorkItem> all = items();
    CHECK(static_cast<int64_t>(all.size()) <= max_items(in));
    std::map<std::pair<int32_t, int32_t>, std::vector<WorkItem>> tiles;  // by row and q_begin
    std::map<int32_t, int32_t> partials;
    for (const WorkItem& item : all) tiles[{item.row, item.q_begin}].push_back(item);
    std::vector<int64_t> covered(in.num_rows());
    for (auto& [key, parts] : tiles) {
      std::sort(parts.begin(), parts.end(), [](const WorkItem& a, const WorkItem& b) {
        return a.split < b.split;
      });
      int32_t next_ref = in.row_indptr[key.first];
      for (size_t s = 0; s < parts.size(); ++s) {
        CHECK_EQ(parts[s].split, static_cast<int32_t>(s));
        CHECK_EQ(parts[s].num_splits, static_cast<int32_t>(parts.size()));
        CHECK_EQ(parts[s].ref_begin, next_ref);
        next_ref = parts[s].ref_end;
        CHECK((parts[s].partial < 0) == (parts.size() == 1));
        const int64_t rows = (parts[s].q_end - parts[s].q_begin) * in.group_size();
        CHECK(rows <= kPrefillRows);
        if (parts[s].partial < 0) continue;
        CHECK(parts[s].partial + rows <= max_partial_rows(in));
        for (int64_t r = 0; r < rows; ++r) CHECK_EQ(partials[parts[s].partial + r]++, 0);
      }
      CHECK_EQ(next_ref, in.row_indptr[key.first + 1]);
      covered[key.first] += parts[0].q_end - parts[0].q_begin;
    }
    for (int64_t row = 0; row < in.num_rows(); ++row) {
      CHECK_EQ(covered[row], lengths_.queries[row / lengths_.num_kv_heads]);
    }
  }

  // The heaviest block's work against the mean, in units of the cost that orders the items.
  double imbalance(int32_t num_blocks) const {
    const GpuPlanInput in = input();
    const std::vector<WorkItem> all = items();
    std::vector<double> load(num_blocks);
    for (int32_t block = 0; block < num_blocks; ++block) {
      for (int32_t round = 0; round * num_blocks < static_cast<int32_t>(all.size()); ++round) {
        const int32_t i = item_of_round(round, block, num_blocks);
        if (i < static_cast<int32_t>(all.size())) load[block] += item_cost(in, all[i]);
      }
    }
    const double sum = std::accumulate(load.begin(), load.end(), 0.0);
    return *std::max_element(load.begin(), load.end()) / (sum / num_blocks);
  }

 private:
  Lengths lengths_;
  std::vector<int32_t> row_indptr_, cu_seqlens_, positions_, window_, sink_;
};

std::vector<Lengths> cases() {
  return {
      {.queries = {1}, .context = {1}, .window = {-1}},
      {.queries = {1, 1, 1}, .context = {500, 7, 33000}, .window = {-1, 256}},
      {.queries = {300, 1, 0, 17, 4}, .context = {300, 9000, 0, 17, 5000}, .window = {-1, 64}},
      {.queries = {1000}, .context = {70000}, .window = {-1, 256}},
      {.queries = {9, 0}, .context = {0, 0}, .window = {-1}, .page_size = 16},
      {.queries = std::vector<int32_t>(400, 1),
       .context = std::vector<int32_t>(400, 3000),
       .window = {-1, 128}},
      {.queries = {1, 40, 2},
       .context = {5000, 90, 700},
       .window = {-1, 100},
       .group = 5,
       .page_size = 48,
       .num_layers = 3},
      {.queries = {}, .context = {}, .window = {-1}},
  };
}

TEST(the_kernel_makes_the_plan_of_its_host_twin) {
  for (const Lengths& lengths : cases()) {
    const Plan plan(lengths);
    for (const simt::Schedule& schedule : simt::kSchedules) {
      plan.expect_same_from_the_kernel(schedule);
    }
  }
}

TEST(a_plan_covers_every_query_and_page_once) {
  for (const Lengths& lengths : cases()) Plan(lengths).expect_complete();
}

TEST(random_plans_are_complete_and_the_same) {
  std::mt19937 random(7);
  for (int i = 0; i < 20; ++i) {
    Lengths lengths{.window = {-1, 200}};
    lengths.group = 1 + random() % 8;
    lengths.page_size = 16 << random() % 5;
    for (size_t s = random() % 6 + 1; s > 0; --s) {
      lengths.queries.push_back(random() % 3 ? random() % 4 : random() % 700);
      lengths.context.push_back(lengths.queries.back() + random() % 20000);
    }
    const Plan plan(lengths);
    plan.expect_complete();
    plan.expect_same_from_the_kernel(simt::kSchedules[i % 5]);
  }
}

TEST(work_is_balanced) {
  // 132 SMs, two blocks each; Llama-like decode with 15 % global rows, and a long causal prefill.
  Lengths decode{.queries = std::vector<int32_t>(32, 1), .window = {-1, 1024, 1024, 1024}};
  decode.num_kv_heads = 8;
  std::mt19937 random(1);
  for (int s = 0; s < 32; ++s) decode.context.push_back(8000 + random() % 120000);
  CHECK(Plan(decode).imbalance(264) < 1.15);
  const Lengths one{.queries = {1}, .context = {131072}, .window = {-1}, .num_kv_heads = 8};
  CHECK(Plan(one).imbalance(264) < 1.15);
  const Lengths prefill{.queries = {16384}, .context = {16384}, .window = {-1}, .num_kv_heads = 8};
  CHECK(Plan(prefill).imbalance(264) < 1.15);
}

TEST(the_longest_items_come_first) {
  for (const Lengths& lengths : cases()) {
    const Plan plan(lengths);
    const GpuPlanInput in = plan.input();
    int last = 0;
    for (const WorkItem& item : plan.items()) {
      const int now = plan_class(in, item, PlanRow(in, item.row).is_prefill);
      CHECK(last <= now);
      last = now;
    }
  }
}

}  // namespace
