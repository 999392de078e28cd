#pragma once

// Between numpy and vectors: any integers in, checked and by value; vectors out, without a copy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "redknot/segment_allocator.h"

namespace redknot::binding {

namespace py = pybind11;

inline std::string describe(const py::array& array) {
  return std::string(py::str(array.dtype())) + " " +
         std::string(py::str(py::tuple(array.attr("shape"))));
}

[[noreturn]] inline void refuse(const std::string& what,
                                const std::string& rule,
                                const std::string& got) {
  throw py::value_error(what + " must be " + rule + ", got " + got);
}

// Any integer array or sequence, by value; numpy alone would silently cut off 1.5.
template <typename T>
std::vector<T> integers(const py::object& given,
                        const std::string& what,
                        const std::string& rule,
                        const std::vector<py::ssize_t>& shape) {
  const py::array array = py::array::ensure(given);
  if (!array) {
    PyErr_Clear();
    refuse(what, rule, std::string(py::str(py::type::of(given))));
  }
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (py::ssize_t i = 0; fits && i < array.ndim(); ++i) {
    fits = shape[i] < 0 || shape[i] == array.shape(i);
  }
  const char kind = array.dtype().kind();
  // An empty list has no integers in it and arrives as float64.
  if (!fits || (array.size() > 0 && kind != 'i' && kind != 'u' && kind != 'b')) {
    refuse(what, rule, describe(array));
  }
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
  std::vector<T> values(wide.size());
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const int64_t value = wide.data()[i];
    values[i] = static_cast<T>(value);
    if (values[i] != value) refuse(what, rule, std::to_string(value));
  }
  return values;
}

inline std::vector<int64_t> integer_list(const py::object& given, const std::string& what) {
  return integers<int64_t>(given, what, "a list of integers", {-1});
}

// The vector moves into the array's base object: no copy.
template <typename Scalar, typename T>
py::array to_numpy(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  const auto* data = reinterpret_cast<const Scalar*>(owned->data());
  py::capsule base(owned.get(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  owned.release();
  return py::array_t<Scalar>(std::move(shape), data, base);
}

inline py::array copies_to_numpy(std::vector<PageCopy>&& copies) {
  static_assert(sizeof(PageCopy) == 2 * sizeof(int32_t));
  const auto count = static_cast<py::ssize_t>(copies.size());
  return to_numpy<int32_t>(std::move(copies), {count, 2});
}

}  // namespace redknot::binding
