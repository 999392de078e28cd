// token_importance, select_tokens and merge_states on the executor, against their definitions.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "check.h"
#include "cuda/merge/merge_states.cuh"
#include "cuda/select/select_tokens.cuh"
#include "cuda/select/token_importance.cuh"

namespace {

using namespace redknot;
using namespace redknot::gpu;
using simt::Buffer;

// A small generator of its own, so that failures can be replayed anywhere.
struct Random {
  uint32_t state;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / (1 << 24);
  }
};

// --- select_tokens ------------------------------------------------------------------------------

struct SelectCase {
  std::vector<int32_t> lengths;
  std::vector<float> importance;
  double mass = 0.5;
  int64_t recent_n = 0;
  int64_t min_keep = 0;
};

// By sorting, with sums in double: the definition in redknot/select.h.
std::vector<int32_t> definition(const SelectCase& test) {
  std::vector<int32_t> kept;
  int32_t begin = 0;
  for (const int32_t n : test.lengths) {
    const float* x = test.importance.data() + begin;
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return x[a] > x[b]; });
    double total = 0, sum = 0;
    for (const int32_t token : order) total += x[token];
    std::set<int32_t> chosen;
    for (int32_t i = std::max<int32_t>(0, n - test.recent_n); i < n; ++i) chosen.insert(i);
    for (const int32_t token : order) {
      if (test.mass < 1 && sum >= test.mass * total) break;
      sum += x[token];
      chosen.insert(token);
    }
    for (const int32_t token : order) {
      if (static_cast<int64_t>(chosen.size()) >= test.min_keep) break;
      chosen.insert(token);
    }
    for (const int32_t token : chosen) kept.push_back(begin + token);
    begin += n;
  }
  return kept;
}

std::vector<int32_t> selected(const SelectCase& test, const simt::Schedule& schedule) {
  constexpr int kThreads = 64;
  const auto num_tokens = static_cast<int64_t>(test.importance.size());
  const auto num_seqs = static_cast<int64_t>(test.lengths.size());
  std::vector<int32_t> offsets = {0};
  for (const int32_t n : test.lengths) offsets.push_back(offsets.back() + n);
  Buffer<float> importance("importance", test.importance);
  Buffer<int32_t> cu_seqlens("cu_seqlens", offsets);
  Buffer<int32_t> indices("indices", num_tokens), count("count", 1);
  Buffer<int32_t> tokens("kept.tokens", num_tokens), counts("kept.counts", num_seqs);
  const SelectTokensParams params = {
      .importance = importance.data(),
      .cu_seqlens = cu_seqlens.data(),
      .indices = indices.data(),
      .count = count.data(),
      .num_tokens = num_tokens,
      .num_seqs = num_seqs,
      .recent_n = test.recent_n,
      .min_keep = test.min_keep,
      .mass = test.mass,
  };
  const KeptTokens kept = {tokens.data(), counts.data()};
  const auto blocks = static_cast<unsigned>(num_seqs);
  if (num_seqs > 0) {
    simt::launch({{blocks}, {kThreads}, sizeof(KeepScratch), schedule},
                 [&] { keep_tokens_kernel<kThreads>(params, kept); });
  }
  simt::launch({{std::max(blocks, 1u)}, {kThreads}, 32 * sizeof(uint32_t), schedule},
               [&] { gather_kept_kernel<kThreads>(params, kept); });
  CHECK(count[0] >= 0 && count[0] <= num_tokens);
  for (int64_t i = count[0]; i < num_tokens; ++i) CHECK_EQ(indices[i], -1);
  return {indices.begin(), indices.begin() + count[0]};
}

void expect_definition(const SelectCase& test) {
  const std::vector<int32_t> want = definition(test);
  for (const simt::Schedule& schedule : simt::kSchedules) {
    CHECK(selected(test, schedule) == want);
  }
}

// Tiles are 64 tokens wide here: below, at and beyond their borders, and empty sequences.
const std::vector<int32_t> kLengths = {0, 1, 63, 64, 65, 0, 200, 7};

SelectCase random_case(uint32_t seed, int levels) {
  Random random{seed};
  SelectCase test;
  test.lengths = kLengths;
  for (const int32_t n : kLengths) {
    for (int32_t i = 0; i < n; ++i) {
      const float x = random();
      // A few levels: many ties. None: magnitudes of attention outputs, six octaves apart.
      test.importance.push_back(levels > 0 ? std::floor(x * levels) : std::exp2(8 * x - 4));
    }
  }
  return test;
}

TEST(every_mass_keeps_the_fewest_tokens) {
  for (const double mass : {0.0, 1e-9, 0.05, 0.5, 0.95, 0.999999, 1.0, 2.0}) {
    SelectCase test = random_case(1, 0);
    test.mass = mass;
    expect_definition(test);
  }
}

TEST(ties_go_to_the_lower_index) {
  for (const int levels : {1, 2, 5}) {
    for (const double mass : {0.1, 0.5, 0.9}) {
      SelectCase test = random_case(2, levels);
      test.mass = mass;
      expect_definition(test);
    }
  }
}

TEST(recent_tokens_and_the_floor_count_once) {
  for (const int64_t recent_n : {0, 1, 64, 70, 1000}) {
    for (const int64_t min_keep : {0, 1, 66, 1000}) {
      SelectCase test = random_case(3, 9);
      test.mass = 0.1;
      test.recent_n = recent_n;
      test.min_keep = min_keep;
      expect_definition(test);
    }
  }
}

