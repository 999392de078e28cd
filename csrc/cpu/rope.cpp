#include "redknot/rope.h"

#include <cmath>
#include <cstddef>
#include <cstring>

#include "dispatch.h"
#include "redknot/cpu.h"
#include "rotation.h"
#include "scratch.h"

namespace redknot::cpu {
namespace {

constexpr int64_t kGrainBytes = 128 * 1024;

// Turns a run of rows that share one offset.
struct Turn {
  float* cos;
  float* sin;
  int64_t head_dim, rotary_dim;
  DType dtype;
  bool interleaved;

  void row(const std::byte* k, std::byte* out) const {
    kernels().rope_row(k, out, cos, sin, head_dim, rotary_dim, dtype, interleaved);
  }
};

float* angle_scratch(int64_t rotary_dim) {
  return static_cast<float*>(thread_scratch(rotary_dim * sizeof(float)));
}

}  // namespace

void rope_realign(const RopeRealignParams& params, const Executor& executor) {
  const int64_t size = size_of(params.dtype);
  const auto* k = static_cast<const std::byte*>(params.k);
  auto* out = static_cast<std::byte*>(params.out);
  const int64_t half = params.rotary_dim / 2;
  const int64_t token_bytes = params.num_heads * params.head_dim * size;
  executor.parallel_for(
      params.num_tokens, 1 + kGrainBytes / (token_bytes + 1), [&](int64_t begin, int64_t end) {
        float* angles = angle_scratch(params.rotary_dim);
        const Turn turn = {angles,
                           angles + half,
                           params.head_dim,
                           params.rotary_dim,
                           params.dtype,
                           params.interleaved};
        for (int64_t t = begin; t < end; ++t) {
          const int64_t offset =
              params.maybe_offsets != nullptr ? params.maybe_offsets[t] : params.offset;
          if (t == begin || params.maybe_offsets != nullptr) {
            rotation_angles(offset, params.inv_freq, half, turn.cos, turn.sin);
          }
          for (int64_t h = 0; h < params.num_heads; ++h) {
            turn.row(k + (t * params.k_token_stride + h * params.k_head_stride) * size,
                     out + (t * params.out_token_stride + h * params.out_head_stride) * size);
          }
        }
      });
}

void rope_realign_pages(const RopeRealignPagesParams& params, const Executor& executor) {
  const int64_t size = size_of(params.dtype);
  auto* k_cache = static_cast<std::byte*>(params.k_cache);
  const int64_t half = params.rotary_dim / 2;
  executor.parallel_for(params.num_refs, 1, [&](int64_t begin, int64_t end) {
    float* angles = angle_scratch(params.rotary_dim);
    const Turn turn = {angles,
                       angles + half,
                       params.head_dim,
                       params.rotary_dim,
                       params.dtype,
                       params.interleaved};
    for (int64_t i = begin; i < end; ++i) {
      const PageRef& ref = params.page_refs[i];
      if (ref.rotation_offset == 0) continue;
      rotation_angles(ref.rotation_offset, params.inv_freq, half, turn.cos, turn.sin);
      for (int64_t slot = 0; slot < ref.num_valid; ++slot) {
        std::byte* row =
            k_cache + (ref.page * params.k_page_stride + slot * params.k_slot_stride) * size;
        turn.row(row, row);
      }
    }
  });
}

}  // namespace redknot::cpu
