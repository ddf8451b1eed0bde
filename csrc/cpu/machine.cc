// Which levels this machine can run, and which of them is best on it.
#include "machine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace diptych::cpu {
namespace {

#if defined(__x86_64__)
// The tiles' state is big, so the kernel hands it out on request: once per process, for all its
// threads and its forked children. A kernel too old, or one told not to, refuses.
bool tiles_allowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  return (d & kBf16) != 0 && (d & kTile) != 0 && (d & kInt8) != 0 && tiles_allowed();
}

bool is_intel() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  char name[12];
  if (!__get_cpuid(0, &a, &b, &c, &d)) return false;
  memcpy(name, &b, 4);
  memcpy(name + 4, &d, 4);
  memcpy(name + 8, &c, 4);
  return memcmp(name, "GenuineIntel", sizeof name) == 0;
}
#endif

}  // namespace

bool machine_has(Level level) {
  if (level == Level::kPlain) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (level == Level::kAvx2) return avx2;
  if (level == Level::kAvx512) return avx512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool pairs =
      vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (level == Level::kAvx512Bf16) return pairs;
  return pairs && has_tiles();
#else
  return false;
#endif
}

int level_rank(Level level) {
  const int place = static_cast<int>(level);
#if defined(__x86_64__)
  // Intel's cores multiply bf16 pairs at half the rate of floats or less, and take one port for it;
  // AMD's at the full rate. A fixed rule, not a race at start: equal machines must choose alike.
  if (is_intel() && level == Level::kAvx512) return static_cast<int>(Level::kAvx512Bf16);
  if (is_intel() && level == Level::kAvx512Bf16) return static_cast<int>(Level::kAvx512);
#endif
  return place;
}

}  // namespace diptych::cpu
