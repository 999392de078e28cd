#pragma once

// Random rows of paged keys, and what seg_paged_attention must make of them, in fp64 by plain loops
// over the visibility rule. Whatever is not a valid slot holds NaN.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <random>

#include "check.h"
#include "cuda/attention/attend.cuh"
#include "cuda/attention/hopper_attend.cuh"
#include "cuda/attention/hopper_decode.cuh"
#include "plan_reference.hpp"

namespace redknot::gpu {

// attention_test.cpp is built twice: for the kernels of sm_80, and for those of Hopper.
#ifdef RK_TEST_HOPPER
constexpr bool kOnHopper = true;
#else
constexpr bool kOnHopper = false;
#endif

// Keys of a row: `length` tokens from position `first` on, rotated `offset` away from there.
struct Run {
  int32_t first;
  int32_t length;
  int32_t offset = 0;
};

struct Case {
  std::vector<std::vector<Run>> rows;             // one per (sequence, KV head)
  std::vector<std::vector<int32_t>> q_positions;  // one per sequence
  int32_t group = 1;
  int32_t page_size = 16;
  std::vector<int32_t> window = {kGlobalWindow};  // of row r: entry r % size
  std::vector<int32_t> sink = {0};
  int32_t rotary_dim = 0;  // 0: head_dim
  float scale = 0.0f;      // 0: head_dim ** -0.5
  float softcap = 0.0f;
  bool interleaved = false;
};

inline std::vector<int32_t> range(int32_t begin, int32_t end) {
  std::vector<int32_t> values;
  for (int32_t i = begin; i < end; ++i) values.push_back(i);
  return values;
}

inline float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float value_of(__half x) { return __half2float(x); }

template <typename T, int kHeadDim>
class PagedAttention {
 public:
  explicit PagedAttention(const Case& c)
      : case_(c),
        num_seqs_(c.q_positions.size()),
        num_kv_heads_(num_seqs_ == 0 ? 1 : c.rows.size() / num_seqs_),
        num_q_heads_(num_kv_heads_ * c.group),
        refs_("page_refs", make_refs(c)),
        row_indptr_("row_indptr", row_indptr_values_),
        cu_seqlens_("cu_seqlens_q", bounds(c.q_positions)),
        positions_("q_positions", flat(c.q_positions)),
        window_("row_window", per_row(c.window)),
        sink_("row_sink", per_row(c.sink)),
        // One tensor for both, K before V in a slot, as engines have them.
        pool_("kv_cache", num_pages_ * c.page_size * 2 * kHeadDim),
        q_("q", positions_.size() * num_q_heads_ * kHeadDim),
        inv_freq_("inv_freq", rotary_dim() / 2) {
    for (int i = 0; i < rotary_dim() / 2; ++i) {
      inv_freq_[i] = static_cast<float>(std::pow(10000.0, -2.0 * i / rotary_dim()));
    }
    for (T& x : q_) x = random();
    for (const PageRef& ref : refs_) {
      T* page = pool_.data() + int64_t{ref.page} * c.page_size * 2 * kHeadDim;
      for (int i = 0; i < ref.num_valid * 2 * kHeadDim; ++i) page[i] = random();
    }
  }

  // Largest error of out and lse against fp64, `num_blocks` running the plan of each kernel.
  // The compact prefill is what GPUs of little shared memory run.
  template <bool kIsCompact = false>
  double error(const simt::Schedule& schedule, unsigned num_blocks = 3) {
    const int64_t num_tokens = positions_.size();
    const GpuPlanInput input = plan_input();
    simt::Buffer<int32_t> plan("plan", reference_plan(input));
    simt::Buffer<float> workspace("workspace", max_partial_rows(input) * (kHeadDim + 2));
    simt::Buffer<T> out("out", num_tokens * num_q_heads_ * kHeadDim);
    simt::Buffer<float> lse("lse", num_q_heads_ * num_tokens);
    const SegPagedAttentionParams params = make_params(plan, workspace, out, lse);
    const PlanShape shape(input);
    if constexpr (kOnHopper && !kIsCompact && has_hopper_attention(kHeadDim)) {
      const auto run = [&](auto kernel, int block_chunks, int threads, size_t smem) {
        HopperParams hopper{{}, {}, {}, {}, {}, params, shape, ScoreScale(params), 0};
        if (!fill_hopper_params(params, block_chunks, &hopper)) throw simt::Error("no tensor map");
        simt::launch({{num_blocks}, {static_cast<unsigned>(threads)}, smem, schedule},
                     [&] { kernel(hopper); });
      };
      using Decode = HopperDecodeShape<kHeadDim>;
      run(&hopper_attend_kernel<T, kHeadDim>,
          HopperShape<kHeadDim>::kChunks,
          kHopperThreads,
          sizeof(HopperShared<T, kHeadDim>));
      run(&hopper_decode_kernel<T, kHeadDim>,
          Decode::kChunks,
          Decode::kThreads,
          sizeof(HopperDecodeShared<T, kHeadDim>));
    } else {
      launch<true, kIsCompact>(params, shape, schedule, num_blocks);
      launch<false>(params, shape, schedule, num_blocks);
    }
    simt::launch({{num_blocks}, {128}, 0, schedule},
                 [&] { merge_splits_kernel<T, kHeadDim>(params, shape); });
    result_.assign(out.begin(), out.end());
    return compare(out, lse);
  }

