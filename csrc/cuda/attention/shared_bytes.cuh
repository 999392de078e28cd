#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/attention/shared_tile.cuh"

namespace redknot::gpu {

// Bytes of the larger block of those that launch_attention (launch_attention.cuh) launches for so
// many sequences and query rows; both element types have 2 bytes.
template <int kHeadDim>
constexpr int64_t shared_bytes_of(int64_t num_seqs, int64_t query_rows) {
  using Prefill = SharedMemory<uint16_t, kHeadDim, true>;
  using Decode = SharedMemory<uint16_t, kHeadDim, false>;
  const bool may_decode = num_seqs > 1 || query_rows <= kDecodeRows;
  return std::max<int64_t>(query_rows > kDecodeRows ? sizeof(Prefill) : 0,
                           may_decode ? sizeof(Decode) : 0);
}

inline int64_t shared_bytes(int64_t head_dim, int64_t num_seqs, int64_t query_rows) {
  switch (head_dim) {
    case 32:
      return shared_bytes_of<32>(num_seqs, query_rows);
    case 64:
      return shared_bytes_of<64>(num_seqs, query_rows);
    case 128:
      return shared_bytes_of<128>(num_seqs, query_rows);
    default:
      return shared_bytes_of<256>(num_seqs, query_rows);
  }
}

}  // namespace redknot::gpu
