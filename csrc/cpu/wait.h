// What waiting for another thread or process needs: a pause of the core, and the time.
#pragma once

#include <stdint.h>
#include <time.h>

namespace diptych::cpu {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000ll + t.tv_nsec;
}

}  // namespace diptych::cpu
