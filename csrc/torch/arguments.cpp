#include "arguments.h"

#include <cmath>
#include <ostream>

namespace redknot::binding {
namespace {

// The one list of element types at the wall.
struct FloatingType {
  ScalarType scalar;
  DType dtype;
};
constexpr FloatingType kFloatingTypes[] = {
    {ScalarType::Float, DType::kFloat32},
    {ScalarType::BFloat16, DType::kBFloat16},
    {ScalarType::Half, DType::kFloat16},
};

bool floating_type(ScalarType scalar, DType* dtype) {
  for (const FloatingType& type : kFloatingTypes) {
    if (type.scalar == scalar) {
      *dtype = type.dtype;
      return true;
    }
  }
  return false;
}

ScalarType scalar_type(DType dtype) {
  for (const FloatingType& type : kFloatingTypes) {
    if (type.dtype == dtype) return type.scalar;
  }
  fail("no torch dtype for DType ", static_cast<int>(dtype));
}

// Rules of messages, put into words only once a message is written.
struct FloatingRule {};
std::ostream& operator<<(std::ostream& text, FloatingRule) {
  constexpr size_t kCount = std::size(kFloatingTypes);
  for (size_t i = 0; i < kCount; ++i) {
    text << (i == 0 ? "" : i + 1 < kCount ? ", " : " or ") << name_of(kFloatingTypes[i].scalar);
  }
  return text;
}

struct LikeRule {
  ScalarType dtype;
  const char* like_name;
};
std::ostream& operator<<(std::ostream& text, const LikeRule& rule) {
  return text << name_of(rule.dtype) << " (like " << rule.like_name << ")";
}

struct ShapeRule {
  Dims dims;
};
std::ostream& operator<<(std::ostream& text, const ShapeRule& rule) {
  text << "[";
  const char* separator = "";
  for (const Dim& dim : rule.dims) {
    text << separator;
    if (dim.name != nullptr) text << dim.name;
    if (dim.name != nullptr && dim.size != Dim::kAny) text << " = ";
    if (dim.size != Dim::kAny) text << dim.size;
    separator = ", ";
  }
  return text << "]";
}

bool shape_fits(const Tensor& tensor, Dims dims) {
  if (tensor.dim() != static_cast<int64_t>(dims.size())) return false;
  int64_t i = 0;
  for (const Dim& dim : dims) {
    if (dim.size != Dim::kAny && tensor.size(i) != dim.size) return false;
    ++i;
  }
  return true;
}

// The bytes from a tensor's first element to behind its last.
struct Extent {
  explicit Extent(const Tensor& tensor) : begin(static_cast<const char*>(tensor.data_ptr())) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    end = begin + (last + 1) * static_cast<int64_t>(tensor.element_size());
  }
  const char* begin;
  const char* end;
};

bool are_alike(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim() || a.element_size() != b.element_size()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i) || (a.size(i) > 1 && a.stride(i) != b.stride(i))) return false;
  }
  return true;
}

// Whether steps along the dimensions from `dim` on, each shorter than the dimension is long, lead
// to an element `distance` away. All of an inner dimension is shorter than a step of an outer one,
// so only the two multiples beside the distance come into question.
bool is_in_reach(const Tensor& tensor, int64_t dim, int64_t distance) {
  while (dim < tensor.dim() && tensor.size(dim) <= 1) ++dim;
  if (dim == tensor.dim()) return distance == 0;
  const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
  const int64_t below = distance / stride - (distance % stride < 0 ? 1 : 0);
  for (const int64_t steps : {below, below + 1}) {
    const bool is_inside = -size < steps && steps < size;
    if (is_inside && is_in_reach(tensor, dim + 1, distance - steps * stride)) return true;
  }
  return false;
}

}  // namespace

bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const Extent here(a), there(b);
  if (here.end <= there.begin || there.end <= here.begin) return false;
  const int64_t distance = there.begin - here.begin;
  const auto element = static_cast<int64_t>(a.element_size());
  return !are_alike(a, b) || distance % element != 0 || is_in_reach(a, 0, distance / element);
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

