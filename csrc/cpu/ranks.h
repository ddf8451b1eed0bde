// What the ranks of one worker need beside their kernels: adding up the parts of a sum, and waiting
// for each other in memory that several processes map.
//
// Nothing here depends on the instruction set: a part's element is added to the same element of the
// next part, in the order of the parts, whatever the width of a register.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace diptych::cpu {

// out[i] = parts[i] + parts[size + i] + parts[2 * size + i] ..., added in this order.
void sum_parts(float* out, const float* parts, int64_t num_parts, int64_t size);

// Words of shared memory that one meeting needs, zero at first, 64-byte aligned.
constexpr int64_t kMeetingWords = 48;

// Returns when all `num_ranks` processes have called it as often as this one; what each wrote
// before is then visible to all. Spins for a moment, then sleeps in the kernel.
void meet(int32_t* meeting, int64_t num_ranks);

}  // namespace diptych::cpu
