#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/ffn/row_gemm.h"

// What products over chunks of rows need beside their arguments.
namespace redknot::gpu {

// Rows per chunk at most. More rows would not make a product faster; 8,192 of 25,600 columns are
// 400 MiB.
constexpr int64_t kMaxChunkRows = 8192;

// Parts of a workspace, each at a multiple of 256 bytes.
struct WorkspaceParts {
  int64_t num_bytes = 0;

  int64_t take(int64_t bytes) {
    constexpr int64_t kAlignment = 256;
    const int64_t begin = num_bytes;
    num_bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  }
};

struct GemmWorkspace {
  GemmDevice device;
  int64_t chunk_rows;
  // Offsets in bytes.
  int64_t partials = 0;  // float
  int64_t arrivals = 0;  // int32, of all products
  int64_t num_bytes = 0;

  GemmWorkspace(int64_t max_rows, GemmDevice on_device)
      : device(on_device), chunk_rows(std::min(max_rows, kMaxChunkRows)) {}

  int64_t partial_floats() const { return device.workers * kPartialFloatsPerWorker; }
  int64_t num_arrivals() const { return device.workers * kArrivalsPerWorker; }

  // Of the chunk that begins there.
  int32_t rows_from(int64_t first_row, int64_t max_rows) const {
    return static_cast<int32_t>(std::min(chunk_rows, max_rows - first_row));
  }

 protected:
  // Behind the parts that a call has taken for itself.
  void take_sums(WorkspaceParts parts, int num_products) {
    partials = parts.take(partial_floats() * static_cast<int64_t>(sizeof(float)));
    arrivals = parts.take(num_products * num_arrivals() * static_cast<int64_t>(sizeof(int32_t)));
    num_bytes = parts.num_bytes;
  }
};

}  // namespace redknot::gpu
