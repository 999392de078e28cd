// Every schema of torch.ops.redknot, on one page. Arguments are explained in redknot/ops; the
// implementations register themselves in *_op.cpp (CPU) and cuda/*_op.cpp.
#include <torch/csrc/stable/library.h>

// What both forms of attention take.
#define RK_ATTENTION_INPUTS                                                         \
  "Tensor q, Tensor k_cache, Tensor v_cache, Tensor row_indptr, Tensor page_refs, " \
  "Tensor cu_seqlens_q, Tensor q_positions, Tensor row_window, Tensor row_sink, "   \
  "Tensor? inv_freq=None, bool rope_interleaved=False, float? softmax_scale=None, " \
  "float softcap=0.0, Tensor? plan=None"

STABLE_TORCH_LIBRARY(redknot, m) {
  m.def("seg_paged_attention(" RK_ATTENTION_INPUTS
        ", bool return_lse=False) -> (Tensor out, Tensor lse)");
  m.def("seg_paged_attention_out(" RK_ATTENTION_INPUTS
        ", *, Tensor(a!) out, Tensor(b!)? lse=None) -> ()");
  m.def(
      "seg_paged_plan(Tensor row_indptr, Tensor cu_seqlens_q, Tensor q_positions, "
      "Tensor row_window, Tensor row_sink, int num_q_heads, int page_size, int num_workers) "
      "-> Tensor");
  m.def(
      "_check_paged_rows(Tensor row_indptr, Tensor page_refs, Tensor cu_seqlens_q, "
      "Tensor q_positions, Tensor row_window, Tensor row_sink, int num_q_heads, int num_pages, "
      "int page_size, bool has_inv_freq) -> ()");
  m.def(
      "write_pages(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) "
      "-> ()");
  m.def("copy_pages(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor copies) -> ()");
  m.def(
      "rope_realign(Tensor k, int offset, Tensor inv_freq, bool interleaved=False, *, "
      "Tensor? offsets=None) -> Tensor");
  m.def(
      "rope_realign_out(Tensor k, int offset, Tensor inv_freq, bool interleaved=False, *, "
      "Tensor? offsets=None, Tensor(a!) out) -> ()");
  m.def(
      "rope_realign_pages(Tensor(a!) k_cache, Tensor page_refs, Tensor inv_freq, "
      "bool interleaved=False) -> ()");
  m.def("token_importance(Tensor attn_out) -> Tensor");
  m.def(
      "select_tokens(Tensor importance, Tensor cu_seqlens, float mass, int recent_n, "
      "int min_keep) -> (Tensor indices, Tensor count)");
  m.def(
      "gathered_ffn(Tensor(a!) residual, Tensor norm_weight, float eps, Tensor w_gate_up, "
      "Tensor w_down, Tensor indices, Tensor count, str activation=\"silu\", *, "
      "Tensor? w_up=None) -> ()");
  m.def(
      "gathered_linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? norm_weight=None, "
      "float eps=0.0, Tensor? indices=None, Tensor? count=None) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def(
      "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
      "-> (Tensor out, Tensor lse)");
  // The instruction set of the CPU kernels: sets it unless empty, returns the one in use.
  m.def("_cpu_isa(str isa) -> str");
  // The newest architecture whose CUDA kernels may run, where the device has it: sets it unless
  // empty, returns the one in use. sm_80 or sm_90a; builds without CUDA have no implementation.
  m.def("_cuda_arch(str arch) -> str");
  // Benchmarks measure with these what the machine can do.
  m.def("_cpu_dot_roof(Tensor like, int num_rounds) -> int");
  m.def("_cpu_read_roof(Tensor data, Tensor order) -> float");
}