TEST(importances_of_every_magnitude_are_told_apart) {
  SelectCase test;
  test.lengths = {8};
  test.importance = {3e38f, 1e38f, 1.0f, 1e-38f, 1e-45f, 0, 2e38f, 0};
  for (const int64_t min_keep : {0, 4, 5, 6, 7}) {
    test.mass = 0.4;
    test.min_keep = min_keep;
    expect_definition(test);
  }
}

TEST(no_sequence_selects_nothing) {
  const SelectCase test;
  CHECK(selected(test, {}).empty());
}

// --- token_importance ---------------------------------------------------------------------------

template <int kSize>
void expect_norms(int64_t num_heads, int64_t head_dim, int64_t head_stride) {
  const int64_t num_tokens = 11, token_stride = num_heads * head_stride + 8;
  Random random{4};
  std::vector<__nv_bfloat16> values(num_tokens * token_stride);
  for (auto& x : values) x = __float2bfloat16_rn(random() - 0.5f);
  Buffer<__nv_bfloat16> attn_out("attn_out", values);
  for (const simt::Schedule& schedule : simt::kSchedules) {
    Buffer<float> importance("importance", num_tokens);
    const TokenImportanceParams params = {
        .attn_out = attn_out.data(),
        .importance = importance.data(),
        .num_tokens = num_tokens,
        .num_q_heads = num_heads,
        .head_dim = head_dim,
        .token_stride = token_stride,
        .head_stride = head_stride,
        .dtype = DType::kBFloat16,
    };
    simt::launch({{3}, {64}, 0, schedule},
                 [&] { token_importance_kernel<__nv_bfloat16, kSize>(params); });
    for (int64_t t = 0; t < num_tokens; ++t) {
      double sum = 0;
      for (int64_t h = 0; h < num_heads; ++h) {
        for (int64_t d = 0; d < head_dim; ++d) {
          const double x = __bfloat162float(values[t * token_stride + h * head_stride + d]);
          sum += x * x;
        }
      }
      CHECK(std::abs(importance[t] - std::sqrt(sum)) <= 1e-5 * std::sqrt(sum));
    }
  }
}

TEST(importance_is_the_norm_over_all_heads) {
  expect_norms<8>(4, 32, 32);
  expect_norms<8>(3, 128, 136);  // a head of 16 vectors, then one of more than a warp's
  expect_norms<8>(1, 512, 512);
  expect_norms<1>(5, 7, 9);
}

// --- merge_states -------------------------------------------------------------------------------

template <int kSize>
void expect_merged(int64_t head_dim) {
  const int64_t num_tokens = 9, num_heads = 3, count = num_tokens * num_heads;
  Random random{5};
  std::vector<float> a(count * head_dim), b(a.size()), lse_a(count), lse_b(count);
  for (auto* values : {&a, &b}) {
    for (float& x : *values) x = random() - 0.5f;
  }
  for (auto* values : {&lse_a, &lse_b}) {
    for (float& x : *values) x = 20 * random() - 10;
  }
  // Rows that saw no key hold whatever was in memory.
  const auto empty = [&](std::vector<float>& out, std::vector<float>& lse, int head, int token) {
    lse[head * num_tokens + token] = -INFINITY;
    std::fill_n(out.begin() + (token * num_heads + head) * head_dim, head_dim, NAN);
  };
  empty(a, lse_a, 0, 0), empty(b, lse_b, 2, 8);
  empty(a, lse_a, 1, 4), empty(b, lse_b, 1, 4);
  Buffer<float> out_a("out_a", a), out_b("out_b", b), from_a("lse_a", lse_a),
      from_b("lse_b", lse_b);
  for (const simt::Schedule& schedule : simt::kSchedules) {
    Buffer<float> out("out", a.size()), lse("lse", count);
    const int64_t token_stride = num_heads * head_dim;
    const MergeStatesParams params = {
        .out_a = out_a.data(),
        .out_b = out_b.data(),
        .lse_a = from_a.data(),
        .lse_b = from_b.data(),
        .out = out.data(),
        .lse = lse.data(),
        .num_tokens = num_tokens,
        .num_q_heads = num_heads,
        .head_dim = head_dim,
        .a_token_stride = token_stride,
        .a_head_stride = head_dim,
        .b_token_stride = token_stride,
        .b_head_stride = head_dim,
        .lse_a_head_stride = num_tokens,
        .lse_b_head_stride = num_tokens,
        .dtype = DType::kFloat32,
    };
    simt::launch({{2}, {96}, 0, schedule}, [&] { merge_states_kernel<float, kSize>(params); });
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t h = 0; h < num_heads; ++h) {
        const double wa = std::exp(double{lse_a[h * num_tokens + t]});
        const double wb = std::exp(double{lse_b[h * num_tokens + t]});
        const bool nothing = wa + wb == 0;
        const double got = lse[h * num_tokens + t];
        CHECK(nothing ? got == -INFINITY : std::abs(got - std::log(wa + wb)) < 1e-5);
        for (int64_t d = 0; d < head_dim; ++d) {
          const int64_t i = (t * num_heads + h) * head_dim + d;
          const double sum = (wa == 0 ? 0 : wa * a[i]) + (wb == 0 ? 0 : wb * b[i]);
          CHECK(std::abs(out[i] - (nothing ? 0 : sum / (wa + wb))) < 1e-5);
        }
      }
    }
  }
}

TEST(merging_weighs_by_lse_and_ignores_what_saw_no_key) {
  expect_merged<4>(16);
  expect_merged<1>(7);
}

}  // namespace
