// seg_paged_attention, one work item at a time: out = softmax(Q K^T * scale) V over the pages of a
// row, online, in the order of the pages. Many query rows go through PanelAttention, few (decode)
// through RowAttention. A split leaves its sums in the workspace; attention_merge adds them in
// order.
#include "attention.h"

#if defined(REDKNOT_ISA_AMX)
#include "amx_attention.h"
#endif
#include "panel_attention.h"
#include "row_attention.h"

namespace redknot::cpu::REDKNOT_ISA {
namespace {

// What prefills tensors of element type T.
template <typename T>
struct ManyRows {
  using Type = PanelAttention<T>;
};
#if defined(REDKNOT_ISA_AMX)
template <>
struct ManyRows<BFloat16> {
  using Type = AmxAttention<BFloat16>;
};
#endif

// A tile with fewer query rows than lanes would leave lanes idle in a panel.
bool use_rows(int64_t query_rows) { return query_rows < kLanes; }

template <typename Attention, typename T>
void run(const SegPagedAttentionParams& params,
         const Queries<T>& queries,
         const WorkItem& item,
         float* scratch) {
  Attention attention(params, queries, scratch);
  for_each_key_tile<T>(params, queries, item, [&](KeyTile& tile, const KeyTile* next) {
    attention.consume(tile, next);
  });
  if (item.num_splits == 1) {
    attention.write_out();
  } else {
    attention.write_partial(Partial(params, item.partial));
  }
}

}  // namespace

int64_t attention_scratch_bytes(const SegPagedAttentionParams& params) {
  const int64_t group = params.group_size();
  const int64_t rows = max_tile_tokens(group) * group;
  return dispatch_dtype(params.pool.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t head_dim = params.pool.head_dim;
    return int64_t{sizeof(float)} *
           std::max(ManyRows<T>::Type::scratch_floats(rows, head_dim),
                    RowAttention<T>::scratch_floats(std::min<int64_t>(rows, kLanes), head_dim));
  });
}

void attention_item(const SegPagedAttentionParams& params,
                    const RotationTable& rotations,
                    const WorkItem& item,
                    void* scratch) {
  dispatch_dtype(params.pool.dtype, [&](auto element) {
    using T = decltype(element);
    const Queries<T> queries(params, rotations, item);
    auto* floats = static_cast<float*>(scratch);
    if (use_rows(queries.rows())) {
      run<RowAttention<T>>(params, queries, item, floats);
    } else {
      run<typename ManyRows<T>::Type>(params, queries, item, floats);
    }
  });
}

void attention_merge(const SegPagedAttentionParams& params, const WorkItem& item) {
  dispatch_dtype(params.pool.dtype, [&](auto element) {
    using T = decltype(element);
    const Queries<T> queries(params, {}, item);
    const int64_t head_dim = params.pool.head_dim;
    for (int64_t m = 0; m < queries.rows(); ++m) {
      float max = -kInf;
      for (int32_t s = 0; s < item.num_splits; ++s) {
        max = std::max(max, Partial(params, item.partial + s).max[m]);
      }
      // Summed up in the first split's place.
      float* sums = Partial(params, item.partial).sums + m * head_dim;
      float denominator = 0.0f;
      for (int32_t s = 0; s < item.num_splits; ++s) {
        const Partial partial(params, item.partial + s);
        const float weight = partial.max[m] == -kInf ? 0.0f : __builtin_exp2f(partial.max[m] - max);
        const float* other = partial.sums + m * head_dim;
        denominator += weight * partial.denominators[m];
        for (int64_t d = 0; d < head_dim; ++d) {
          sums[d] = s == 0 ? weight * other[d] : sums[d] + weight * other[d];
        }
      }
      const float inverse = denominator == 0.0f ? 0.0f : 1.0f / denominator;
      convert_row(sums, head_dim, inverse, queries.out(m));
      queries.write_lse(m, max, denominator);
    }
  });
}

}  // namespace redknot::cpu::REDKNOT_ISA
