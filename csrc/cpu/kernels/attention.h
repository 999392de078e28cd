#pragma once

#include <cstdint>

#include "../dispatch.h"

namespace redknot::cpu::REDKNOT_ISA {

int64_t attention_scratch_bytes(const SegPagedAttentionParams& params);
void attention_item(const SegPagedAttentionParams& params,
                    const RotationTable& rotations,
                    const WorkItem& item,
                    const WorkItem* maybe_next,
                    void* scratch);
void attention_merge(const SegPagedAttentionParams& params, const WorkItem& item);

}  // namespace redknot::cpu::REDKNOT_ISA
