// Which levels this machine can run, and which of them is best on it.
#pragma once

namespace diptych::cpu {

enum class Level : int { kPlain, kAvx2, kAvx512, kAvx512Bf16, kAmx };

bool machine_has(Level level);

// The higher, the faster on this machine.
int level_rank(Level level);

}  // namespace diptych::cpu
