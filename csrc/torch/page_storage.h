#pragma once

// Where pages lie in host memory, as Python says it, and the hook that poisons them there.
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "numpy_arrays.h"

namespace redknot::binding {

// Page p occupies [base + p * stride_bytes, + page_bytes).
struct StorageRegion {
  unsigned char* base;
  int64_t stride_bytes;
  int64_t page_bytes;
};
using RegionTuple = std::tuple<uintptr_t, int64_t, int64_t>;

inline std::vector<StorageRegion> checked_regions(const std::vector<RegionTuple>& given,
                                                  const std::string& caller) {
  std::vector<StorageRegion> regions;
  for (const auto& [base, stride_bytes, page_bytes] : given) {
    if (base == 0 || page_bytes < 1 || stride_bytes < page_bytes) {
      refuse(caller + ": storage",
             "(pointer, page_stride_bytes, page_bytes) with 1 <= page_bytes <= page_stride_bytes",
             "(" + std::to_string(base) + ", " + std::to_string(stride_bytes) + ", " +
                 std::to_string(page_bytes) + ")");
    }
    regions.push_back({reinterpret_cast<unsigned char*>(base), stride_bytes, page_bytes});
  }
  return regions;
}

// All bits set is NaN in fp32, bf16 and fp16: a page read after it was freed cannot go unnoticed.
inline std::function<void(int32_t)> poison_hook(std::vector<StorageRegion> regions,
                                                bool poison,
                                                const std::string& caller) {
  if (!poison) return nullptr;
  if (regions.empty()) {
    throw py::value_error(caller + ": poison=True needs host storage to fill, got none");
  }
  return [regions = std::move(regions)](int32_t page) {
    for (const StorageRegion& region : regions) {
      std::memset(region.base + page * region.stride_bytes, 0xFF, region.page_bytes);
    }
  };
}

}  // namespace redknot::binding
