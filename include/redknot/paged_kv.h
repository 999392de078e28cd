#pragma once

#include <cstdint>

#include "redknot/types.h"

namespace redknot {

// Where a head's tokens are: `num_valid` slots of `page`, the first of them at true position
// `first_position`, the keys in it rotated at (true position - rotation_offset).
// The layout is that of one line of the op argument `page_refs` [num_refs, 4] int32.
struct PageRef {
  int32_t page;
  int32_t first_position;
  int32_t num_valid;
  int32_t rotation_offset;
};
static_assert(sizeof(PageRef) == 4 * sizeof(int32_t));

// What a head may see; the only meaning of "local" there is. `window` counts the token itself;
// kGlobalWindow means no limit. `sink` first tokens of the sequence stay visible.
constexpr int32_t kGlobalWindow = -1;

constexpr bool is_visible(int64_t key_position,
                          int64_t query_position,
                          int64_t window,
                          int64_t sink) {
  return key_position <= query_position &&
         (window < 0 || key_position < sink || key_position > query_position - window);
}

}  // namespace redknot
