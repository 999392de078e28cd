#include <torch/csrc/stable/library.h>

#include <vector>

#include "arguments.h"
#include "executor.h"
#include "redknot/cpu.h"

namespace redknot::binding {
namespace {

void write_pages(const Tensor& k,
                 const Tensor& v,
                 const Tensor& k_cache,
                 const Tensor& v_cache,
                 const Tensor& slots) {
  const Arguments args("write_pages");
  const PagePool pool = args.pool(k_cache, v_cache);
  args.writable("k_cache", k_cache);
  args.writable("v_cache", v_cache);
  args.tensor("slots", slots, ScalarType::Long, {"num_tokens", "num_kv_heads"});
  const int64_t num_tokens = slots.size(0);
  const int64_t num_kv_heads = slots.size(1);
  const Dims shape = {
      {"num_tokens", num_tokens}, {"num_kv_heads", num_kv_heads}, {"head_dim", pool.head_dim}};
  args.floating("k", k, shape, "k_cache", pool.dtype);
  args.floating("v", v, shape, "k_cache", pool.dtype);
  const int64_t num_slots = pool.num_pages * pool.page_size;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t* row = data<int64_t>(slots) + t * slots.stride(0);
    for (int64_t h = 0; h < num_kv_heads; ++h) {
      args.check(row[h] >= -1 && row[h] < num_slots,
                 "slots must be -1 or below num_pages * page_size = ",
                 num_slots,
                 ", got ",
                 row[h],
                 " at [",
                 t,
                 ", ",
                 h,
                 "]");
    }
  }
  cpu::write_pages(
      {
          .pool = pool,
          .k = k.data_ptr(),
          .v = v.data_ptr(),
          .slots = data<int64_t>(slots),
          .num_tokens = num_tokens,
          .num_kv_heads = num_kv_heads,
          .k_token_stride = k.stride(0),
          .k_head_stride = k.stride(1),
          .v_token_stride = v.stride(0),
          .v_head_stride = v.stride(1),
          .slots_token_stride = slots.stride(0),
      },
      torch_executor());
}

void copy_pages(const Tensor& k_cache, const Tensor& v_cache, const Tensor& copies) {
  const Arguments args("copy_pages");
  const PagePool pool = args.pool(k_cache, v_cache);
  args.writable("k_cache", k_cache);
  args.writable("v_cache", v_cache);
  args.tensor("copies", copies, ScalarType::Int, {"num_copies", 2});
  args.contiguous("copies", copies);
  const int64_t num_copies = copies.size(0);
  const auto* pages = data<int32_t>(copies);
  enum Role : uint8_t { kUnused, kSource, kDestination };
  std::vector<uint8_t> role(pool.num_pages, kUnused);
  for (int64_t i = 0; i < 2 * num_copies; ++i) {
    args.check(pages[i] >= 0 && pages[i] < pool.num_pages,
               "copies must name pages below num_pages = ",
               pool.num_pages,
               ", got ",
               pages[i],
               " at ",
               i / 2);
  }
  for (int64_t i = 0; i < num_copies; ++i) {
    args.check(role[pages[2 * i + 1]] == kUnused,
               "copies must name a destination once, got page ",
               pages[2 * i + 1],
               " again at ",
               i);
    role[pages[2 * i + 1]] = kDestination;
  }
  for (int64_t i = 0; i < num_copies; ++i) {
    args.check(role[pages[2 * i]] != kDestination,
               "copies must not read a page that they write, got page ",
               pages[2 * i],
               " at ",
               i);
  }
  cpu::copy_pages({.pool = pool, .copies = pages, .num_copies = num_copies}, torch_executor());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(redknot, CPU, m) {
  m.impl("write_pages", TORCH_BOX(&write_pages));
  m.impl("copy_pages", TORCH_BOX(&copy_pages));
}

}  // namespace redknot::binding
