// The three element types of weights and KV, and their conversion from and to fp32 (nearest even),
// one at a time.
#pragma once

#include <stdint.h>
#include <string.h>

namespace diptych::cpu {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// The same address, of which a compiler knows nothing: what was loaded from there is loaded again. For
// loops whose registers are few.
template <class T>
inline __attribute__((always_inline)) const T* load_again(const T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

struct F32 {
  using Raw = float;
  static float to_float(float x) { return x; }
  static float from_float(float x) { return x; }
};

struct BF16 {
  using Raw = uint16_t;
  static float to_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }
  // Rounded in its upper half; the lower one is to be dropped.
  static uint32_t round(float x) {
    const uint32_t u = float_bits(x);
    return (u & 0x7fffffffu) > 0x7f800000u ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1);
  }
  static uint16_t from_float(float x) { return static_cast<uint16_t>(round(x) >> 16); }
};

struct F16 {
  using Raw = uint16_t;
  static float to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
    const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
    return bits_float(sign | float_bits(subnormal));
  }
  static uint16_t from_float(float x) {
    const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffffu;
    const uint32_t subnormal =
        float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;  // the FPU rounds at 2^-24
    const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;                               // rounds to infinity
    h = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x1ff) : h;  // quiet NaN
    return static_cast<uint16_t>(sign | h);
  }
};

// 32 integers -> bf16, exactly.
inline void widen_integers(uint16_t* __restrict out, const int8_t* __restrict x) {
  for (int i = 0; i < 32; ++i)
    out[i] = static_cast<uint16_t>(float_bits(static_cast<float>(x[i])) >> 16);
}

// Floats to the nearest that are bf16.
inline void round_to_bf16(float* __restrict out, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bits_float(BF16::round(x[i]) & 0xffff0000u);
}

template <class E>
void convert_row(typename E::Raw* __restrict out, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = E::from_float(x[i]);
}

}  // namespace
}  // namespace diptych::cpu
