// Rows of x are the left factor, weights the right one, in blocks of 256 rows, 384 columns and a
// depth of 512: 32 columns of weights stay in L1 while the block's rows stream past them from L2,
// where its sums stay too. A sum is taken in the order of the depth, whatever the blocks.
#include "many_rows.h"

#if defined(REDKNOT_ISA_AMX)
#include <algorithm>

#include "amx.h"
#include "mac.h"
#include "transpose.h"
#endif

namespace redknot::cpu::REDKNOT_ISA {

#if defined(REDKNOT_ISA_AMX)
namespace {

// Fewer are not worth packing the other factor.
constexpr int64_t kMinRows = 256;
constexpr int64_t kMinColumns = 2048;
constexpr int64_t kPanel = 32;  // rows or columns of two tiles
constexpr int64_t kDepth = 512;
constexpr int64_t kStep = 32;                   // depth of a tile
constexpr int64_t kStepBytes = 2 * kTileBytes;  // of a panel
constexpr int64_t kSums = kPanel * kPanel;

int64_t round_up(int64_t count) { return (count + kPanel - 1) / kPanel * kPanel; }

// Bytes of `rows` packed rows of x, or columns of weights, of that depth.
int64_t packed_bytes(int64_t rows, int64_t depth) { return rows * depth * 2; }

// Tiles [panel][step][2 x 16 rows] of rows of x; zeros behind the last.
void pack_rows(const LinearParams& params, int64_t row, int64_t k, int64_t depth, char* out) {
  const auto* x = static_cast<const BFloat16*>(params.x);
  for (int64_t r = 0; r < kPanel; ++r) {
    char* to = out + r / 16 * kTileBytes + r % 16 * 64;
    const bool is_row = row + r < params.num_rows;
    const BFloat16* from = x + (row + r) * params.in_dim + k;
    for (int64_t d = 0; d < depth; d += kStep, to += kStepBytes) {
      const __m512i words = is_row ? _mm512_loadu_si512(from + d) : _mm512_setzero_si512();
      _mm512_store_si512(to, words);
    }
  }
}

// Tiles [step][2 x 16 columns] of a panel of columns: row i of a tile is the pairs of depth 2 i.
void pack_weights(const LinearParams& params, int64_t column, int64_t k, int64_t depth, char* out) {
  const auto* w = static_cast<const BFloat16*>(params.w) + k;
  for (int64_t half = 0; half < 2; ++half) {
    const BFloat16* from = w + (column + 16 * half) * params.w_stride;
    for (int64_t d = 0; d < depth; d += kStep) {
      Vec words[16];
      for (int64_t c = 0; c < 16; ++c) {
        const BFloat16* row = from + c * params.w_stride + d;
        words[c] = load(reinterpret_cast<const float*>(row));
        __builtin_prefetch(row + 16 * params.w_stride, 0, 2);  // what is packed next
      }
      transpose(words);
      auto* to = reinterpret_cast<float*>(out + d / kStep * kStepBytes + half * kTileBytes);
      for (int64_t i = 0; i < 16; ++i) store(to + 16 * i, words[i]);
    }
  }
}

// Memory that is asked for, into L2, a line at a time.
struct Ahead {
  const char* next;
  void fetch() {
    __builtin_prefetch(next, 0, 2);
    next += 64;
  }
};

// sums [32, 32] += a panel of rows times a panel of columns; the first time they are only written.
void multiply(const char* rows,
              const char* columns,
              int64_t depth,
              bool first,
              float* sums,
              Ahead a,
              Ahead b) {
  constexpr int64_t kStride = kPanel * sizeof(float);
  if (first) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  } else {
    tile_load<0>(sums, kStride);
    tile_load<1>(sums + 16, kStride);
    tile_load<2>(sums + 16 * kPanel, kStride);
    tile_load<3>(sums + 16 * kPanel + 16, kStride);
  }
  for (int64_t d = 0; d < depth; d += kStep, rows += kStepBytes, columns += kStepBytes) {
    tile_load_past_l1<4>(rows, 64);
    tile_load_past_l1<5>(rows + kTileBytes, 64);
    tile_load<6>(columns, 64);
    tile_load<7>(columns + kTileBytes, 64);
    tile_mac<0, 4, 6>();
    a.fetch();
    tile_mac<1, 4, 7>();
    a.fetch();
    tile_mac<2, 5, 6>();
    b.fetch();
    tile_mac<3, 5, 7>();
    b.fetch();
  }
  tile_store<0>(sums, kStride);
  tile_store<1>(sums + 16, kStride);
  tile_store<2>(sums + 16 * kPanel, kStride);
  tile_store<3>(sums + 16 * kPanel + 16, kStride);
}

// A block of rows times some columns; sums [panel of columns][panel of rows][32, 32].
void multiply_block(const LinearParams& params,
                    const char* rows,
                    int64_t num_rows,
                    const char* columns,
                    int64_t num_columns,
                    float* sums) {
  for (int64_t k = 0; k < params.in_dim; k += kDepth) {
    const int64_t depth = std::min(kDepth, params.in_dim - k);
    const char* pass_rows = rows + packed_bytes(num_rows, k);
    const char* pass_columns = columns + packed_bytes(num_columns, k);
    const int64_t panel_bytes = packed_bytes(kPanel, depth);
    // While a pass runs, the rows of the next one are asked for, and the next panel of columns.
    const int64_t row_share = packed_bytes(num_rows, depth) / (num_columns / kPanel);
    for (int64_t n = 0; n < num_columns / kPanel; ++n) {
      const char* panel = pass_columns + n * panel_bytes;
      const char* next_rows = pass_rows + packed_bytes(num_rows, depth) + n * row_share;
      const int64_t num_panels = num_rows / kPanel;
      for (int64_t m = 0; m < num_panels; ++m) {
        multiply(pass_rows + m * panel_bytes,
                 panel,
                 depth,
                 k == 0,
                 sums + (n * num_panels + m) * kSums,
                 {next_rows + m * row_share / num_panels},
                 {panel + panel_bytes + m * panel_bytes / num_panels});
      }
    }
  }
}

// Rows [row, row + num_rows) and columns [column, column + num_columns) of the output.
void write_sums(const LinearParams& params,
                const float* sums,
                int64_t row,
                int64_t num_rows,
                int64_t column,
                int64_t num_columns) {
  const int64_t num_panels = num_rows / kPanel;
  const int64_t real_rows = std::min(num_rows, params.num_rows - row);
  for (int64_t m = 0; m < real_rows; ++m) {
    BFloat16* out = static_cast<BFloat16*>(params.out) + (row + m) * params.out_stride + column;
    for (int64_t n = 0; n < num_columns / kPanel; ++n, out += kPanel) {
      const float* from = sums + (n * num_panels + m / kPanel) * kSums + m % kPanel * kPanel;
      store(out, load(from));
      store(out + 16, load(from + 16));
    }
  }
}

}  // namespace

