#include "redknot/planner.h"

#include <cstring>
#include <numeric>

namespace redknot {
namespace {

constexpr int64_t kHeaderWords = sizeof(PlanHeader) / sizeof(int32_t);
constexpr int64_t kItemWords = sizeof(WorkItem) / sizeof(int32_t);

// Keys that the queries of a tile may see at most, from positions alone.
int64_t visible_keys(int64_t query_first, int64_t query_last, int64_t window, int64_t sink) {
  const int64_t causal = query_last + 1;
  if (window < 0) return causal;
  return std::min(causal, sink + window + query_last - query_first);
}

// In units of one key for kDecodeRows query rows: reading a page costs as much as computing
// with it for that many rows. The constant stands for packing Q and writing the result.
int64_t item_cost(int64_t num_query_rows, int64_t num_keys) {
  constexpr int64_t kItemOverheadKeys = 32;
  return (num_keys + kItemOverheadKeys) * std::max(num_query_rows, kDecodeRows);
}

int32_t fingerprint(const PlanInput& input) {
  uint32_t hash = 2166136261u;  // FNV-1a over 32-bit words
  const auto mix = [&hash](const int32_t* words, int64_t count) {
    for (int64_t i = 0; i < count; ++i) hash = (hash ^ static_cast<uint32_t>(words[i])) * 16777619u;
  };
  mix(input.cu_seqlens_q, input.num_seqs + 1);
  mix(input.row_indptr, input.num_seqs * input.num_kv_heads + 1);
  return static_cast<int32_t>(hash);
}

struct Items {
  std::vector<WorkItem> items;
  std::vector<int64_t> costs;
  int32_t num_partials = 0;
  int32_t partial_rows = 0;
};

void add_tile(const PlanInput& input,
              int64_t row,
              int32_t q_begin,
              int32_t q_end,
              int64_t num_tiles,
              Items* out) {
  const int32_t ref_begin = input.row_indptr[row];
  const int32_t ref_end = input.row_indptr[row + 1];
  const int64_t num_refs = ref_end - ref_begin;
  const int64_t query_rows = (q_end - q_begin) * (input.num_q_heads / input.num_kv_heads);
  const int64_t keys = std::min(num_refs * input.page_size,
                                visible_keys(input.q_positions[q_begin],
                                             input.q_positions[q_end - 1],
                                             input.row_window[row],
                                             input.row_sink[row]));
  const int64_t splits = splits_of(query_rows, num_refs, input.page_size, num_tiles);
  for (int64_t split = 0; split < splits; ++split) {
    // Equal shares, so that no split is left with a single page.
    const auto begin = static_cast<int32_t>(ref_begin + num_refs * split / splits);
    const auto end = static_cast<int32_t>(ref_begin + num_refs * (split + 1) / splits);
    const int32_t partial = splits == 1 ? -1 : out->num_partials++;
    out->items.push_back({static_cast<int32_t>(row),
                          q_begin,
                          q_end,
                          begin,
                          end,
                          static_cast<int32_t>(split),
                          static_cast<int32_t>(splits),
                          partial});
    out->costs.push_back(item_cost(query_rows, keys / splits));
  }
  if (splits > 1) {
    out->partial_rows = std::max(out->partial_rows, static_cast<int32_t>(query_rows));
  }
}

Items make_items(const PlanInput& input) {
  Items out;
  if (input.num_kv_heads == 0) return out;
  for (int64_t row = 0; row < input.num_seqs * input.num_kv_heads; ++row) {
    const int64_t seq = row / input.num_kv_heads;
    const int64_t q_end = input.cu_seqlens_q[seq + 1];
    const int64_t num_tokens = q_end - input.cu_seqlens_q[seq];
    const int64_t step = tile_tokens(
        num_tokens, input.num_q_heads, input.num_q_heads / input.num_kv_heads, input.tile_rows);
    const int64_t num_tiles = (num_tokens + step - 1) / step * input.num_kv_heads;
    for (int64_t q = input.cu_seqlens_q[seq]; q < q_end; q += step) {
      add_tile(input,
               row,
               static_cast<int32_t>(q),
               static_cast<int32_t>(std::min(q + step, q_end)),
               num_tiles,
               &out);
    }
  }
  return out;
}

// A plan comes back as a tensor that anybody may have written to: nothing in it may lead outside.
bool items_in_range(const PlanInput& input, const PlanView& plan) {
  const PlanHeader& header = *plan.header;
  for (int32_t w = 0; w < header.num_workers; ++w) {
    if (plan.worker_indptr[w] > plan.worker_indptr[w + 1]) return false;
  }
  if (plan.worker_indptr[0] != 0 || plan.worker_indptr[header.num_workers] != header.num_items) {
    return false;
  }
  const int64_t group = input.num_q_heads / input.num_kv_heads;
  for (int32_t i = 0; i < header.num_items; ++i) {
    const WorkItem& item = plan.items[i];
    if (item.row < 0 || item.row >= input.num_seqs * input.num_kv_heads) return false;
    const int64_t seq = item.row / input.num_kv_heads;
    const int64_t query_rows = (int64_t{item.q_end} - item.q_begin) * group;
    const bool queries = input.cu_seqlens_q[seq] <= item.q_begin && item.q_begin < item.q_end &&
                         item.q_end <= input.cu_seqlens_q[seq + 1] &&
                         item.q_end - item.q_begin <= max_tile_tokens(group);
    const bool refs = input.row_indptr[item.row] <= item.ref_begin &&
                      item.ref_begin <= item.ref_end &&
                      item.ref_end <= input.row_indptr[item.row + 1];
    // All partial results of the tile, for the item that merges them.
    const bool partials =
        item.num_splits == 1
            ? item.partial == -1
            : 0 <= item.split && item.split < item.num_splits && item.split <= item.partial &&
                  int64_t{item.partial} - item.split + item.num_splits <= header.num_partials &&
                  query_rows <= header.partial_rows;
    if (!queries || !refs || !partials) return false;
  }
  return true;
}

// worker[i] of every item: longest first to the least loaded, ties to the lower number.
std::vector<int32_t> assign(const std::vector<int64_t>& costs, int64_t num_workers) {
  std::vector<int32_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(
      order.begin(), order.end(), [&](int32_t a, int32_t b) { return costs[a] > costs[b]; });
  using Load = std::pair<int64_t, int32_t>;
  std::vector<Load> loads;  // a min-heap
  for (int32_t w = 0; w < num_workers; ++w) loads.push_back({0, w});
  std::vector<int32_t> worker(costs.size());
  for (const int32_t item : order) {
    std::pop_heap(loads.begin(), loads.end(), std::greater<>());
    loads.back().first += costs[item];
    worker[item] = loads.back().second;
    std::push_heap(loads.begin(), loads.end(), std::greater<>());
  }
  return worker;
}

}  // namespace

std::vector<int32_t> make_plan(const PlanInput& input, int64_t num_workers) {
  const Items work = make_items(input);
  const std::vector<int32_t> worker = assign(work.costs, num_workers);
  const auto num_items = static_cast<int64_t>(work.items.size());

  std::vector<int32_t> plan(kHeaderWords + num_workers + 1 + num_items * kItemWords, 0);
  const PlanHeader header = {kPlanMagic,
                             fingerprint(input),
                             static_cast<int32_t>(input.num_q_heads),
                             static_cast<int32_t>(input.page_size),
                             static_cast<int32_t>(num_workers),
                             static_cast<int32_t>(num_items),
                             work.num_partials,
                             work.partial_rows};
  std::memcpy(plan.data(), &header, sizeof(header));
  int32_t* worker_indptr = plan.data() + kHeaderWords;
  for (const int32_t w : worker) ++worker_indptr[w + 1];
  for (int64_t w = 0; w < num_workers; ++w) worker_indptr[w + 1] += worker_indptr[w];
  std::vector<int32_t> next(worker_indptr, worker_indptr + num_workers);
  int32_t* items = worker_indptr + num_workers + 1;
  for (int64_t i = 0; i < num_items; ++i) {
    std::memcpy(items + next[worker[i]]++ * kItemWords, &work.items[i], sizeof(WorkItem));
  }
  return plan;
}

std::string plan_mismatch(const PlanInput& input, const int32_t* plan, int64_t length) {
  if (length < kHeaderWords || plan[0] != kPlanMagic) return "it is no work list of seg_paged_plan";
  const PlanHeader& header = *PlanView(plan).header;
  if (header.num_workers < 1 || header.num_items < 0 ||
      length != kHeaderWords + int64_t{header.num_workers} + 1 + header.num_items * kItemWords) {
    return "its length does not fit its header";
  }
  if (header.num_q_heads != input.num_q_heads) return "it was made for another num_q_heads";
  if (header.page_size != input.page_size) return "it was made for another page_size";
  if (header.fingerprint != fingerprint(input)) {
    return "it was made for another row_indptr or cu_seqlens_q";
  }
  if (header.num_partials < 0 || header.partial_rows < 0 ||
      !items_in_range(input, PlanView(plan))) {
    return "an item is out of range";
  }
  return "";
}

}  // namespace redknot
