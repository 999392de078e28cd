// Rows of x are the left factor, weights the right one. 384 columns of weights of a depth of 1024
// stay in L2 while all rows stream past them, 32 rows of a depth of 512 at a time in L1; sums come
// from the last cache and go back once per 1024. A sum is taken in the order of the depth, whatever
// the blocks.
#include "many_rows.h"

#if defined(REDKNOT_ISA_AMX)
#include <algorithm>

#include "amx.h"
#include "gated.h"
#include "mac.h"
#include "transpose.h"
#endif

namespace redknot::cpu::REDKNOT_ISA {

#if defined(REDKNOT_ISA_AMX)
namespace {

// Fewer are not worth packing the other factor.
constexpr int64_t kMinRows = 128;
constexpr int64_t kMinColumns = 1024;
constexpr int64_t kPanel = 32;         // rows or columns of two tiles
constexpr int64_t kDepth = 512;        // of what is in L1
constexpr int64_t kChunkDepth = 1024;  // of what is in L2
constexpr int64_t kStep = 32;          // depth of a tile
constexpr int64_t kSteps = kDepth / kStep;
constexpr int64_t kStepBytes = 2 * kTileBytes;  // of a panel
constexpr int64_t kLine = 64;
constexpr int64_t kTileSums = 16 * 16;
constexpr int64_t kSums = 4 * kTileSums;

// Lines that are asked for per step: of the next panel of rows, while the first columns run, and of
// its sums, in each of two passes.
constexpr int64_t kRowLines = 3;
constexpr int64_t kSumLines = 2;

int64_t panels(int64_t count) { return (count + kPanel - 1) / kPanel; }

// Bytes of `rows` packed rows of x, or columns of weights, of that depth.
constexpr int64_t packed_bytes(int64_t rows, int64_t depth) { return rows * depth * 2; }

// Tiles [step][2 x 16 rows] of a panel of rows of x; zeros behind the last.
void pack_rows(const LinearParams& params, int64_t first, char* out) {
  const auto* x = static_cast<const BFloat16*>(params.x);
  for (int64_t r = 0; r < kPanel; ++r) {
    char* to = out + r / 16 * kTileBytes + r % 16 * kLine;
    const bool is_row = first + r < params.num_rows;
    const BFloat16* from = x + (first + r) * params.in_dim;
    for (int64_t d = 0; d < params.in_dim; d += kStep, to += kStepBytes) {
      const __m512i words = is_row ? _mm512_loadu_si512(from + d) : _mm512_setzero_si512();
      _mm512_store_si512(to, words);
    }
  }
}

// Tiles [step][2 x 16 columns] of a panel of columns: row i of a tile is the pairs of depth 2 i.
void pack_weights(const BFloat16* w, int64_t stride, int64_t depth, char* out) {
  for (int64_t half = 0; half < 2; ++half, w += 16 * stride) {
    for (int64_t d = 0; d < depth; d += kStep) {
      Vec words[16];
      for (int64_t c = 0; c < 16; ++c) {
        const BFloat16* row = w + c * stride + d;
        words[c] = load(reinterpret_cast<const float*>(row));
        __builtin_prefetch(row + 16 * stride, 0, 2);  // what is packed next
      }
      transpose(words);
      auto* to = reinterpret_cast<float*>(out + d / kStep * kStepBytes + half * kTileBytes);
      for (int64_t i = 0; i < 16; ++i) store(to + 16 * i, words[i]);
    }
  }
}

// A panel of rows, one of columns, and the sums of their products [2 x 2 tiles].
struct Block {
  const char* rows;
  const char* columns;
  float* sums;
};

// Memory that is asked for, into L2.
template <int64_t Lines>
inline const char* ask(const char* next) {
  for (int64_t i = 0; i < Lines; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
  return next;
}

inline void load_operands(const char* rows, const char* columns) {
  tile_load<4>(rows, kLine);
  tile_load<5>(rows + kTileBytes, kLine);
  tile_load_past_l1<6>(columns, kLine);
  tile_load_past_l1<7>(columns + kTileBytes, kLine);
}

template <int Tile, bool First>
inline void begin_sums(const Block& block) {
  if constexpr (First) {
    tile_zero<Tile>();
  } else {
    tile_load<Tile>(block.sums + Tile * kTileSums, kLine);
  }
}

// The sums of a tile leave its register, those of the next block take it.
template <int Tile, bool First>
inline void turn_sums(const Block& block, const Block& next) {
  tile_store<Tile>(block.sums + Tile * kTileSums, kLine);
  begin_sums<Tile, First>(next);
}

// sums += rows * columns. The block's sums and first operands are in registers already, and in the
// end the next one's are; the first time sums are only written.
template <bool First, int64_t RowLines, int64_t SumLines>
inline void multiply(const Block& block,
                     const Block& next,
                     int64_t steps,
                     const char* rows_ahead,
                     const char* sums_ahead) {
  const char* rows = block.rows;
  const char* columns = block.columns;
#pragma GCC unroll 16
  for (int64_t step = 0; step < steps; ++step) {
    const bool is_last = step + 1 == steps;
    rows = is_last ? next.rows : rows + kStepBytes;
    columns = is_last ? next.columns : columns + kStepBytes;
    tile_mac<0, 4, 6>();
    rows_ahead = ask<RowLines>(rows_ahead);
    tile_mac<2, 5, 6>();
    tile_load_past_l1<6>(columns, kLine);
    sums_ahead = ask<SumLines>(sums_ahead);
    tile_mac<1, 4, 7>();
    tile_load<4>(rows, kLine);
    tile_mac<3, 5, 7>();
    tile_load<5>(rows + kTileBytes, kLine);
    tile_load_past_l1<7>(columns + kTileBytes, kLine);
  }
  turn_sums<0, First>(block, next);
  turn_sums<1, First>(block, next);
  turn_sums<2, First>(block, next);
  turn_sums<3, First>(block, next);
}

// A panel of rows times `num_panels` of columns `panel_bytes` apart, over at most kDepth.
struct Pass {
  Block first;
  int64_t num_panels;
  int64_t panel_bytes;
  int64_t depth;
  const char* rows_ahead;
  const char* sums_ahead;
};

// done(n, sums) once the sums of panel n are written.
template <bool First, typename Done>
void multiply_pass(const Pass& pass, Done&& done) {
  Block block = pass.first;
  load_operands(block.rows, block.columns);
  begin_sums<0, First>(block);
  begin_sums<1, First>(block);
  begin_sums<2, First>(block);
  begin_sums<3, First>(block);
  for (int64_t n = 0; n < pass.num_panels; ++n) {
    Block next = block;
    if (n + 1 < pass.num_panels) {
      next.columns += pass.panel_bytes;
      next.sums += kSums;
    }
    const int64_t asked = n * kSteps * kRowLines * kLine;
    const char* rows_ahead = pass.rows_ahead + asked;
    const char* sums_ahead = pass.sums_ahead + n * kSums * static_cast<int64_t>(sizeof(float));
    if (pass.depth < kDepth) {
      multiply<First, 0, 0>(block, next, pass.depth / kStep, rows_ahead, sums_ahead);
    } else if (asked < packed_bytes(kPanel, kDepth)) {
      multiply<First, kRowLines, kSumLines>(block, next, kSteps, rows_ahead, sums_ahead);
    } else {
      multiply<First, 0, kSumLines>(block, next, kSteps, rows_ahead, sums_ahead);
    }
    done(n, block.sums);
    block = next;
  }
}

// Row r of a block's sums.
struct RowSums {
  RowSums(const float* sums, int64_t r) {
    const float* from = sums + r / 16 * 2 * kTileSums + r % 16 * 16;
    low = load(from);
    high = load(from + kTileSums);
  }
  Vec low, high;
};

// Where rows [0, num_rows) of a block's results go.
struct Results {
  BFloat16* out;
  int64_t stride;
  int64_t num_rows;
  void store_row(int64_t r, Vec low, Vec high) const {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    _mm512_storeu_si512(out + r * stride, (__m512i)both);
  }
};

void write_sums(const float* sums, const Results& results) {
  for (int64_t r = 0; r < results.num_rows; ++r) {
    const RowSums row(sums, r);
    results.store_row(r, row.low, row.high);
  }
}

template <Activation kActivation>
void write_gated(const float* gate, const float* up, const Results& results) {
  const auto product = [](Vec g, Vec u) {
    return gated<BFloat16, kActivation>(round_to<BFloat16>(g), round_to<BFloat16>(u));
  };
  for (int64_t r = 0; r < results.num_rows; ++r) {
    const RowSums g(gate, r), u(up, r);
    results.store_row(r, product(g.low, u.low), product(g.high, u.high));
  }
}

// Panels of weights behind one of results: those of gate and up take turns.
int64_t num_factors(const LinearParams& params) { return params.maybe_up == nullptr ? 1 : 2; }

void pack_columns(
    const LinearParams& params, int64_t column, int64_t k, int64_t depth, int64_t n, char* out) {
  const int64_t first = column + n / num_factors(params) * kPanel;
  const bool is_up = n % num_factors(params) == 1;
  const auto* w = static_cast<const BFloat16*>(is_up ? params.maybe_up : params.w);
  const int64_t stride = is_up ? params.up_stride : params.w_stride;
  pack_weights(w + first * stride + k, stride, depth, out);
}

// What is done with the sums of panel n once they are whole.
void write_panel(
    const LinearParams& params, int64_t row, int64_t column, int64_t n, const float* sums) {
  const int64_t first = column + n / num_factors(params) * kPanel;
  const Results results = {
      .out = static_cast<BFloat16*>(params.out) + row * params.out_stride + first,
      .stride = params.out_stride,
      .num_rows = std::min(kPanel, params.num_rows - row),
  };
  if (params.maybe_up == nullptr) return write_sums(sums, results);
  if (n % 2 == 0) return;
  params.activation == Activation::kSilu
      ? write_gated<Activation::kSilu>(sums - kSums, sums, results)
      : write_gated<Activation::kGeluTanh>(sums - kSums, sums, results);
}

}  // namespace

bool takes_many_rows(const LinearParams& params) {
  return params.dtype == DType::kBFloat16 && params.num_rows >= kMinRows &&
         params.out_dim >= kMinColumns && params.in_dim % kStep == 0 &&
         params.out_dim % kPanel == 0;
}

int64_t packed_row_bytes(const LinearParams& params) { return packed_bytes(1, params.in_dim); }

void pack_many_rows(const LinearParams& params, void* packed, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t row = panel * kPanel;
    pack_rows(params, row, static_cast<char*>(packed) + packed_bytes(row, params.in_dim));
  }
}

int64_t many_rows_scratch_bytes(const LinearParams& params, int64_t columns) {
  const int64_t factor_columns = num_factors(params) * columns;
  return packed_bytes(factor_columns, std::min(kChunkDepth, params.in_dim)) +
         panels(params.num_rows) * kPanel * factor_columns * static_cast<int64_t>(sizeof(float));
}

void many_row_linear(
    const LinearParams& params, const void* packed, void* scratch, int64_t begin, int64_t end) {
  const int64_t num_panels = num_factors(params) * (end - begin) / kPanel;
  const int64_t panel_row_bytes = packed_bytes(kPanel, params.in_dim);
  auto* columns = static_cast<char*>(scratch);
  auto* sums = reinterpret_cast<float*>(
      columns + packed_bytes(num_panels * kPanel, std::min(kChunkDepth, params.in_dim)));
  const AmxTiles tiles;
  for (int64_t chunk = 0; chunk < params.in_dim; chunk += kChunkDepth) {
    const int64_t chunk_depth = std::min(kChunkDepth, params.in_dim - chunk);
    const int64_t panel_bytes = packed_bytes(kPanel, chunk_depth);
    for (int64_t n = 0; n < num_panels; ++n) {
      pack_columns(params, begin, chunk, chunk_depth, n, columns + n * panel_bytes);
    }
    for (int64_t m = 0; m < panels(params.num_rows); ++m) {
      const char* rows = static_cast<const char*>(packed) + m * panel_row_bytes;
      float* row_sums = sums + m * num_panels * kSums;
      for (int64_t k = 0; k < chunk_depth; k += kDepth) {
        const char* pass_rows = rows + packed_bytes(kPanel, chunk + k);
        const auto* next_sums = reinterpret_cast<const char*>(row_sums + num_panels * kSums);
        const Pass pass = {
            .first = {pass_rows, columns + packed_bytes(kPanel, k), row_sums},
            .num_panels = num_panels,
            .panel_bytes = panel_bytes,
            .depth = std::min(kDepth, chunk_depth - k),
            .rows_ahead = pass_rows + panel_row_bytes,
            .sums_ahead = next_sums + k / kDepth * kSteps * kSumLines * kLine,
        };
        const bool is_last = chunk + k + pass.depth == params.in_dim;
        const auto done = [&](int64_t n, const float* block) {
          if (is_last) write_panel(params, m * kPanel, begin, n, block);
        };
        chunk + k == 0 ? multiply_pass<true>(pass, done) : multiply_pass<false>(pass, done);
      }
    }
  }
}
#else
bool takes_many_rows(const LinearParams&) { return false; }
int64_t packed_row_bytes(const LinearParams&) { return 0; }
void pack_many_rows(const LinearParams&, void*, int64_t, int64_t) {}
int64_t many_rows_scratch_bytes(const LinearParams&, int64_t) { return 0; }
void many_row_linear(const LinearParams&, const void*, void*, int64_t, int64_t) {}
#endif

}  // namespace redknot::cpu::REDKNOT_ISA
