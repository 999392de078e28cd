#pragma once

// Many query rows (prefill) in bf16 on AMX: scores^T = K Q^T and O^T += V^T P^T by tdpbf16ps, the
// softmax between them in AVX-512. Query rows lie on the lanes, in panels of two vectors, so that
// the softmax needs no reduction across lanes and its weights leave it in the layout of a B tile.
//
// A tile of keys is staged once for all panels of the item: keys are copied into A tiles, values
// transposed into them. Panels then go through a pipeline of three stages: while the tile unit
// computes the scores of panel i + 1 and adds the values of panel i - 1, the vector units turn the
// scores of panel i into weights. The three are independent, and interleaved finely enough for the
// core to run them at the same time. Scores live in two small buffers that never leave L1: a tile
// is stored at full speed only to lines that are there.
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
           lanes * (padded / 2 + padded) + 2 * kUnitKeys * kWidth + kTileKeys * kWidth +
           2 * kWidth + kTileKeys * padded + kLanes * padded;
  }

  AmxAttention(const SegPagedAttentionParams& params, const Queries<T>& queries, float* scratch)
      : queries_(queries),
        head_dim_(params.pool.head_dim),
        padded_(padded_dim(head_dim_)),
        // The sign of the scale goes into Q, exactly, so that the largest product is the largest
        // score.
        q_factor_(params.softmax_scale > 0.0f   ? 1.0f
                  : params.softmax_scale < 0.0f ? -1.0f
                                                : 0.0f),
        cap_scale_(params.softcap > 0.0f ? q_factor_ * params.softmax_scale / params.softcap
                                         : 0.0f),
        scale_(q_factor_ == 0.0f       ? 1.0f
               : params.softcap > 0.0f ? params.softcap * kLog2e
                                       : q_factor_ * params.softmax_scale * kLog2e),
        num_panels_(lanes_of(queries.rows()) / kWidth),
        carver_(scratch),
        state_(queries, num_panels_ * kWidth, carver_) {
    steps_ = reinterpret_cast<Step*>(carver_.take(num_panels_ * kStepFloats));
    q_ = carver_.take(num_panels_ * kWidth * padded_ / 2);
    out_ = carver_.take(num_panels_ * kWidth * padded_);
    scores_ = carver_.take(2 * kUnitKeys * kWidth);
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
    for (int i = 0; i <= num_steps; ++i) {
      if (next != nullptr) fetch_share(*next, i, num_steps + 1);
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
  static constexpr int kVecs = 2;                // vectors of a panel
  static constexpr int kWidth = kVecs * kLanes;  // query rows of a panel
  static constexpr int kUnitKeys = 32;           // the depth of a bf16 tile
  static constexpr int kRowBytes = kWidth * 4;
  // Weights may grow to 2^8 before older sums are scaled down to a new maximum: rarely. fp32 sums
  // and bf16 weights lose nothing by it.
  static constexpr float kSlack = 8.0f;

  // One panel against the first `count` keys of a tile; no row sees the others.
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
    for (int unit = 0; unit < units; ++unit) {
      for (int64_t d = 0; d < padded_; d += 16) {
        const auto lanes = static_cast<__mmask16>(first_lanes(std::max<int64_t>(0, head_dim_ - d)));
        Vec words[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int key = unit * kUnitKeys + 2 * i;
          const __m256i a = load_values(tile, key, d, lanes);
          const __m256i b = load_values(tile, key + 1, d, lanes);
          words[i] = join_words(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
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

  // Weighs step i and adds the values of step i - 1; computes scores one unit ahead.
  void pipeline_slot(const KeyTile& tile, int i, int num_steps) {
    const int value_units = static_cast<int>(padded_ / 32);
    Idle idle;
    if (i == num_steps) {
      for (int u = 0; u < value_units; ++u) value_unit(steps_[i - 1], u, (i - 1) & 1, idle);
      store_pending();
      return;
    }
    const Step& step = steps_[i];
    if (i == 0) {
      score_unit(step, 0, idle);
      store_pending();
    }
    begin_weights(step, i & 1);
    const int units = step.units();
    for (int unit = 0; unit < units; ++unit) {
      Weigher weigher = weigh_unit(step, unit, tile, i & 1);
      if (unit + 1 < units) {
        score_unit(step, unit + 1, weigher);
      } else if (i + 1 < num_steps) {
        score_unit(steps_[i + 1], 0, weigher);
      }
      if (i >= 1) {
        for (int u = value_units * unit / units; u < value_units * (unit + 1) / units; ++u) {
          value_unit(steps_[i - 1], u, (i - 1) & 1, weigher);
        }
      }
      weigher.finish();
      for (int c = 0; c < kVecs; ++c) sums_[c] = weigher.sums[c] + weigher.odd_sums[c];
      store_pending();
    }
    end_weights(step);
  }

  // Scores of 32 keys and a panel.
  template <typename Work>
  void score_unit(const Step& step, int unit, Work& work) {
    const int64_t depth_tiles = padded_ / 32;
    const char* k = keys_ + 2 * unit * depth_tiles * kTileBytes;
    const float* q = q_ + step.panel * kWidth * padded_ / 2;
    scored_ ^= 1;
    run_blocks<true>(k,
                     k + depth_tiles * kTileBytes,
                     q,
                     depth_tiles,
                     scores_ + scored_ * kUnitKeys * kWidth,
                     work);
  }

  // Values of 32 dimensions of a panel.
  template <typename Work>
  void value_unit(const Step& step, int unit, int buffer, Work& work) {
    float* out = out_ + (step.panel * padded_ + unit * 32) * kWidth;
    const char* v = values_ + 2 * unit * (kTileKeys / kUnitKeys) * kTileBytes;
    const float* weights = weights_ + buffer * kTileKeys / 2 * kWidth;
    if (rescaled_[buffer]) rescale_rows(out, rescale_ + buffer * kWidth);
    run_blocks<false>(v, v + kTileKeys / kUnitKeys * kTileBytes, weights, step.units(), out, work);
  }

  // Two blocks of 16 x 32 results, one in tiles 0 and 1, the other in tiles 2 and 3. Results are
  // stored one block late: the tile unit does not wait for a store then.
  template <bool Zero, typename Work>
  void run_blocks(
      const char* a0, const char* a1, const float* b, int64_t depth, float* out, Work& work) {
    mac_block<0, Zero>(a0, b, depth, out, work);
    store_pending();
    mac_block<2, Zero>(a1, b, depth, out + 16 * kWidth, work);
    tile_store<0>(out, kRowBytes);
    tile_store<1>(out + 16, kRowBytes);
    pending_ = out + 16 * kWidth;
  }
  template <int C, bool Zero, typename Work>
  [[gnu::always_inline]] static void mac_block(
      const char* a, const float* b, int64_t depth, const float* out, Work& work) {
    if constexpr (Zero) {
      tile_zero<C>();
      tile_zero<C + 1>();
    } else {
      tile_load<C>(out, kRowBytes);
      tile_load<C + 1>(out + 16, kRowBytes);
    }
    for (int64_t i = 0; i < depth; ++i) {
      tile_load<4>(a + i * kTileBytes, 64);
      tile_load<5>(b + i * 16 * kWidth, kRowBytes);
      tile_load<6>(b + i * 16 * kWidth + 16, kRowBytes);
      tile_mac<C, 4, 5>();
      tile_mac<C + 1, 4, 6>();
      work.advance();
    }
  }
  void store_pending() {
    if (pending_ == nullptr) return;
    tile_store<2>(pending_, kRowBytes);
    tile_store<3>(pending_ + 16, kRowBytes);
    pending_ = nullptr;
  }

  static void rescale_rows(float* out, const float* rescale) {
    for (int d = 0; d < 32; ++d) {
      for (int c = 0; c < kWidth; c += kLanes) {
        store(out + d * kWidth + c, load(out + d * kWidth + c) * load(rescale + c));
      }
    }
  }

  // --- the softmax ------------------------------------------------------------------------------

  void begin_weights(const Step& step, int buffer) {
    rescaled_[buffer] = false;
    for (int c = 0; c < kVecs; ++c) {
      base_[c] = load(state_.max + int64_t{step.panel} * kWidth + c * kLanes);
      sums_[c] = load(state_.sum + int64_t{step.panel} * kWidth + c * kLanes);
      store(rescale_ + buffer * kWidth + c * kLanes, broadcast(1.0f));
    }
  }

  // What the vector units do between tile instructions: turn scores into weights
  // 2^(score * scale - base), two keys at a time.
  struct Weigher {
    const float* scores;
    const float* end;
    float* words;
    Vec scale;
    Vec base[kVecs];
    Vec sums[kVecs];
    Vec odd_sums[kVecs];

    [[gnu::always_inline]] void advance() {
      if (scores == end) return;
#pragma GCC unroll 2
      for (int c = 0; c < kVecs; ++c) {
        const Vec a = exp2_weight(fma(load(scores + c * kLanes), scale, base[c]));
        const Vec b = exp2_weight(fma(load(scores + kWidth + c * kLanes), scale, base[c]));
        sums[c] += a;
        odd_sums[c] += b;
        store(words + c * kLanes, pair_words(a, b));
      }
      scores += 2 * kWidth;
      words += kWidth;
    }
    [[gnu::always_inline]] void finish() {
      while (scores != end) advance();
    }
  };
  struct Idle {
    void advance() {}
  };

  // Makes the scores of a unit ready to be weighed.
  Weigher weigh_unit(const Step& step, int unit, const KeyTile& tile, int buffer) {
    float* scores = scores_ + scored_ * kUnitKeys * kWidth;
    const int begin = unit * kUnitKeys;
    const int count = std::min(kUnitKeys, step.count - begin);
    if (cap_scale_ != 0.0f) {
      for (int i = 0; i < count * kWidth; i += kLanes) {
        store(scores + i, tanh(load(scores + i) * cap_scale_));
      }
    }
    if (step.partial) {
      state_.mask<kVecs>(int64_t{step.panel} * kWidth, tile.positions + begin, count, scores);
    }
    for (int i = count * kWidth; i < kUnitKeys * kWidth; i += kLanes) {
      store(scores + i, broadcast(-kInf));
    }
    float* words = weights_ + buffer * kTileKeys / 2 * kWidth;
    Weigher weigher;
    weigher.scores = scores;
    weigher.end = scores + kUnitKeys * kWidth;
    weigher.words = words + unit * kUnitKeys / 2 * kWidth;
    weigher.scale = broadcast(scale_);
    for (int c = 0; c < kVecs; ++c) {
      const Vec top = column_max(scores + c * kLanes) * scale_;
      const Vec limit = base_[c] + kSlack;
      if (_mm512_cmp_ps_mask((__m512)top, (__m512)limit, _CMP_GT_OQ) != 0) {
        raise_base(c, top, words + c * kLanes, unit, buffer);
      }
      // A row that has seen nothing yet subtracts 0, not -infinity.
      weigher.base[c] = base_[c] == -kInf ? Vec{} : -base_[c];
      weigher.sums[c] = sums_[c];
      weigher.odd_sums[c] = Vec{};
    }
    return weigher;
  }

  static Vec column_max(const float* column) {
    Vec tops[4];
    for (Vec& top : tops) top = broadcast(-kInf);
    for (int i = 0; i < kUnitKeys; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) tops[j] = max(load(column + (i + j) * kWidth), tops[j]);
    }
    return max(max(tops[0], tops[1]), max(tops[2], tops[3]));
  }

  // Takes the scores of column c relative to a whole number not below `top`: what was summed is
  // worth a power of two less, which is exact for sums, results and the weights of earlier units.
  __attribute__((noinline)) void raise_base(int c, Vec top, float* words, int units, int buffer) {
    const Vec ceiling = (Vec)_mm512_roundscale_ps((__m512)top, _MM_FROUND_TO_POS_INF);
    const Vec base = (base_[c] == -kInf) | (top > base_[c] + kSlack) ? ceiling : base_[c];
    const Vec factor = exp2_nonpositive(base_[c] == base ? Vec{} : base_[c] - base);
    base_[c] = base;
    sums_[c] *= factor;
    float* rescale = rescale_ + buffer * kWidth + c * kLanes;
    store(rescale, load(rescale) * factor);
    rescaled_[buffer] = true;
    for (int i = 0; i < units * kUnitKeys / 2; ++i) {
      const VecI word = (VecI)load(words + i * kWidth);
      const Vec low = (Vec)(word << 16) * factor;
      const Vec high = (Vec)(word & broadcast(int32_t{-65536})) * factor;
      store(words + i * kWidth, pair_words(low, high));
    }
  }

  void end_weights(const Step& step) {
    for (int c = 0; c < kVecs; ++c) {
      store(state_.max + int64_t{step.panel} * kWidth + c * kLanes, base_[c]);
      store(state_.sum + int64_t{step.panel} * kWidth + c * kLanes, sums_[c]);
    }
  }

  const Queries<T>& queries_;
  int64_t head_dim_;
  int64_t padded_;
  float q_factor_;
  float cap_scale_;  // of a product inside tanh; 0: no cap
  float scale_;
  int64_t num_panels_;
  Carver carver_;
  PanelState state_;
  AmxTiles tiles_;
  int scored_ = 0;  // the buffer of scores that was filled last
  bool ready_ = false;
  int32_t offset_ = 0;
  Step* steps_;     // [panels]
  float* q_;        // [panels, padded / 2, kWidth] words
  float* out_;      // [panels, padded, kWidth]
  float* scores_;   // [2, kUnitKeys, kWidth]
  float* weights_;  // [2, kTileKeys / 2, kWidth] words
  float* rescale_;  // [2, kWidth]
  char* keys_;      // A tiles
  char* values_;    // A tiles
  float* rows_;     // [kLanes, padded]
  bool rescaled_[2] = {};
  float* pending_ = nullptr;  // where the results in tiles 2 and 3 go
  Vec base_[kVecs];           // of the panel being weighed
  Vec sums_[kVecs];
};

}  // namespace redknot::cpu::REDKNOT_ISA
