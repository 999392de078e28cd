#include "result.h"

#include <functional>
#include <numeric>
#include <vector>

#include "redknot/kept_memory.h"

namespace redknot::binding {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t kLargeBytes = int64_t{4} << 20;
// What one chunk of a prefill needs besides its hidden states, in a model of 8B parameters.
constexpr int64_t kKeptBytes = int64_t{256} << 20;

// Never destroyed: tensors may live until the process ends.
KeptMemory& kept_memory() {
  static KeptMemory& memory = *new KeptMemory(kKeptBytes);
  return memory;
}

Tensor new_tensor(const Tensor& like, Sizes sizes, ScalarType dtype, int64_t element_bytes) {
  const int64_t num_bytes =
      std::accumulate(sizes.begin(), sizes.end(), element_bytes, std::multiplies<>());
  if (!like.is_cpu() || num_bytes < kLargeBytes) {
    return torch::stable::new_empty(like, sizes, dtype);
  }
  std::vector<int64_t> strides(sizes.size());
  std::exclusive_scan(
      sizes.rbegin(), sizes.rend(), strides.rbegin(), int64_t{1}, std::multiplies<>());
  return torch::stable::from_blob(
      kept_memory().take(num_bytes), sizes, strides, like.device(), dtype, [](void* data) {
        kept_memory().give_back(data);
      });
}

}  // namespace

Tensor new_result(const Tensor& like, Sizes sizes) {
  return new_tensor(like, sizes, like.scalar_type(), static_cast<int64_t>(like.element_size()));
}

Tensor new_floats(const Tensor& like, Sizes sizes) {
  return new_tensor(like, sizes, ScalarType::Float, sizeof(float));
}

}  // namespace redknot::binding
