#pragma once

// Many query rows (prefill) in bf16 on AMX: scores^T = K Q^T and O^T += V^T P^T by tdpbf16ps, the
// softmax between them in AVX-512. Query rows lie on the lanes, in panels of two vectors, so that
// the softmax needs no reduction across lanes and its weights leave it in the layout of a B tile.
//
// A tile of keys is staged once for all panels of the item: keys are copied into A tiles, values
// transposed into them. Panels then go through a pipeline of three stages: while the tile unit
// computes the scores of panel i + 1 and adds the values of panel i - 1, the vector units turn the
// scores of panel i into weights. The three are independent, and interleaved finely enough for the
// core to run them at the same time.
#include <type_traits>

#include "amx.h"
#include "mac.h"
#include "panel_state.h"
#include "transpose.h"

namespace redknot::cpu::REDKNOT_ISA {

// 2^x rounded later to bf16: relative error below 2.7e-6, 0 below 2^-126 and at -infinity, NaN at
// NaN. Polynomial of degree 4 for the fraction in [0, 1); scalef takes the floor of x itself.
static inline Vec exp2_weight(Vec x) {
  const __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = broadcast(0x1.bb7cd4p-7f);
  p = fma(p, (Vec)f, broadcast(0x1.aa13f0p-5f));
  p = fma(p, (Vec)f, broadcast(0x1.ee798ap-3f));
  p = fma(p, (Vec)f, broadcast(0x1.62d166p-1f));
  p = fma(p, (Vec)f, broadcast(0x1.00002cp+0f));
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
}

template <typename T>
class AmxAttention {
  static_assert(std::is_same_v<T, BFloat16>);

 public:
  static int64_t scratch_floats(int64_t rows, int64_t head_dim) {
    const int64_t lanes = lanes_of(rows);
    const int64_t padded = padded_dim(head_dim);
    return PanelState::scratch_floats(lanes) + lanes / kWidth * kStepFloats +
           lanes * (padded / 2 + padded) + 2 * kTileKeys * (kWidth + kWidth / 2) + 2 * kWidth +
           kTileKeys * padded + kLanes * padded;
  }

  AmxAttention(const SegPagedAttentionParams& params, const Queries<T>& queries, float* scratch)
      : queries_(queries),
        head_dim_(params.pool.head_dim),
        padded_(padded_dim(head_dim_)),
        // The sign of the scale goes into Q, exactly, so that the largest product is the largest
        // score.
        q_factor_(params.softmax_scale > 0.0f ? 1.0f : params.softmax_scale < 0.0f ? -1.0f : 0.0f),
        scale_(q_factor_ == 0.0f ? 1.0f : q_factor_ * params.softmax_scale * kLog2e),
        num_panels_(lanes_of(queries.rows()) / kWidth),
        carver_(scratch),
        state_(queries, num_panels_ * kWidth, carver_) {
    steps_ = reinterpret_cast<Step*>(carver_.take(num_panels_ * kStepFloats));
    q_ = carver_.take(num_panels_ * kWidth * padded_ / 2);
    out_ = carver_.take(num_panels_ * kWidth * padded_);
    scores_ = carver_.take(2 * kTileKeys * kWidth);
    weights_ = carver_.take(2 * kTileKeys / 2 * kWidth);
    rescale_ = carver_.take(2 * kWidth);
    keys_ = reinterpret_cast<char*>(carver_.take(kTileKeys * padded_ / 2));
    values_ = reinterpret_cast<char*>(carver_.take(kTileKeys * padded_ / 2));
    rows_ = carver_.take(kLanes * padded_);
    std::memset(out_, 0, num_panels_ * kWidth * padded_ * sizeof(float));
  }

  void consume(KeyTile& tile, const KeyTile* next) {
    if (!ready_ || tile.offset != offset_) pack_queries(tile.offset);
    const int num_steps = list_steps(tile);
    if (num_steps == 0) return;
    stage_keys(tile);
    stage_values(tile);
    for (int i = -1; i <= num_steps; ++i) {
      if (next != nullptr && i >= 0) fetch_share(*next, i, num_steps + 1);
      pipeline_slot(tile, i, num_steps);
    }
  }