  const std::vector<T>& result() const { return result_; }
  PageRef& page_ref(size_t number) { return refs_[number]; }
  int64_t num_pages() const { return num_pages_; }
  int64_t num_partial_rows() {
    return reinterpret_cast<const GpuPlanHeader*>(reference_plan(plan_input()).data())
        ->num_partial_rows;
  }

 private:
  template <bool kIsPrefill, bool kIsCompact = false>
  void launch(const SegPagedAttentionParams& params,
              const PlanShape& shape,
              const simt::Schedule& schedule,
              unsigned num_blocks) {
    using Shape = TileShape<kHeadDim, kIsPrefill, kIsCompact>;
    const size_t smem = sizeof(SharedMemory<T, kHeadDim, kIsPrefill, kIsCompact>);
    simt::launch({{num_blocks}, {Shape::kThreads}, smem, schedule}, [&] {
      attend_kernel<T, kHeadDim, kIsPrefill, kIsCompact>(params, shape, ScoreScale(params));
    });
  }

  GpuPlanInput plan_input() {
    return {row_indptr_.data(),
            cu_seqlens_.data(),
            positions_.data(),
            window_.data(),
            sink_.data(),
            num_seqs_,
            num_kv_heads_,
            num_q_heads_,
            static_cast<int64_t>(positions_.size()),
            case_.page_size};
  }

  SegPagedAttentionParams make_params(simt::Buffer<int32_t>& plan,
                                      simt::Buffer<float>& workspace,
                                      simt::Buffer<T>& out,
                                      simt::Buffer<float>& lse) {
    SegPagedAttentionParams params;
    params.pool.k = pool_.data();
    params.pool.v = pool_.data() + kHeadDim;
    params.pool.num_pages = num_pages_;
    params.pool.page_size = case_.page_size;
    params.pool.head_dim = kHeadDim;
    params.pool.dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
    params.pool.k_page_stride = params.pool.v_page_stride = case_.page_size * 2 * kHeadDim;
    params.pool.k_slot_stride = params.pool.v_slot_stride = 2 * kHeadDim;
    params.q = q_.data();
    params.out = out.data();
    params.maybe_lse = lse.data();
    params.row_indptr = row_indptr_.data();
    params.page_refs = refs_.data();
    params.cu_seqlens_q = cu_seqlens_.data();
    params.q_positions = positions_.data();
    params.row_window = window_.data();
    params.row_sink = sink_.data();
    params.maybe_inv_freq = inv_freq_.data();
    params.plan = plan.data();
    params.maybe_workspace = workspace.data();
    params.num_tokens = positions_.size();
    params.num_q_heads = num_q_heads_;
    params.num_kv_heads = num_kv_heads_;
    params.num_seqs = num_seqs_;
    params.num_refs = refs_.size();
    params.rotary_dim = rotary_dim();
    params.q_token_stride = params.out_token_stride = num_q_heads_ * kHeadDim;
    params.q_head_stride = params.out_head_stride = kHeadDim;
    params.softmax_scale = scale();
    params.softcap = case_.softcap;
    params.rope_interleaved = case_.interleaved;
    return params;
  }

  double compare(simt::Buffer<T>& out, simt::Buffer<float>& lse) {
    double worst = 0;
    const auto differ = [&worst](double got, double want) {
      const double difference = got == want ? 0.0 : std::abs(got - want);
      worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
    };
    const int64_t num_tokens = positions_.size();
    for (int64_t row = 0; row < num_seqs_ * num_kv_heads_; ++row) {
      const int64_t seq = row / num_kv_heads_;
      for (int64_t t = cu_seqlens_[seq]; t < cu_seqlens_[seq + 1]; ++t) {
        for (int64_t g = 0; g < case_.group; ++g) {
          const int64_t head = row % num_kv_heads_ * case_.group + g;
          std::vector<double> expected(kHeadDim + 1);
          attend(row, t, q_.data() + (t * num_q_heads_ + head) * kHeadDim, expected.data());
          const T* got = out.data() + (t * num_q_heads_ + head) * kHeadDim;
          for (int d = 0; d < kHeadDim; ++d) differ(value_of(got[d]), expected[d]);
          differ(lse[head * num_tokens + t], expected[kHeadDim]);
        }
      }
    }
    return worst;
  }

