#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace redknot::cpu::REDKNOT_ISA {

#if defined(REDKNOT_ISA_AMX)
// Packing is twice the share of the work: 512 rows would take 1.07 times as long.
inline constexpr int64_t kAttentionTileRows = kMaxTileRows;
#else
inline constexpr int64_t kAttentionTileRows = kTileRows;
#endif
int64_t attention_scratch_bytes(const SegPagedAttentionParams& params);
void attention_item(const SegPagedAttentionParams& params,
                    const RotationTable& rotations,
                    const WorkItem& item,
                    const WorkItem* maybe_next,
                    void* scratch);
void attention_merge(const SegPagedAttentionParams& params, const WorkItem& item);

}  // namespace redknot::cpu::REDKNOT_ISA
