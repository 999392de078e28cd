#pragma once

// Which tokens of a sequence are the most important, without sorting them: the order of finite
// floats that are not negative is that of their bits, so a radix search finds the bits of the last
// one that is needed, eight at a time from the top. A histogram of the tokens that match the bits
// found so far says by what weight each next digit is reached.
//
// Weights are whole numbers: sums do not depend on the order of the threads, and two runs agree.
#include <cstdint>

#include "cuda/common/host_device.h"
#include "cuda/ptx/simt.cuh"

namespace redknot::gpu {

// Tokens whose key is greater, and of those with this key the first `num_ties`.
struct Threshold {
  uint32_t key;
  uint32_t num_ties;
};
constexpr Threshold kAll = {0, 0xffffffffu};
constexpr Threshold kNone = {0xffffffffu, 0};

// NaN and negative numbers do not come here from the ops; they must not do harm either.
__device__ __forceinline__ uint32_t key_of(float importance) {
  uint32_t bits;
  memcpy(&bits, &importance, sizeof(bits));
  return bits < 0x7f800000u ? bits : 0u;
}

// A key's value in units of 2^(exponent of max_key - 40): exact down to 2^-16 of the maximum, so
// that the sum of 2^23 tokens fits and is what doubles would give.
__device__ __forceinline__ uint64_t fixed_point(uint32_t key, uint32_t max_key) {
  const uint32_t exponent = key >> 23 == 0 ? 1 : key >> 23;
  const uint32_t max_exponent = max_key >> 23 == 0 ? 1 : max_key >> 23;
  const uint64_t mantissa = (key & 0x7fffffu) | (key >> 23 == 0 ? 0u : 0x800000u);
  const uint32_t below = max_exponent - exponent;
  if (below <= 16) return mantissa << (16 - below);
  return below < 48 ? mantissa >> (below - 16) : 0;
}

// --- sums over the threads of a block; `scratch` holds 32 of T and is free again afterwards
// -------

template <typename T, typename Combine>
__device__ T block_reduce(T value, T* scratch, Combine combine) {
  for (int step = 16; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp) {
    value = combine(value, scratch[warp]);
  }
  __syncthreads();
  return value;
}

// Sum over the threads before this one; *total over all.
__device__ inline uint32_t block_exclusive_sum(uint32_t value, uint32_t* scratch, uint32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  uint32_t before = 0, all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
    if (w == warp) before = all;
    all += scratch[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

// --- the search ---------------------------------------------------------------------------------

struct SearchScratch {
  unsigned long long weight_of_digit[256];
  unsigned long long remaining;
  uint32_t digit;
};

// Most tokens of a real sequence share their first digit, and atomics on one address wait for each
// other: the lanes of the two most recently seen digits are summed within the warp first.
__device__ inline void add_to_histogram(unsigned long long* weight_of_digit,
                                        uint32_t digit,
                                        unsigned long long weight) {
  uint32_t waiting = __ballot_sync(0xffffffffu, weight != 0);
  for (int round = 0; round < 2 && waiting != 0; ++round) {
    const uint32_t leading_digit = __shfl_sync(0xffffffffu, digit, __ffs(waiting) - 1);
    const bool is_mine = weight != 0 && digit == leading_digit;
    unsigned long long sum = is_mine ? weight : 0;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) atomicAdd(weight_of_digit + leading_digit, sum);
    if (is_mine) weight = 0;
    waiting = __ballot_sync(0xffffffffu, weight != 0);
  }
  if (weight != 0) atomicAdd(weight_of_digit + digit, weight);
}

// The digit at which the sum from the largest downwards reaches scratch.remaining, which becomes
// what that digit must contribute. The first warp does it: a lane owns eight digits.
__device__ inline void find_digit(SearchScratch& scratch) {
  if (threadIdx.x < 32) {
    const int top = 255 - 8 * static_cast<int>(threadIdx.x);
    unsigned long long own = 0;
    for (int i = 0; i < 8; ++i) own += scratch.weight_of_digit[top - i];
    unsigned long long sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const unsigned long long above = __shfl_up_sync(0xffffffffu, sum, step);
      if (static_cast<int>(threadIdx.x) >= step) sum += above;
    }
    const unsigned long long remaining = scratch.remaining;
    __syncwarp();
    if (sum - own < remaining && remaining <= sum) {
      unsigned long long left = remaining - (sum - own);
      int digit = top;
      while (left > scratch.weight_of_digit[digit]) left -= scratch.weight_of_digit[digit--];
      scratch.digit = static_cast<uint32_t>(digit);
      scratch.remaining = left;
    }
  }
}

// The fewest tokens of [0, n), by descending importance, whose weights reach `target`, which their
// sum does. weight_of(key) > 0 is what a token counts; keys of weight 0 are never needed.
template <typename WeightOf>
__device__ Threshold find_threshold(const float* importance,
                                    int64_t n,
                                    uint64_t target,
                                    WeightOf weight_of,
                                    SearchScratch& scratch) {
  if (target == 0) return kNone;
  uint32_t found = 0;
  if (threadIdx.x == 0) scratch.remaining = target;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < 256; digit += blockDim.x) {
      scratch.weight_of_digit[digit] = 0;
    }
    __syncthreads();
    for (int64_t base = 0; base < n; base += blockDim.x) {
      const int64_t i = base + threadIdx.x;
      const uint32_t key = i < n ? key_of(importance[i]) : 0;
      const bool matches = i < n && (uint64_t{key} ^ found) >> (shift + 8) == 0;
      add_to_histogram(scratch.weight_of_digit, key >> shift & 255u, matches ? weight_of(key) : 0);
    }
    __syncthreads();
    find_digit(scratch);
    __syncthreads();
    found |= scratch.digit << shift;
  }
  const uint64_t weight = weight_of(found);
  const uint64_t remaining = scratch.remaining;
  __syncthreads();
  return {found, static_cast<uint32_t>((remaining + weight - 1) / weight)};
}

}  // namespace redknot::gpu