  // head_dim sums, then the log-sum-exp.
  void attend(int64_t row, int64_t token, const T* q, double* result) {
    std::vector<double> scores;
    std::vector<const T*> values;
    for (int32_t r = row_indptr_[row]; r < row_indptr_[row + 1]; ++r) {
      const PageRef& ref = refs_[r];
      for (int32_t slot = 0; slot < ref.num_valid; ++slot) {
        const int64_t position = int64_t{ref.first_position} + slot;
        if (!is_visible(position, positions_[token], window_[row], sink_[row])) continue;
        const T* k = pool_.data() + (int64_t{ref.page} * case_.page_size + slot) * 2 * kHeadDim;
        const double score = dot(q, k, ref.rotation_offset) * scale();
        scores.push_back(case_.softcap > 0 ? case_.softcap * std::tanh(score / case_.softcap)
                                           : score);
        values.push_back(k + kHeadDim);
      }
    }
    std::fill_n(result, kHeadDim + 1, 0.0);
    result[kHeadDim] = -INFINITY;
    if (scores.empty()) return;
    const double highest = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (size_t j = 0; j < scores.size(); ++j) {
      const double weight = std::exp(scores[j] - highest);
      sum += weight;
      for (int d = 0; d < kHeadDim; ++d) result[d] += weight * value_of(values[j][d]);
    }
    for (int d = 0; d < kHeadDim; ++d) result[d] /= sum;
    result[kHeadDim] = highest + std::log(sum);
  }

  // q . R(offset) k
  double dot(const T* q, const T* k, int32_t offset) {
    double sum = 0;
    const int half = rotary_dim() / 2;
    for (int d = 0; d < kHeadDim; ++d) {
      double key = value_of(k[d]);
      if (offset != 0 && d < 2 * half) {
        const bool is_first = case_.interleaved ? d % 2 == 0 : d < half;
        const int apart = case_.interleaved ? 1 : half;
        const double angle =
            static_cast<float>(offset) * inv_freq_[case_.interleaved ? d / 2 : d % half];
        const double other = value_of(k[is_first ? d + apart : d - apart]);
        key = key * std::cos(angle) + (is_first ? -other : other) * std::sin(angle);
      }
      sum += value_of(q[d]) * key;
    }
    return sum;
  }

  std::vector<PageRef> make_refs(const Case& c) {
    std::vector<PageRef> refs;
    row_indptr_values_ = {0};
    for (const auto& row : c.rows) {
      for (const Run& run : row) {
        for (int32_t at = 0; at < run.length; at += c.page_size) {
          refs.push_back({0, run.first + at, std::min(c.page_size, run.length - at), run.offset});
        }
      }
      row_indptr_values_.push_back(static_cast<int32_t>(refs.size()));
    }
    num_pages_ = static_cast<int64_t>(refs.size()) + 3;
    std::vector<int32_t> pages = range(0, static_cast<int32_t>(num_pages_));
    std::shuffle(pages.begin(), pages.end(), random_);
    for (size_t i = 0; i < refs.size(); ++i) refs[i].page = pages[i];
    return refs;
  }

  static std::vector<int32_t> bounds(const std::vector<std::vector<int32_t>>& lists) {
    std::vector<int32_t> ends = {0};
    for (const auto& list : lists) ends.push_back(ends.back() + static_cast<int32_t>(list.size()));
    return ends;
  }
  static std::vector<int32_t> flat(const std::vector<std::vector<int32_t>>& lists) {
    std::vector<int32_t> all;
    for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
    return all;
  }
  std::vector<int32_t> per_row(const std::vector<int32_t>& values) {
    std::vector<int32_t> all;
    for (size_t r = 0; r < case_.rows.size(); ++r) all.push_back(values[r % values.size()]);
    return all;
  }
  T random() {
    const float x = std::normal_distribution<float>()(random_);
    if constexpr (std::is_same_v<T, __half>) {
      return __float2half_rn(x);
    } else {
      return __float2bfloat16_rn(x);
    }
  }
  int rotary_dim() const { return case_.rotary_dim > 0 ? case_.rotary_dim : kHeadDim; }
  float scale() const {
    return case_.scale > 0 ? case_.scale : 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  }

  Case case_;
  int64_t num_seqs_, num_kv_heads_, num_q_heads_;
  int64_t num_pages_ = 0;
  std::mt19937 random_;
  std::vector<int32_t> row_indptr_values_;
  simt::Buffer<PageRef> refs_;
  simt::Buffer<int32_t> row_indptr_, cu_seqlens_, positions_, window_, sink_;
  simt::Buffer<T> pool_, q_;
  simt::Buffer<float> inv_freq_;
  std::vector<T> result_;
};

// 0.02 is what bf16 weights and outputs of a few units leave; a wrong matrix row was seen at 0.068.
constexpr double kTolerance = 0.02;

template <typename T, int kHeadDim, bool kIsCompact = false>
void expect_right(const Case& c) {
  if (kOnHopper && !has_hopper_attention(kHeadDim)) return;  // it has no other kernel than sm_80's
  PagedAttention<T, kHeadDim> attention(c);
  for (const simt::Schedule& schedule : simt::kSchedules) {
    const double error = attention.template error<kIsCompact>(schedule);
    if (!(error < kTolerance)) {
      test::fail(__FILE__, __LINE__, "schedule ", simt::name_of(schedule), ": error ", error);
    }
  }
}

}  // namespace redknot::gpu
