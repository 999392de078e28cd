#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "executor.h"
#include "redknot/cpu.h"
#include "register.h"
#include "result.h"
#include "rope_params.h"

namespace redknot::binding {

RopeRealignParams rope_realign_params(const Tensor& k,
                                      int64_t offset,
                                      const Tensor& inv_freq,
                                      bool interleaved,
                                      const std::optional<Tensor>& offsets,
                                      const Tensor& out) {
  const Arguments args("rope_realign", k);
  const DType dtype = args.floating("k", k, {"num_tokens", "num_heads", "head_dim"});
  const int64_t num_tokens = k.size(0);
  const int64_t num_heads = k.size(1);
  const int64_t head_dim = k.size(2);
  args.check(head_dim > 0 && head_dim % 8 == 0,
             "head_dim must be a positive multiple of 8, got k ",
             describe(k));
  const int64_t rotary_dim = args.inv_freq(inv_freq, head_dim);
  args.check(offset > INT32_MIN && offset <= INT32_MAX, "offset must fit int32, got ", offset);
  if (offsets.has_value()) {
    args.check(offset == 0, "offset must be 0 beside offsets, got ", offset);
    args.tensor("offsets", *offsets, ScalarType::Int, {{"num_tokens", num_tokens}});
    args.contiguous("offsets", *offsets);
  }
  args.floating("out",
                out,
                {{"num_tokens", num_tokens}, {"num_heads", num_heads}, {"head_dim", head_dim}},
                "k",
                dtype);
  args.writable("out", out);
  const bool is_in_place = out.data_ptr() == k.data_ptr() && out.stride(0) == k.stride(0) &&
                           out.stride(1) == k.stride(1);
  args.check(is_in_place || !overlap(out, k), "out must be k itself or not overlap it");
  return {
      .k = k.data_ptr(),
      .out = out.data_ptr(),
      .maybe_offsets = data<int32_t>(offsets),
      .inv_freq = data<float>(inv_freq),
      .offset = offset,
      .num_tokens = num_tokens,
      .num_heads = num_heads,
      .head_dim = head_dim,
      .rotary_dim = rotary_dim,
      .k_token_stride = k.stride(0),
      .k_head_stride = k.stride(1),
      .out_token_stride = out.stride(0),
      .out_head_stride = out.stride(1),
      .dtype = dtype,
      .interleaved = interleaved,
  };
}

RopeRealignPagesParams rope_realign_pages_params(const Tensor& k_cache,
                                                 const Tensor& page_refs,
                                                 const Tensor& inv_freq,
                                                 bool interleaved) {
  const Arguments args("rope_realign_pages", k_cache);
  const PagePool pool = args.pool(k_cache, k_cache);
  args.writable("k_cache", k_cache);
  args.tensor("page_refs", page_refs, ScalarType::Int, {"num_refs", 4});
  args.contiguous("page_refs", page_refs);
  const int64_t rotary_dim = args.inv_freq(inv_freq, pool.head_dim);
  return {
      .k_cache = pool.k,
      .page_refs = data<PageRef>(page_refs),
      .inv_freq = data<float>(inv_freq),
      .num_refs = page_refs.size(0),
      .num_pages = pool.num_pages,
      .page_size = pool.page_size,
      .head_dim = pool.head_dim,
      .rotary_dim = rotary_dim,
      .k_page_stride = pool.k_page_stride,
      .k_slot_stride = pool.k_slot_stride,
      .dtype = pool.dtype,
      .interleaved = interleaved,
  };
}

namespace {

void rope_realign_out(const Tensor& k,
                      int64_t offset,
                      const Tensor& inv_freq,
                      bool interleaved,
                      std::optional<Tensor> offsets,
                      const Tensor& out) {
  cpu::rope_realign(rope_realign_params(k, offset, inv_freq, interleaved, offsets, out),
                    torch_executor());
}

Tensor rope_realign(const Tensor& k,
                    int64_t offset,
                    const Tensor& inv_freq,
                    bool interleaved,
                    std::optional<Tensor> offsets) {
  Arguments("rope_realign", k).floating("k", k, {"num_tokens", "num_heads", "head_dim"});
  const Tensor out = new_result(k, k.sizes());
  rope_realign_out(k, offset, inv_freq, interleaved, offsets, out);
  return out;
}

void rope_realign_pages(const Tensor& k_cache,
                        const Tensor& page_refs,
                        const Tensor& inv_freq,
                        bool interleaved) {
  const Arguments args("rope_realign_pages");
  const RopeRealignPagesParams params =
      rope_realign_pages_params(k_cache, page_refs, inv_freq, interleaved);
  const int64_t num_pages = k_cache.size(0);
  const PageRef* refs = params.page_refs;
  std::vector<bool> seen(num_pages);
  for (int64_t r = 0; r < params.num_refs; ++r) {
    args.page_ref(r, refs[r], num_pages, params.page_size);
    args.check(!seen[refs[r].page],
               "page_refs must name a page once, got page ",
               refs[r].page,
               " again at ",
               r);
    seen[refs[r].page] = true;
  }
  cpu::rope_realign_pages(params, torch_executor());
}

void add_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("rope_realign", TORCH_BOX(&rope_realign));
  m.impl("rope_realign_out", TORCH_BOX(&rope_realign_out));
  m.impl("rope_realign_pages", TORCH_BOX(&rope_realign_pages));
}

}  // namespace

RK_REGISTER_ON_CPU(add_ops)

}  // namespace redknot::binding