std::ostream& operator<<(std::ostream& text, const Description& description) {
  const Tensor& tensor = description.tensor;
  text << name_of(tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  return text << "]";
}

template <typename DTypeRule>
void Arguments::matches(const char* name,
                        const Tensor& tensor,
                        bool dtype_fits,
                        const DTypeRule& dtype_rule,
                        Dims dims) const {
  check(dtype_fits && shape_fits(tensor, dims),
        name,
        " must be ",
        dtype_rule,
        " ",
        ShapeRule{dims},
        ", got ",
        describe(tensor));
  if (cuda_device_ == kNoCudaDevice) {
    check(tensor.is_cpu(),
          name,
          " must be on the CPU",
          kHasCuda ? " like the other arguments" : ": redknot was built without CUDA");
  } else {
    check(tensor.is_cuda() && tensor.get_device() == cuda_device_,
          name,
          " must be on cuda:",
          cuda_device_,
          " like the other arguments");
  }
  const int64_t last = tensor.dim() - 1;
  check(last < 0 || tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1,
        name,
        " must have a contiguous last dimension, got stride ",
        last < 0 ? 0 : tensor.stride(last));
}

void Arguments::tensor(const char* name, const Tensor& tensor, ScalarType dtype, Dims dims) const {
  matches(name, tensor, tensor.scalar_type() == dtype, name_of(dtype), dims);
}

DType Arguments::floating(const char* name, const Tensor& tensor, Dims dims) const {
  DType dtype = DType::kFloat32;
  const bool fits = floating_type(tensor.scalar_type(), &dtype);
  matches(name, tensor, fits, FloatingRule{}, dims);
  return dtype;
}

void Arguments::floating(
    const char* name, const Tensor& tensor, Dims dims, const char* like_name, DType like) const {
  const ScalarType dtype = scalar_type(like);
  matches(name, tensor, tensor.scalar_type() == dtype, LikeRule{dtype, like_name}, dims);
}

void Arguments::contiguous(const char* name, const Tensor& tensor) const {
  check(tensor.is_contiguous(), name, " must be contiguous");
}

void Arguments::writable(const char* name, const Tensor& tensor) const {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    check(tensor.size(i) <= 1 || tensor.stride(i) > 0 || tensor.numel() == 0,
          name,
          " is written to, so it must not be an expanded view: stride ",
          i,
          " is 0");
  }
}

void Arguments::apart(const char* name,
                      const Tensor& tensor,
                      const char* other_name,
                      const Tensor& other) const {
  check(!overlap(tensor, other), name, " must not overlap ", other_name);
}

void Arguments::eps(double eps) const {
  check(std::isfinite(eps) && eps >= 0.0, "eps must be a finite number >= 0, got ", eps);
}

PagePool Arguments::pool(const Tensor& k_cache, const Tensor& v_cache) const {
  const DType dtype = floating("k_cache", k_cache, {"num_pages", "page_size", "head_dim"});
  const int64_t num_pages = k_cache.size(0);
  const int64_t page_size = k_cache.size(1);
  const int64_t head_dim = k_cache.size(2);
  floating("v_cache",
           v_cache,
           {{"num_pages", num_pages}, {"page_size", page_size}, {"head_dim", head_dim}},
           "k_cache",
           dtype);
  check(page_size > 0, "page_size must be positive, got k_cache ", describe(k_cache));
  check(head_dim > 0 && head_dim % 8 == 0,
        "head_dim must be a positive multiple of 8, got k_cache ",
        describe(k_cache));
  return {
      .k = k_cache.data_ptr(),
      .v = v_cache.data_ptr(),
      .num_pages = num_pages,
      .page_size = page_size,
      .head_dim = head_dim,
      .k_page_stride = k_cache.stride(0),
      .k_slot_stride = k_cache.stride(1),
      .v_page_stride = v_cache.stride(0),
      .v_slot_stride = v_cache.stride(1),
      .dtype = dtype,
  };
}

int64_t Arguments::inv_freq(const Tensor& inv_freq, int64_t head_dim) const {
  tensor("inv_freq", inv_freq, ScalarType::Float, {"rotary_dim / 2"});
  const int64_t rotary_dim = 2 * inv_freq.size(0);
  check(rotary_dim <= head_dim,
        "inv_freq must have at most head_dim / 2 = ",
        head_dim / 2,
        " elements, got ",
        describe(inv_freq));
  return rotary_dim;
}

void Arguments::page_ref(int64_t index,
                         const PageRef& ref,
                         int64_t num_pages,
                         int64_t page_size) const {
  check(ref.page >= 0 && ref.page < num_pages,
        "page_refs[",
        index,
        "] must name a page below num_pages = ",
        num_pages,
        ", got ",
        ref.page);
  check(ref.num_valid >= 0 && ref.num_valid <= page_size,
        "page_refs[",
        index,
        "] must have 0 to page_size = ",
        page_size,
        " valid slots, got ",
        ref.num_valid);
}

void Arguments::offsets(const char* name,
                        const Tensor& tensor,
                        const char* end_name,
                        int64_t end) const {
  contiguous(name, tensor);
  const int64_t size = tensor.size(0);
  const auto* values = data<int32_t>(tensor);
  check(size > 0 && values[0] == 0, name, " must start with 0");
  for (int64_t i = 1; i < size; ++i) {
    check(values[i - 1] <= values[i],
          name,
          " must not decrease, got ",
          values[i - 1],
          " before ",
          values[i],
          " at ",
          i);
  }
  check(values[size - 1] == end,
        name,
        " must end with ",
        end_name,
        " = ",
        end,
        ", got ",
        values[size - 1]);
}

}  // namespace redknot::binding
