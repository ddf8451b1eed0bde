// Floats to small integers of one scale: what activations, queries and KV have in common.
#pragma once

#include <math.h>

#include "gemm.h"

namespace diptych::cpu {
namespace {

using I = Vec::I;

constexpr int kZero8 = 128, kZero4 = 8;
constexpr float kLimit8 = 127.0f, kLimit16 = 127.0f * 256.0f;
constexpr float kNothing = 1e-30f;  // a row without a larger value is taken for zeros
constexpr int64_t kChunk = 64;      // inputs that are rounded at once

// The largest |x| of n values; NaN where one of them is.
inline float largest_of(const float* x, int64_t n) {
  if constexpr (Vec::kRoundsBytes) {  // as integers: floats without a sign are in the same order
    I top = Vec::set1_int(0);
    int64_t i = 0;
    for (; i + Vec::W <= n; i += Vec::W) top = Vec::larger_size(top, Vec::load(x + i));
    if (i < n) top = Vec::larger_size(top, Vec::load_n(x + i, static_cast<int>(n - i)));
    return bits_float(static_cast<uint32_t>(Vec::largest_int(top)));
  }
  F top = Vec::set1(0.0f);
  unsigned nan = 0;
  const F zero = Vec::set1(0.0f);
  int64_t i = 0;
  auto take = [&](F v) {
    nan |= Vec::mask_nan(v);
    top = Vec::max(Vec::max(v, zero - v), top);
  };
  for (; i + Vec::W <= n; i += Vec::W) take(Vec::load(x + i));
  if (i < n) take(Vec::load_n(x + i, static_cast<int>(n - i)));
  return nan != 0 ? NAN : Vec::largest(top);
}

// To the nearest integer, ties to even, for |x| < 2^22.
inline int32_t nearest(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  return static_cast<int32_t>(float_bits(x + magic) - float_bits(magic));
}

}  // namespace
}  // namespace diptych::cpu
