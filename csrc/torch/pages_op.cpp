#include <vector>

#include "executor.h"
#include "pages_params.h"
#include "redknot/cpu.h"
#include "register.h"

namespace redknot::binding {

WritePagesParams write_pages_params(const Tensor& k,
                                    const Tensor& v,
                                    const Tensor& k_cache,
                                    const Tensor& v_cache,
                                    const Tensor& slots) {
  const Arguments args("write_pages", k_cache);
  const PagePool pool = args.pool(k_cache, v_cache);
  args.writable("k_cache", k_cache);
  args.writable("v_cache", v_cache);
  args.apart("v_cache", v_cache, "k_cache", k_cache);
  args.tensor("slots", slots, ScalarType::Long, {"num_tokens", "num_kv_heads"});
  const int64_t num_tokens = slots.size(0);
  const int64_t num_kv_heads = slots.size(1);
  const Dims shape = {
      {"num_tokens", num_tokens}, {"num_kv_heads", num_kv_heads}, {"head_dim", pool.head_dim}};
  args.floating("k", k, shape, "k_cache", pool.dtype);
  args.floating("v", v, shape, "k_cache", pool.dtype);
  return {
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
  };
}

CopyPagesParams copy_pages_params(const Tensor& k_cache,
                                  const Tensor& v_cache,
                                  const Tensor& copies) {
  const Arguments args("copy_pages", k_cache);
  const PagePool pool = args.pool(k_cache, v_cache);
  args.writable("k_cache", k_cache);
  args.writable("v_cache", v_cache);
  args.apart("v_cache", v_cache, "k_cache", k_cache);
  args.tensor("copies", copies, ScalarType::Int, {"num_copies", 2});
  args.contiguous("copies", copies);
  return {.pool = pool, .copies = data<int32_t>(copies), .num_copies = copies.size(0)};
}

namespace {

void write_pages(const Tensor& k,
                 const Tensor& v,
                 const Tensor& k_cache,
                 const Tensor& v_cache,
                 const Tensor& slots) {
  const Arguments args("write_pages");
  const WritePagesParams params = write_pages_params(k, v, k_cache, v_cache, slots);
  const int64_t num_slots = params.pool.num_pages * params.pool.page_size;
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    const int64_t* row = params.slots + t * params.slots_token_stride;
    for (int64_t h = 0; h < params.num_kv_heads; ++h) {
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
  cpu::write_pages(params, torch_executor());
}

void copy_pages(const Tensor& k_cache, const Tensor& v_cache, const Tensor& copies) {
  const Arguments args("copy_pages");
  const CopyPagesParams params = copy_pages_params(k_cache, v_cache, copies);
  const int64_t num_copies = params.num_copies;
  const int32_t* pages = params.copies;
  enum Role : uint8_t { kUnused, kSource, kDestination };
  std::vector<uint8_t> role(params.pool.num_pages, kUnused);
  for (int64_t i = 0; i < 2 * num_copies; ++i) {
    args.check(pages[i] >= 0 && pages[i] < params.pool.num_pages,
               "copies must name pages below num_pages = ",
               params.pool.num_pages,
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
  cpu::copy_pages(params, torch_executor());
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("write_pages", TORCH_BOX(&write_pages));
  m.impl("copy_pages", TORCH_BOX(&copy_pages));
}

}  // namespace

RK_REGISTER_ON_CPU(add_ops)

}  // namespace redknot::binding