  void write_out() const {
    for_each_row([&](int64_t m, int64_t d, int64_t count, Vec sums) {
      const Vec out = sums * (state_.sum[m] == 0.0f ? 0.0f : 1.0f / state_.sum[m]);
      if (count == kLanes) {
        store(queries_.out(m) + d, out);
      } else {
        store_partial(queries_.out(m) + d, out, count);
      }
    });
    for (int64_t m = 0; m < queries_.rows(); ++m) {
      queries_.write_lse(m, state_.max[m], state_.sum[m]);
    }
  }

  void write_partial(const Partial& partial) const {
    for_each_row([&](int64_t m, int64_t d, int64_t count, Vec sums) {
      store_partial(partial.sums + m * head_dim_ + d, sums, count);
    });
    std::memcpy(partial.max, state_.max, queries_.rows() * sizeof(float));
    std::memcpy(partial.denominators, state_.sum, queries_.rows() * sizeof(float));
  }

 private:
  static constexpr int kWidth = 2 * kLanes;  // query rows of a panel
  static constexpr int kUnitKeys = 32;       // the depth of a bf16 tile
  static constexpr int kSlices = 8;          // in which the stages of a slot alternate
  static constexpr int kSliceKeys = kTileKeys / kSlices;
  static constexpr int kRowBytes = kWidth * 4;
  // Weights may grow to 2^8 before older sums are scaled down to a new maximum: rarely. fp32 sums
  // and bf16 weights lose nothing by it.
  static constexpr float kSlack = 8.0f;

  // One panel of one tile of keys; the first `count` keys are visible to some row.
  struct Step {
    int32_t panel;
    int32_t count;
    bool partial;
    int32_t units() const { return (count + kUnitKeys - 1) / kUnitKeys; }
  };
  static constexpr int64_t kStepFloats = sizeof(Step) / sizeof(float);

  static int64_t lanes_of(int64_t rows) { return (rows + kWidth - 1) / kWidth * kWidth; }
  // Whole tiles along the dimensions: 32 as a depth of bf16, 2 * 16 as rows of O^T.
  static int64_t padded_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

  // --- queries and results ----------------------------------------------------------------------

