// The memory-bound kernels: one pass over rows, fp32 inside, one rounding on the way out.
#include "elementwise.h"

#include <cmath>

#include "gated.h"
#include "vec.h"

namespace redknot::cpu::REDKNOT_ISA {
namespace {

// visit(d, load, store) for every vector of a row; the last, short one goes through a buffer.
template <typename Full, typename Partial>
inline void for_each_vec(int64_t count, Full&& full, Partial&& partial) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) full(d);
  if (d < count) partial(d, count - d);
}

// Sum of squares of one row; two accumulators hide the latency of the addition.
template <typename T>
inline float sum_of_squares(const T* x, int64_t count) {
  Vec sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= count; d += 2 * kLanes) {
    const Vec a = load(x + d);
    const Vec b = load(x + d + kLanes);
    sums[0] = fma(a, a, sums[0]);
    sums[1] = fma(b, b, sums[1]);
  }
  for (; d < count; d += kLanes) {
    const Vec a = count - d < kLanes ? load_partial(x + d, count - d) : load(x + d);
    sums[0] = fma(a, a, sums[0]);
  }
  return reduce_add(sums[0] + sums[1]);
}

template <typename T>
void rope_half_split(const T* k, T* out, const float* cos, const float* sin, int64_t half) {
  const auto turn = [&](Vec x, Vec y, Vec c, Vec s, Vec* x_out, Vec* y_out) {
    *x_out = fma(x, c, -(y * s));
    *y_out = fma(y, c, x * s);
  };
  for_each_vec(
      half,
      [&](int64_t d) {
        Vec x, y;
        turn(load(k + d), load(k + half + d), load(cos + d), load(sin + d), &x, &y);
        store(out + d, x);
        store(out + half + d, y);
      },
      [&](int64_t d, int64_t n) {
        Vec x, y;
        turn(load_partial(k + d, n),
             load_partial(k + half + d, n),
             load_partial(cos + d, n),
             load_partial(sin + d, n),
             &x,
             &y);
        store_partial(out + d, x, n);
        store_partial(out + half + d, y, n);
      });
}

template <typename T>
void rope_interleaved(const T* k, T* out, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float x = to_float(k[2 * i]);
    const float y = to_float(k[2 * i + 1]);
    from_float(x * cos[i] - y * sin[i], out + 2 * i);
    from_float(y * cos[i] + x * sin[i], out + 2 * i + 1);
  }
}

}  // namespace

void rope_row(const void* k,
              void* out,
              const float* cos,
              const float* sin,
              int64_t head_dim,
              int64_t rotary_dim,
              DType dtype,
              bool interleaved) {
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto* source = static_cast<const T*>(k);
    auto* target = static_cast<T*>(out);
    (interleaved ? rope_interleaved<T>
                 : rope_half_split<T>)(source, target, cos, sin, rotary_dim / 2);
    if (source != target) {
      std::memcpy(target + rotary_dim, source + rotary_dim, (head_dim - rotary_dim) * sizeof(T));
    }
  });
}

void token_importance(const TokenImportanceParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t t = begin; t < end; ++t) {
      const T* token = static_cast<const T*>(params.attn_out) + t * params.token_stride;
      float sum = 0.0f;
      for (int64_t h = 0; h < params.num_q_heads; ++h) {
        sum += sum_of_squares(token + h * params.head_stride, params.head_dim);
      }
      params.importance[t] = __builtin_sqrtf(sum);
    }
  });
}

