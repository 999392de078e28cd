#include <algorithm>

#include "dispatch.h"
#include "redknot/cpu.h"
#include "redknot/ffn.h"
#include "scratch.h"

namespace redknot::cpu {
namespace {

bool few_row_linear(const LinearParams& params, const Executor& executor) {
  if (!kernels().takes_few_rows(params)) return false;
  constexpr int64_t kBlockColumns = 16;
  executor.parallel_for(params.out_dim / kBlockColumns, 1, [&](int64_t begin, int64_t end) {
    kernels().few_row_linear(params, begin, end);
  });
  return true;
}

// Columns of a block: with at most 384 of weights, and so that every worker gets as many.
int64_t columns_per_block(const LinearParams& params, int64_t num_workers) {
  constexpr int64_t kPanel = 32;
  const int64_t max_columns = params.maybe_up == nullptr ? 384 : 192;
  const int64_t out_dim = params.out_dim;
  const int64_t rounds = (out_dim + max_columns * num_workers - 1) / (max_columns * num_workers);
  const int64_t columns = (out_dim + rounds * num_workers - 1) / (rounds * num_workers);
  return (columns + kPanel - 1) / kPanel * kPanel;
}

// Rows whose copies and sums take so much that they come from the last cache; blocks stay whole.
int64_t rows_per_chunk(int64_t row_bytes, int64_t block_rows) {
  constexpr int64_t kPackedBytes = int64_t{32} << 20;
  constexpr int64_t kMaxRows = 4096;
  const int64_t rows = std::min(kMaxRows, kPackedBytes / row_bytes);
  return std::max<int64_t>(1, rows / block_rows) * block_rows;
}

bool many_row_linear(const LinearParams& params, const Executor& executor) {
  const Kernels& isa = kernels();
  if (!isa.takes_many_rows(params)) return false;
  const int64_t size = size_of(params.dtype);
  const int64_t row_bytes = isa.packed_row_bytes(params);
  const int64_t chunk_rows = rows_per_chunk(row_bytes, isa.many_rows_block);
  const int64_t columns = columns_per_block(params, executor.num_workers);
  for (int64_t row = 0; row < params.num_rows; row += chunk_rows) {
    LinearParams chunk = params;
    chunk.x = static_cast<const char*>(params.x) + row * params.in_dim * size;
    chunk.out = static_cast<char*>(params.out) + row * params.out_stride * size;
    chunk.num_rows = std::min(chunk_rows, params.num_rows - row);
    const int64_t blocks = (chunk.num_rows + isa.many_rows_block - 1) / isa.many_rows_block;
    void* packed = shared_scratch(blocks * isa.many_rows_block * row_bytes);
    executor.parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      isa.pack_many_rows(chunk, packed, begin, end);
    });
    const int64_t tasks = (params.out_dim + columns - 1) / columns;
    executor.parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
      void* scratch = thread_scratch(isa.many_rows_scratch_bytes(chunk, columns));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t last = std::min((task + 1) * columns, params.out_dim);
        isa.many_row_linear(chunk, packed, scratch, task * columns, last);
      }
    });
  }
  return true;
}

}  // namespace

bool linear(const LinearParams& params, const Executor& executor) {
  return few_row_linear(params, executor) || many_row_linear(params, executor);
}

}  // namespace redknot::cpu
