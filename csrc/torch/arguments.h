#pragma once

// Checks at the wall. A message names the op, the argument, the rule and what arrived:
//   seg_paged_attention: page_refs must be int32 [num_refs, 4], got int64 [17, 4]
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>

#include "redknot/check.h"
#include "redknot/paged_kv.h"
#include "redknot/pages.h"
#include "redknot/types.h"

namespace redknot::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A dimension of a rule: its name, and its size where another argument fixes it.
struct Dim {
  static constexpr int64_t kAny = -1;

  Dim(const char* dim_name) : name(dim_name), size(kAny) {}  // NOLINT: implicit reads well in rules
  Dim(int64_t dim_size) : name(nullptr), size(dim_size) {}   // NOLINT
  Dim(const char* dim_name, int64_t dim_size) : name(dim_name), size(dim_size) {}

  const char* name;
  int64_t size;
};

using Dims = std::initializer_list<Dim>;

// Whether two tensors share memory. Of equal shape and strides: whether they have an element in
// common; of others, whether one begins before the other ends.
bool overlap(const Tensor& a, const Tensor& b);

// The arguments of one call of one op, all on one device.
class Arguments {
 public:
  // On the CPU.
  explicit Arguments(const char* op) : op_(op), cuda_device_(kNoCudaDevice) {}
  // On the CPU or CUDA device of `first`; on the CPU where there is no other implementation.
  Arguments(const char* op, const Tensor& first)
      : op_(op), cuda_device_(kHasCuda ? first.get_device() : kNoCudaDevice) {}

  // Tensor of that dtype and shape whose last dimension is contiguous.
  void tensor(const char* name, const Tensor& tensor, ScalarType dtype, Dims dims) const;
  // The same with one of the dtypes that kernels compute with, or with that of `like`.
  DType floating(const char* name, const Tensor& tensor, Dims dims) const;
  void floating(
      const char* name, const Tensor& tensor, Dims dims, const char* like_name, DType like) const;
  // A dense tensor: index lists are read as arrays.
  void contiguous(const char* name, const Tensor& tensor) const;
  // Written to: no two elements may share memory (a broadcast view does).
  void writable(const char* name, const Tensor& tensor) const;
  // Written to beside one that is read: they may not overlap.
  void apart(const char* name,
             const Tensor& tensor,
             const char* other_name,
             const Tensor& other) const;
  // Of a norm.
  void eps(double eps) const;

  // A page pool: [num_pages, page_size, head_dim] twice, same dtype and shape.
  PagePool pool(const Tensor& k_cache, const Tensor& v_cache) const;
  // fp32 [rotary_dim / 2] with rotary_dim <= head_dim; returns rotary_dim.
  int64_t inv_freq(const Tensor& inv_freq, int64_t head_dim) const;
  // Values of a page reference, the one at `index`.
  void page_ref(int64_t index, const PageRef& ref, int64_t num_pages, int64_t page_size) const;
  // int32 [n + 1]: starts at 0, never falls, ends at `end`.
  void offsets(const char* name, const Tensor& tensor, const char* end_name, int64_t end) const;

  template <typename... Parts>
  void check(bool condition, const Parts&... parts) const {
    RK_CHECK(condition, op_, ": ", parts...);
  }

 private:
  template <typename DTypeRule>
  void matches(const char* name,
               const Tensor& tensor,
               bool dtype_fits,
               const DTypeRule& dtype_rule,
               Dims dims) const;

#if defined(REDKNOT_WITH_CUDA)
  static constexpr bool kHasCuda = true;
#else
  static constexpr bool kHasCuda = false;
#endif
  static constexpr int32_t kNoCudaDevice = -1;  // what get_device() says of a CPU tensor

  const char* op_;
  int32_t cuda_device_;
};

// "int64 [17, 4]", once a message is written: every call of an op passes many checks.
struct Description {
  const Tensor& tensor;
};
inline Description describe(const Tensor& tensor) { return {tensor}; }
std::ostream& operator<<(std::ostream& text, const Description& description);

const char* name_of(ScalarType dtype);

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}
template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

}  // namespace redknot::binding