void merge_states(const MergeStatesParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = row / params.num_q_heads;
      const int64_t head = row % params.num_q_heads;
      const float lse_a = params.lse_a[head * params.lse_a_head_stride + token];
      const float lse_b = params.lse_b[head * params.lse_b_head_stride + token];
      const float top = lse_a > lse_b ? lse_a : lse_b;
      const float weight_a = top == -kInf ? 0.0f : __builtin_expf(lse_a - top);
      const float weight_b = top == -kInf ? 0.0f : __builtin_expf(lse_b - top);
      const float scale = top == -kInf ? 0.0f : 1.0f / (weight_a + weight_b);
      params.lse[head * params.num_tokens + token] =
          top == -kInf ? -kInf : top + __builtin_logf(weight_a + weight_b);

      const T* a = static_cast<const T*>(params.out_a) + token * params.a_token_stride +
                   head * params.a_head_stride;
      const T* b = static_cast<const T*>(params.out_b) + token * params.b_token_stride +
                   head * params.b_head_stride;
      T* out = static_cast<T*>(params.out) + row * params.head_dim;
      // What saw no key may hold anything.
      const auto merge = [&](Vec x, Vec y) {
        const Vec part_a = weight_a == 0.0f ? Vec{} : x * weight_a;
        const Vec part_b = weight_b == 0.0f ? Vec{} : y * weight_b;
        return (part_a + part_b) * scale;
      };
      for_each_vec(
          params.head_dim,
          [&](int64_t d) { store(out + d, merge(load(a + d), load(b + d))); },
          [&](int64_t d, int64_t n) {
            store_partial(out + d, merge(load_partial(a + d, n), load_partial(b + d, n)), n);
          });
    }
  });
}

void gather_norm(const GatherNormParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* weight = static_cast<const T*>(params.weight);
    const int64_t dim = params.hidden_dim;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = params.indices == nullptr ? i : params.indices[i];
      const T* x = static_cast<const T*>(params.residual) + row * params.residual_stride;
      T* out = static_cast<T*>(params.out) + i * dim;
      const float variance = sum_of_squares(x, dim) / static_cast<float>(dim);
      const Vec scale = broadcast(1.0f / __builtin_sqrtf(variance + params.eps));
      for_each_vec(
          dim,
          [&](int64_t d) { store(out + d, round_to<T>(load(x + d) * scale) * load(weight + d)); },
          [&](int64_t d, int64_t n) {
            const Vec normed = round_to<T>(load_partial(x + d, n) * scale);
            store_partial(out + d, normed * load_partial(weight + d, n), n);
          });
    }
  });
}

template <typename T, Activation kActivation>
static void gated_rows(const GatedActivationParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* gate = static_cast<const T*>(params.gate) + i * params.in_stride;
    const T* up = static_cast<const T*>(params.up) + i * params.in_stride;
    T* out = static_cast<T*>(params.out) + i * params.ffn_dim;
    for_each_vec(
        params.ffn_dim,
        [&](int64_t d) { store(out + d, gated<T, kActivation>(load(gate + d), load(up + d))); },
        [&](int64_t d, int64_t n) {
          const Vec last =
              gated<T, kActivation>(load_partial(gate + d, n), load_partial(up + d, n));
          store_partial(out + d, last, n);
        });
  }
}

void gated_activation(const GatedActivationParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    (params.activation == Activation::kSilu
         ? gated_rows<T, Activation::kSilu>
         : gated_rows<T, Activation::kGeluTanh>)(params, begin, end);
  });
}

void add_bias(const AddBiasParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* bias = static_cast<const T*>(params.bias);
    for (int64_t i = begin; i < end; ++i) {
      T* out = static_cast<T*>(params.out) + i * params.dim;
      for_each_vec(
          params.dim,
          [&](int64_t d) { store(out + d, load(out + d) + load(bias + d)); },
          [&](int64_t d, int64_t n) {
            store_partial(out + d, load_partial(out + d, n) + load_partial(bias + d, n), n);
          });
    }
  });
}

void scatter_add(const ScatterAddParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t i = begin; i < end; ++i) {
      const T* z = static_cast<const T*>(params.z) + i * params.hidden_dim;
      T* x = static_cast<T*>(params.residual) + params.indices[i] * params.residual_stride;
      for_each_vec(
          params.hidden_dim,
          [&](int64_t d) { store(x + d, load(x + d) + load(z + d)); },
          [&](int64_t d, int64_t n) {
            store_partial(x + d, load_partial(x + d, n) + load_partial(z + d, n), n);
          });
    }
  });
}

}  // namespace redknot::cpu::REDKNOT_ISA
