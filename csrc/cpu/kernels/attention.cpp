// seg_paged_attention, one work item at a time: out = softmax(Q K^T * scale) V over the pages of a
// row, online, in the order of the pages. Many query rows go through PanelAttention, few (decode)
// through RowAttention. A split leaves its sums in the workspace; attention_merge adds them in
// order.
#include "attention.h"

#if defined(REDKNOT_ISA_AMX)
#include "amx_attention.h"
#include "row_tiles.h"
#endif
#include "panel_attention.h"
#include "row_attention.h"
#include "row_vectors.h"

namespace redknot::cpu::REDKNOT_ISA {
namespace {

// What computes many (prefill) and few (decode) query rows of element type T.
template <typename T>
struct Ways {
  using Many = PanelAttention<T>;
  using Few = RowAttention<RowVectors<T>>;
};
#if defined(REDKNOT_ISA_AMX)
template <>
struct Ways<BFloat16> {
  using Many = AmxAttention<BFloat16>;
  using Few = RowAttention<RowTiles>;
};
#endif

// A tile with fewer query rows than lanes would leave lanes idle in a panel.
bool use_rows(int64_t query_rows) { return query_rows < kLanes; }

// Calls visit(tile, next) for all keys of an item; next is the tile after it, of what the thread
// does next after the last, and may be empty.
template <typename T, typename Visit>
void for_each_tile(const SegPagedAttentionParams& params,
                   const WorkItem& item,
                   const WorkItem* maybe_next,
                   int tile_keys,
                   Visit&& visit) {
  KeyTile buffers[2];
  KeyTile* tile = &buffers[0];
  KeyTile* next = &buffers[1];
  KeyTiles<T> tiles(params, item, tile_keys);
  for (tiles.read(tile); tile->count > 0; std::swap(tile, next)) {
    tiles.read(next);
    const bool last = next->count == 0;
    if (last && maybe_next != nullptr) KeyTiles<T>(params, *maybe_next, tile_keys).read(next);
    visit(*tile, *next);
    if (last) break;
  }
}

template <typename T>
void run_many(const SegPagedAttentionParams& params,
              const Queries<T>& queries,
              const WorkItem& item,
              float* scratch) {
  typename Ways<T>::Many attention(params, queries, scratch);
  for_each_tile<T>(params, item, nullptr, kTileKeys, [&](KeyTile& tile, const KeyTile& next) {
    attention.consume(tile, next.count > 0 ? &next : nullptr);
  });
  if (item.num_splits == 1) {
    attention.write_out();
  } else {
    attention.write_partial(Partial(params, item.partial));
  }
}

// False where nothing was written, because only exact products would do.
template <typename Attention, typename T>
bool run_few(const SegPagedAttentionParams& params,
             const Queries<T>& queries,
             const WorkItem& item,
             const WorkItem* maybe_next,
             float* scratch) {
  Attention attention(params, queries, scratch);
  for_each_tile<T>(params, item, maybe_next, kRowTileKeys, [&](KeyTile& tile, const KeyTile& next) {
    attention.consume(queries, tile, next);
  });
  if (!attention.is_sound()) return false;
  if (item.num_splits == 1) {
    attention.write_out(queries);
  } else {
    attention.write_partial(Partial(params, item.partial));
  }
  return true;
}

}  // namespace

int64_t attention_scratch_bytes(const SegPagedAttentionParams& params) {
  const int64_t group = params.group_size();
  const int64_t rows = max_tile_tokens(group) * group;
  const int64_t few = std::min<int64_t>(rows, kLanes);
  return dispatch_dtype(params.pool.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t head_dim = params.pool.head_dim;
    return int64_t{sizeof(float)} *
           std::max({Ways<T>::Many::scratch_floats(rows, head_dim),
                     Ways<T>::Few::scratch_floats(few, head_dim),
                     RowAttention<RowVectors<T>>::scratch_floats(few, head_dim)});
  });
}

void attention_item(const SegPagedAttentionParams& params,
                    const RotationTable& rotations,
                    const WorkItem& item,
                    const WorkItem* maybe_next,
                    void* scratch) {
  dispatch_dtype(params.pool.dtype, [&](auto element) {
    using T = decltype(element);
    const Queries<T> queries(params, rotations, item);
    auto* floats = static_cast<float*>(scratch);
    if (!use_rows(queries.rows())) {
      run_many<T>(params, queries, item, floats);
    } else if (!run_few<typename Ways<T>::Few>(params, queries, item, maybe_next, floats)) {
      run_few<RowAttention<RowVectors<T>>>(params, queries, item, maybe_next, floats);
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