bool takes_many_rows(const LinearParams& params) {
  return params.dtype == DType::kBFloat16 && params.num_rows >= kMinRows &&
         params.out_dim >= kMinColumns && params.in_dim % kStep == 0 &&
         params.out_dim % kPanel == 0;
}

int64_t packed_row_bytes(const LinearParams& params) { return packed_bytes(1, params.in_dim); }

void pack_many_rows(const LinearParams& params, void* packed, int64_t begin, int64_t end) {
  for (int64_t row = begin * kManyRowsBlock; row < end * kManyRowsBlock; row += kManyRowsBlock) {
    const int64_t num_rows = std::min(kManyRowsBlock, round_up(params.num_rows - row));
    char* block = static_cast<char*>(packed) + packed_bytes(row, params.in_dim);
    for (int64_t k = 0; k < params.in_dim; k += kDepth) {
      const int64_t depth = std::min(kDepth, params.in_dim - k);
      for (int64_t m = 0; m < num_rows; m += kPanel) {
        const int64_t offset = packed_bytes(num_rows, k) + packed_bytes(m, depth);
        pack_rows(params, row + m, k, depth, block + offset);
      }
    }
  }
}

int64_t many_rows_scratch_bytes(const LinearParams& params, int64_t columns) {
  return packed_bytes(columns, params.in_dim) +
         columns * kManyRowsBlock * static_cast<int64_t>(sizeof(float));
}

void many_row_linear(
    const LinearParams& params, const void* packed, void* scratch, int64_t begin, int64_t end) {
  const int64_t num_columns = end - begin;
  auto* columns = static_cast<char*>(scratch);
  auto* sums = reinterpret_cast<float*>(columns + packed_bytes(num_columns, params.in_dim));
  for (int64_t k = 0; k < params.in_dim; k += kDepth) {
    const int64_t depth = std::min(kDepth, params.in_dim - k);
    for (int64_t n = 0; n < num_columns; n += kPanel) {
      const int64_t offset = packed_bytes(num_columns, k) + packed_bytes(n, depth);
      pack_weights(params, begin + n, k, depth, columns + offset);
    }
  }
  const AmxTiles tiles;
  for (int64_t row = 0; row < params.num_rows; row += kManyRowsBlock) {
    const int64_t num_rows = std::min(kManyRowsBlock, round_up(params.num_rows - row));
    const char* rows = static_cast<const char*>(packed) + packed_bytes(row, params.in_dim);
    multiply_block(params, rows, num_rows, columns, num_columns, sums);
    write_sums(params, sums, row, num_rows, begin, num_columns);
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
