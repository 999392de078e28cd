#include "redknot/pages.h"

#include <cstddef>
#include <cstring>

#include "redknot/cpu.h"

namespace redknot::cpu {
namespace {

// Some tens of microseconds of copying per piece of work that a thread takes.
constexpr int64_t kGrainBytes = 256 * 1024;

int64_t grain(int64_t bytes_per_unit) { return 1 + kGrainBytes / (bytes_per_unit + 1); }

}  // namespace

void write_pages(const WritePagesParams& params, const Executor& executor) {
  const PagePool& pool = params.pool;
  const int64_t size = size_of(pool.dtype);
  const int64_t bytes = pool.head_dim * size;
  auto* k_cache = static_cast<std::byte*>(pool.k);
  auto* v_cache = static_cast<std::byte*>(pool.v);
  const auto* k = static_cast<const std::byte*>(params.k);
  const auto* v = static_cast<const std::byte*>(params.v);
  executor.parallel_for(
      params.num_tokens, grain(2 * bytes * params.num_kv_heads), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          for (int64_t h = 0; h < params.num_kv_heads; ++h) {
            const int64_t number = params.slots[t * params.slots_token_stride + h];
            if (number < 0) continue;
            const int64_t page = number / pool.page_size;
            const int64_t slot = number % pool.page_size;
            std::memcpy(k_cache + pool.k_offset(page, slot) * size,
                        k + (t * params.k_token_stride + h * params.k_head_stride) * size,
                        bytes);
            std::memcpy(v_cache + pool.v_offset(page, slot) * size,
                        v + (t * params.v_token_stride + h * params.v_head_stride) * size,
                        bytes);
          }
        }
      });
}

void copy_pages(const CopyPagesParams& params, const Executor& executor) {
  const PagePool& pool = params.pool;
  const int64_t size = size_of(pool.dtype);
  const int64_t bytes = pool.head_dim * size;
  auto* k_cache = static_cast<std::byte*>(pool.k);
  auto* v_cache = static_cast<std::byte*>(pool.v);
  executor.parallel_for(
      params.num_copies, grain(2 * bytes * pool.page_size), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int32_t source = params.copies[2 * i];
          const int32_t destination = params.copies[2 * i + 1];
          for (int64_t slot = 0; slot < pool.page_size; ++slot) {
            std::memcpy(k_cache + pool.k_offset(destination, slot) * size,
                        k_cache + pool.k_offset(source, slot) * size,
                        bytes);
            std::memcpy(v_cache + pool.v_offset(destination, slot) * size,
                        v_cache + pool.v_offset(source, slot) * size,
                        bytes);
          }
        }
      });
}

}  // namespace redknot::cpu
