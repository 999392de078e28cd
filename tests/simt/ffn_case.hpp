#pragma once

// One gathered_ffn on the executor, launched as the host launches it, against fp64.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "check.h"
#include "cuda/ffn/ffn_workspace.h"
#include "cuda/ffn/gather_norm.cuh"
#include "cuda/ffn/row_gemm.cuh"

namespace redknot::gpu {

struct FfnCase {
  std::vector<int32_t> rows;  // which are selected
  int32_t num_tokens = 40;
  int32_t hidden_dim = 64;
  int32_t ffn_dim = 96;
  bool is_packed = false;  // gate above up in one tensor
  int32_t padding = 0;     // elements behind every row of the weights and of the residual
  int32_t workers = 3;
  int64_t chunk_rows = kMaxChunkRows;
  Activation activation = Activation::kSilu;
};

inline std::vector<int32_t> first_rows(int32_t count) {
  std::vector<int32_t> rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

template <typename T>
double value_of(T x) {
  return to_float(x);
}

template <typename T>
class Ffn {
 public:
  explicit Ffn(const FfnCase& c)
      : case_(c),
        random_(1),
        norm_("norm_weight", weights(1, c.hidden_dim, 0, 1.0f, 0.1f)),
        gate_("w_gate",
              weights(c.is_packed ? 2 * c.ffn_dim : c.ffn_dim, c.hidden_dim, c.padding, 0.0f)),
        up_("w_up", c.is_packed ? std::vector<T>() : weights(c.ffn_dim, c.hidden_dim, c.padding)),
        down_("w_down", weights(c.hidden_dim, c.ffn_dim, c.padding)),
        before_(weights(c.num_tokens, c.hidden_dim, c.padding, 0.0f, 1.0f)),
        indices_("indices", listed(c)),
        count_("count", std::vector<int32_t>{static_cast<int32_t>(c.rows.size())}) {}

  GatheredFfnParams params(simt::Buffer<T>& residual) {
    const int64_t stride = case_.hidden_dim + case_.padding;
    return {
        .residual = residual.data(),
        .norm_weight = norm_.data(),
        .w_gate = gate_.data(),
        .w_up = case_.is_packed ? gate_.data() + case_.ffn_dim * stride : up_.data(),
        .w_down = down_.data(),
        .indices = indices_.data(),
        .count = count_.data(),
        .num_tokens = case_.num_tokens,
        .max_rows = static_cast<int64_t>(indices_.size()),
        .hidden_dim = case_.hidden_dim,
        .ffn_dim = case_.ffn_dim,
        .residual_stride = stride,
        .gate_stride = stride,
        .up_stride = stride,
        .down_stride = case_.ffn_dim + case_.padding,
        .eps = kEps,
        .activation = case_.activation,
        .dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16,
    };
  }

  // The largest error in units of a rounding of the result; infinite where something is not finite
  // or another token was touched. `run` launches the kernels of one chunk.
  template <typename Run>
  double error(const simt::Schedule& schedule, Run&& run) {
    simt::Buffer<T> residual("residual", before_);
    const GatheredFfnParams call = params(residual);
    FfnWorkspace workspace(call, {case_.workers, false});
    workspace.chunk_rows = std::min(workspace.chunk_rows, case_.chunk_rows);
    simt::Buffer<unsigned char> memory("workspace", workspace.num_bytes);
    for (int64_t first = 0; first < call.max_rows; first += workspace.chunk_rows) {
      run(ffn_chunk(call, workspace, memory.data(), first), case_.workers, schedule);
    }
    result_.assign(residual.begin(), residual.end());
    return compare(residual);
  }

  // Bits of the last error().
  const std::vector<T>& result() const { return result_; }

 private:
  static constexpr float kEps = 1e-5f;

  std::vector<T> weights(int64_t rows,
                         int64_t columns,
                         int64_t padding = 0,
                         float mean = 0.0f,
                         float deviation = 0.0f) {
    if (deviation == 0.0f) deviation = 1.0f / std::sqrt(static_cast<float>(columns));
    std::normal_distribution<float> normal(mean, deviation);
    std::vector<T> values(rows * (columns + padding) - padding);  // nothing behind the last row
    for (T& value : values) value = from_float<T>(normal(random_));
    return values;
  }

  static std::vector<int32_t> listed(const FfnCase& c) {
    std::vector<int32_t> all = c.rows;
    all.resize(std::max<size_t>(c.num_tokens, c.rows.size()), -1);
    return all;
  }

  double activated(double x) const {
    if (case_.activation == Activation::kSilu) return x / (1 + std::exp(-x));
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  }

  static double dot(const T* weights, const std::vector<double>& x) {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) sum += value_of(weights[i]) * x[i];
    return sum;
  }

  std::vector<double> ffn(const T* row) {
    const int64_t stride = case_.hidden_dim + case_.padding;
    const T* up = case_.is_packed ? gate_.data() + case_.ffn_dim * stride : up_.data();
    std::vector<double> x(case_.hidden_dim), h(case_.ffn_dim), z(case_.hidden_dim);
    double squares = 0;
    for (int d = 0; d < case_.hidden_dim; ++d) squares += value_of(row[d]) * value_of(row[d]);
    const double scale = 1 / std::sqrt(squares / case_.hidden_dim + kEps);
    for (int d = 0; d < case_.hidden_dim; ++d) x[d] = value_of(row[d]) * scale * value_of(norm_[d]);
    for (int f = 0; f < case_.ffn_dim; ++f) {
      h[f] = activated(dot(gate_.data() + f * stride, x)) * dot(up + f * stride, x);
    }
    for (int d = 0; d < case_.hidden_dim; ++d) {
      z[d] = dot(down_.data() + d * (case_.ffn_dim + case_.padding), h);
    }
    return z;
  }

  double compare(simt::Buffer<T>& residual) {
    const int64_t stride = case_.hidden_dim + case_.padding;
    const double rounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
    double worst = 0;
    for (int32_t token = 0; token < case_.num_tokens; ++token) {
      const T* before = before_.data() + token * stride;
      const T* got = residual.data() + token * stride;
      if (std::find(case_.rows.begin(), case_.rows.end(), token) == case_.rows.end()) {
        for (int d = 0; d < case_.hidden_dim; ++d) {
          if (got[d].bits != before[d].bits) return INFINITY;
        }
        continue;
      }
      const std::vector<double> z = ffn(before);
      for (int d = 0; d < case_.hidden_dim; ++d) {
        const double want = value_of(before[d]) + z[d];
        const double error = std::abs(value_of(got[d]) - want) / (rounding * (1 + std::abs(want)));
        if (!std::isfinite(error)) return INFINITY;
        worst = std::max(worst, error);
      }
    }
    for (int32_t token = 0; token + 1 < case_.num_tokens; ++token) {
      for (int64_t d = case_.hidden_dim; d < stride; ++d) {
        const int64_t i = token * stride + d;
        if (residual[i].bits != before_[i].bits) return INFINITY;
      }
    }
    return worst;
  }

  FfnCase case_;
  std::mt19937 random_;
  simt::Buffer<T> norm_, gate_, up_, down_;
  std::vector<T> before_, result_;
  simt::Buffer<int32_t> indices_, count_;
};

// The result is rounded once; what the intermediate roundings add is of the same size.
constexpr double kFfnTolerance = 4.0;

template <typename T>
void norm_chunk(const FfnChunk& chunk, int32_t workers, const simt::Schedule& schedule) {
  simt::launch({{static_cast<unsigned>(workers)}, {kNormThreads}, kNormThreads / 8, schedule},
               [&] { gather_norm_kernel<T, 8>(chunk.norm); });
}

// The launches of launch_ffn.cuh.
template <typename T>
void run_chunk(const FfnChunk& chunk, int32_t workers, const simt::Schedule& schedule) {
  norm_chunk<T>(chunk, workers, schedule);
  const simt::Launch launch{
      {static_cast<unsigned>(workers)}, {kGemmThreads}, kGemmSharedBytes, schedule};
  simt::launch(launch, [&] { row_gemm_kernel<T, Result::kGated>(chunk.gate_up); });
  simt::launch(launch, [&] { row_gemm_kernel<T, Result::kScatterAdd>(chunk.down); });
}

template <typename T, typename Run>
void expect_right_ffn(const FfnCase& c, Run&& run) {
  Ffn<T> ffn(c);
  std::vector<T> first;
  for (const simt::Schedule& schedule : simt::kSchedules) {
    const double error = ffn.error(schedule, run);
    if (!(error < kFfnTolerance)) {
      test::fail(__FILE__, __LINE__, "schedule ", simt::name_of(schedule), ": error ", error);
    }
    if (first.empty()) first = ffn.result();
    const auto same = [](T a, T b) { return a.bits == b.bits; };
    CHECK(std::equal(first.begin(), first.end(), ffn.result().begin(), same));
  }
}

}  // namespace redknot::gpu
