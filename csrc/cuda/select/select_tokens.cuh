#pragma once

// select_tokens on the device, where the count of what was selected stays: no host ever waits.
//
// keep_tokens_kernel: a block per sequence finds two thresholds (threshold.cuh), that of the mass
// and that of the floor, and writes the tokens it keeps, ascending, where the sequence begins.
// gather_kept_kernel: a block per sequence moves them behind those of the sequences before it, and
// all blocks fill what is left with -1.
//
// With the floor: the union of the recent tokens and the first r by importance that has min_keep
// elements is the recent ones and the first (min_keep - recent) of the others.
#include "cuda/select/threshold.cuh"
#include "redknot/select.h"

namespace redknot::gpu {

// Between the two kernels.
struct KeptTokens {
  int32_t* tokens;  // [num_tokens], sequence s from cu_seqlens[s] on
  int32_t* counts;  // [num_seqs]
};

struct KeepScratch {
  SearchScratch search;
  unsigned long long sums[32];
  uint32_t counts[32];
};

struct TokenRange {
  int64_t begin;
  int64_t size;
};

// Offsets are not checked on the device; wrong ones select wrong tokens, but none out of bounds.
__device__ inline TokenRange tokens_of(const SelectTokensParams& params, int64_t sequence) {
  int64_t begin = params.cu_seqlens[sequence], end = params.cu_seqlens[sequence + 1];
  begin = begin < 0 ? 0 : begin > params.num_tokens ? params.num_tokens : begin;
  end = end < begin ? begin : end > params.num_tokens ? params.num_tokens : end;
  return {begin, end - begin};
}

__device__ inline Threshold mass_threshold(const float* importance,
                                           int64_t n,
                                           double mass,
                                           KeepScratch& scratch) {
  if (mass >= 1.0) return kAll;
  uint32_t max_key = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t key = key_of(importance[i]);
    if (key > max_key) max_key = key;
  }
  max_key =
      block_reduce(max_key, scratch.counts, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  unsigned long long total = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    total += fixed_point(key_of(importance[i]), max_key);
  }
  total = block_reduce(
      total, scratch.sums, [](unsigned long long a, unsigned long long b) { return a + b; });
  const auto target = static_cast<uint64_t>(ceil(mass * static_cast<double>(total)));
  const auto weight_of = [max_key](uint32_t key) { return fixed_point(key, max_key); };
  return find_threshold(importance, n, target, weight_of, scratch.search);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    keep_tokens_kernel(SelectTokensParams params, KeptTokens kept) {
  RK_DYNAMIC_SMEM(smem);
  auto& scratch = *reinterpret_cast<KeepScratch*>(smem);
  const TokenRange range = tokens_of(params, blockIdx.x);
  const float* importance = params.importance + range.begin;
  const int64_t n = range.size;
  const int64_t num_recent = params.recent_n < n ? params.recent_n : n;
  const int64_t num_others = n - num_recent;

  const Threshold mass = mass_threshold(importance, n, params.mass, scratch);
  const int64_t floor_count = params.min_keep - num_recent;
  const Threshold floor = floor_count >= num_others ? kAll
                                                    : find_threshold(
                                                          importance,
                                                          num_others,
                                                          floor_count > 0 ? floor_count : 0,
                                                          [](uint32_t) { return uint64_t{1}; },
                                                          scratch.search);

  // Tokens in order, a block's width at a time; ties of both thresholds are counted in one sum.
  uint32_t mass_ties = 0, floor_ties = 0, num_kept = 0;
  for (int64_t base = 0; base < n; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const uint32_t key = i < n ? key_of(importance[i]) : 0;
    const bool is_mass_tie = i < n && key == mass.key;
    const bool is_floor_tie = i < num_others && key == floor.key;
    uint32_t ties = 0;
    const uint32_t ties_before =
        block_exclusive_sum(is_mass_tie | is_floor_tie << 16, scratch.counts, &ties);
    const bool keep =
        i < n && (i >= num_others || key > mass.key || key > floor.key ||
                  (is_mass_tie && mass_ties + (ties_before & 0xffffu) < mass.num_ties) ||
                  (is_floor_tie && floor_ties + (ties_before >> 16) < floor.num_ties));
    uint32_t num_kept_here = 0;
    const uint32_t kept_before = block_exclusive_sum(keep, scratch.counts, &num_kept_here);
    if (keep) {
      kept.tokens[range.begin + num_kept + kept_before] = static_cast<int32_t>(range.begin + i);
    }
    mass_ties += ties & 0xffffu;
    floor_ties += ties >> 16;
    num_kept += num_kept_here;
  }
  if (threadIdx.x == 0) kept.counts[blockIdx.x] = static_cast<int32_t>(num_kept);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    gather_kept_kernel(SelectTokensParams params, KeptTokens kept) {
  RK_DYNAMIC_SMEM(smem);
  auto* scratch = reinterpret_cast<uint32_t*>(smem);
  uint32_t before = 0, all = 0;
  for (int64_t s = threadIdx.x; s < params.num_seqs; s += blockDim.x) {
    const auto count = static_cast<uint32_t>(kept.counts[s]);
    before += s < blockIdx.x ? count : 0;
    all += count;
  }
  const auto add = [](uint32_t a, uint32_t b) { return a + b; };
  before = block_reduce(before, scratch, add);
  all = block_reduce(all, scratch, add);
  if (blockIdx.x < params.num_seqs) {
    const TokenRange range = tokens_of(params, blockIdx.x);
    for (int64_t i = threadIdx.x; i < kept.counts[blockIdx.x]; i += blockDim.x) {
      params.indices[before + i] = kept.tokens[range.begin + i];
    }
  }
  for (int64_t i = int64_t{all} + blockIdx.x * blockDim.x + threadIdx.x; i < params.num_tokens;
       i += gridDim.x * blockDim.x) {
    params.indices[i] = -1;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *params.count = static_cast<int32_t>(all);
}

}  // namespace redknot::gpu