  // Per panel the words [padded / 2, kWidth] of B tiles.
  void pack_queries(int32_t offset) {
    ready_ = true;
    offset_ = offset;
    const int64_t depth = padded_ / 2;
    std::memset(rows_, 0, kLanes * padded_ * sizeof(float));
    for (int64_t m = 0; m < num_panels_ * kWidth; m += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        float* row = rows_ + i * padded_;
        if (m + i < queries_.rows()) {
          queries_.read(m + i, offset, row);
          // In place: bf16 is written behind what is still to be read.
          convert_row(row, head_dim_, q_factor_, reinterpret_cast<BFloat16*>(row));
          std::memset(reinterpret_cast<BFloat16*>(row) + head_dim_, 0, 2 * (padded_ - head_dim_));
        } else {
          std::memset(row, 0, padded_ * sizeof(float));
        }
      }
      float* panel = q_ + m / kWidth * kWidth * depth + m % kWidth;
      for (int64_t d = 0; d < depth; d += kLanes) {
        Vec words[kLanes];
        for (int i = 0; i < kLanes; ++i) words[i] = load(rows_ + i * padded_ + d);
        transpose(words);
        for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kWidth, words[i]);
      }
    }
  }

  // Calls visit(m, d, count, sums of row m at dimensions d .. d + count).
  template <typename Visit>
  void for_each_row(Visit&& visit) const {
    for (int64_t m = 0; m < queries_.rows(); m += kLanes) {
      const float* panel = out_ + m / kWidth * kWidth * padded_ + m % kWidth;
      const int64_t rows = std::min<int64_t>(kLanes, queries_.rows() - m);
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        Vec sums[kLanes];
        for (int i = 0; i < kLanes; ++i) sums[i] = load(panel + (d + i) * kWidth);
        transpose(sums);
        for (int64_t i = 0; i < rows; ++i) {
          visit(m + i, d, std::min<int64_t>(kLanes, head_dim_ - d), sums[i]);
        }
      }
    }
  }

  // --- a tile of keys ---------------------------------------------------------------------------

  int list_steps(const KeyTile& tile) {
    int num_steps = 0;
    for (int64_t p = 0; p < num_panels_; ++p) {
      const int32_t first = state_.position[p * kWidth];
      const int64_t last_row = std::min<int64_t>((p + 1) * kWidth, queries_.rows()) - 1;
      const int32_t last = state_.position[last_row];
      const TileClass kind = classify_tile(tile.first_position(),
                                           tile.last_position(),
                                           first,
                                           last,
                                           queries_.window(),
                                           queries_.sink());
      if (kind == TileClass::kSkip) continue;
      int count = tile.count;
      while (tile.positions[count - 1] > last) --count;
      steps_[num_steps++] = {static_cast<int32_t>(p), count, kind == TileClass::kPartial};
    }
    return num_steps;
  }

  // A tiles [key block of 16][depth block of 32]; rows behind the last key hold what they held.
  void stage_keys(const KeyTile& tile) {
    const int64_t depth_tiles = padded_ / kUnitKeys;
    for (int i = 0; i < tile.count; ++i) {
      char* row = keys_ + i / 16 * depth_tiles * kTileBytes + i % 16 * 64;
      for (int64_t d = 0; d < head_dim_; d += 32) {
        const __mmask32 mask = first_lanes(head_dim_ - d);
        _mm512_storeu_si512(row + d / 32 * kTileBytes,
                            _mm512_maskz_loadu_epi16(mask, tile.k[i] + 2 * d));
      }
    }
  }

  static __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  }

  // A tiles of V^T [dimension block of 16][key block of 32], zeros behind the last key and
  // dimension.
  void stage_values(KeyTile& tile) {
    const int units = (tile.count + kUnitKeys - 1) / kUnitKeys;
    const __m512i pair_up = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                             24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                             16, 0);  // clang-format keeps the pattern readable
    for (int unit = 0; unit < units; ++unit) {
      for (int64_t d = 0; d < padded_; d += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(std::max<int64_t>(0, head_dim_ - d)));
        Vec words[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int key = unit * kUnitKeys + 2 * i;
          const __m256i a = load_values(tile, key, d, lanes);
          const __m256i b = load_values(tile, key + 1, d, lanes);
          const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
          words[i] = (Vec)_mm512_permutexvar_epi16(pair_up, both);
        }
        transpose(words);
        char* out = values_ + (d / 16 * (kTileKeys / kUnitKeys) + unit) * kTileBytes;
        for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(out + 64 * i), words[i]);
      }
    }
  }
  static __m256i load_values(const KeyTile& tile, int key, int64_t d, __mmask16 lanes) {
    return key < tile.count ? _mm256_maskz_loadu_epi16(lanes, tile.v[key] + 2 * d)
                            : _mm256_setzero_si256();
  }

  // Asks for share i of the next tile, so that staging finds it in L2.
  void fetch_share(const KeyTile& next, int i, int shares) const {
    const int64_t bytes = head_dim_ * sizeof(T);
    for (int key = next.count * i / shares; key < next.count * (i + 1) / shares; ++key) {
      for (int64_t b = 0; b < bytes; b += 64) {
        fetch_ahead<64>(next.k[key] + b);
        fetch_ahead<64>(next.v[key] + b);
      }
    }
  }

  // --- the pipeline -----------------------------------------------------------------------------

  void pipeline_slot(const KeyTile& tile, int i, int num_steps) {
    const Step* score = i + 1 < num_steps ? &steps_[i + 1] : nullptr;
    const Step* weigh = i >= 0 && i < num_steps ? &steps_[i] : nullptr;
    const Step* add = i >= 1 ? &steps_[i - 1] : nullptr;
    const int value_units = static_cast<int>(padded_ / 32);
    for (int slice = 0; slice < kSlices; ++slice) {
      const int unit = slice * kSliceKeys / kUnitKeys;
      if (score != nullptr && slice * kSliceKeys % kUnitKeys == 0 && unit < score->units()) {
        score_unit(score->panel, unit, scores_ + ((i + 1) & 1) * kTileKeys * kWidth);
      }
      if (add != nullptr) {
        for (int u = value_units * slice / kSlices; u < value_units * (slice + 1) / kSlices; ++u) {
          value_unit(*add, u, (i - 1) & 1);
        }
      }
      if (weigh != nullptr) {
        if (slice == 0) begin_weights(*weigh, tile, i & 1);
        if (slice * kSliceKeys < weigh->units() * kUnitKeys) weigh_slice(slice, i & 1);
        if (slice == kSlices - 1) end_weights(*weigh);
      }
    }
  }

  // Scores of 32 keys and a panel: 2 x 2 tiles.
  void score_unit(int64_t panel, int unit, float* scores) const {
    const int64_t depth_tiles = padded_ / 32;
    const char* k0 = keys_ + 2 * unit * depth_tiles * kTileBytes;
    const char* k1 = k0 + depth_tiles * kTileBytes;
    const float* q = q_ + panel * kWidth * padded_ / 2;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t d = 0; d < depth_tiles; ++d) {
      tile_load<4>(k0 + d * kTileBytes, 64);
      tile_load<6>(q + d * 16 * kWidth, kRowBytes);
      tile_load<7>(q + d * 16 * kWidth + 16, kRowBytes);
      tile_load<5>(k1 + d * kTileBytes, 64);
      tile_mac<0, 4, 6>();
      tile_mac<1, 4, 7>();
      tile_mac<2, 5, 6>();
      tile_mac<3, 5, 7>();
    }
    float* out = scores + unit * kUnitKeys * kWidth;
    tile_store<0>(out, kRowBytes);
    tile_store<1>(out + 16, kRowBytes);
    tile_store<2>(out + 16 * kWidth, kRowBytes);
    tile_store<3>(out + 16 * kWidth + 16, kRowBytes);
  }

  // Values of 32 dimensions of a panel: 2 x 2 tiles of O^T.
  void value_unit(const Step& step, int unit, int buffer) {
    float* out = out_ + (step.panel * padded_ + unit * 32) * kWidth;
    const float* rescale = rescale_ + buffer * kWidth;
    if (rescaled_[buffer]) {
      const Vec low = load(rescale);
      const Vec high = load(rescale + kLanes);
      for (int d = 0; d < 32; ++d) {
        store(out + d * kWidth, load(out + d * kWidth) * low);
        store(out + d * kWidth + kLanes, load(out + d * kWidth + kLanes) * high);
      }
    }
    const char* v0 = values_ + 2 * unit * (kTileKeys / kUnitKeys) * kTileBytes;
    const char* v1 = v0 + kTileKeys / kUnitKeys * kTileBytes;
    const float* weights = weights_ + buffer * kTileKeys / 2 * kWidth;
    tile_load<0>(out, kRowBytes);
    tile_load<1>(out + 16, kRowBytes);
    tile_load<2>(out + 16 * kWidth, kRowBytes);
    tile_load<3>(out + 16 * kWidth + 16, kRowBytes);
    for (int u = 0; u < step.units(); ++u) {
      tile_load<4>(v0 + u * kTileBytes, 64);
      tile_load<6>(weights + u * 16 * kWidth, kRowBytes);
      tile_load<7>(weights + u * 16 * kWidth + 16, kRowBytes);
      tile_load<5>(v1 + u * kTileBytes, 64);
      tile_mac<0, 4, 6>();
      tile_mac<1, 4, 7>();
      tile_mac<2, 5, 6>();
      tile_mac<3, 5, 7>();
    }
    tile_store<0>(out, kRowBytes);
    tile_store<1>(out + 16, kRowBytes);
    tile_store<2>(out + 16 * kWidth, kRowBytes);
    tile_store<3>(out + 16 * kWidth + 16, kRowBytes);
  }

  // Masks a panel's scores and decides what they are taken relative to.
  void begin_weights(const Step& step, const KeyTile& tile, int buffer) {
    float* scores = scores_ + buffer * kTileKeys * kWidth;
    const int64_t first = int64_t{step.panel} * kWidth;
    if (step.partial) state_.mask<2>(first, tile, step.count, scores);
    const int keys = step.units() * kUnitKeys;
    for (int i = step.count; i < keys; ++i) {
      store(scores + i * kWidth, broadcast(-kInf));
      store(scores + i * kWidth + kLanes, broadcast(-kInf));
    }
    bool rescaled = false;
    for (int c = 0; c < 2; ++c) {
      const float* column = scores + c * kLanes;
      Vec tops[4];
      for (Vec& top : tops) top = broadcast(-kInf);
      for (int i = 0; i < keys; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) tops[j] = max(load(column + (i + j) * kWidth), tops[j]);
      }
      const Vec top = max(max(tops[0], tops[1]), max(tops[2], tops[3])) * scale_;
      const Vec old = load(state_.max + first + c * kLanes);
      const Vec base = (old == -kInf) | (top > old + kSlack) ? top : old;
      store(state_.max + first + c * kLanes, base);
      // A row that has seen nothing yet subtracts 0, not -infinity.
      base_[c] = base == -kInf ? Vec{} : base;
      const Vec rescale = exp2_nonpositive(old - base_[c]);
      store(rescale_ + buffer * kWidth + c * kLanes, rescale);
      rescaled |= _mm512_cmp_ps_mask((__m512)rescale, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0;
      sums_[c] = load(state_.sum + first + c * kLanes) * rescale;
    }
    rescaled_[buffer] = rescaled;
  }

  // Scores become weights 2^(score * scale - base), as pairs of keys.
  void weigh_slice(int slice, int buffer) {
    const float* scores = scores_ + (buffer * kTileKeys + slice * kSliceKeys) * kWidth;
    float* words = weights_ + (buffer * kTileKeys + slice * kSliceKeys) / 2 * kWidth;
    for (int c = 0; c < 2; ++c) {
      const Vec scale = broadcast(scale_);
      const Vec base = -base_[c];
      Vec sum_a = sums_[c];
      Vec sum_b = {};
#pragma GCC unroll 8
      for (int i = 0; i < kSliceKeys; i += 2) {
        const Vec a = exp2_weight(fma(load(scores + i * kWidth + c * kLanes), scale, base));
        const Vec b = exp2_weight(fma(load(scores + (i + 1) * kWidth + c * kLanes), scale, base));
        sum_a += a;
        sum_b += b;
        store(words + i / 2 * kWidth + c * kLanes, pair_words(a, b));
      }
      sums_[c] = sum_a + sum_b;
    }
  }

  void end_weights(const Step& step) {
    store(state_.sum + int64_t{step.panel} * kWidth, sums_[0]);
    store(state_.sum + int64_t{step.panel} * kWidth + kLanes, sums_[1]);
  }

  const Queries<T>& queries_;
  int64_t head_dim_;
  int64_t padded_;
  float q_factor_;
  float scale_;
  int64_t num_panels_;
  Carver carver_;
  PanelState state_;
  AmxTiles tiles_;
  bool ready_ = false;
  int32_t offset_ = 0;
  Step* steps_;     // [panels]
  float* q_;        // [panels, padded / 2, kWidth] words
  float* out_;      // [panels, padded, kWidth]
  float* scores_;   // [2, kTileKeys, kWidth]
  float* weights_;  // [2, kTileKeys / 2, kWidth] words
  float* rescale_;  // [2, kWidth]
  char* keys_;      // A tiles
  char* values_;    // A tiles
  float* rows_;     // [kLanes, padded]
  bool rescaled_[2] = {};
  Vec base_[2];  // of the panel being weighed
  Vec sums_[2];
};

}  // namespace redknot::cpu::REDKNOT_ISA
