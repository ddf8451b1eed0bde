// Vectors of four floats in the compiler's own vector extension: any machine. Products and sums are
// rounded separately.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "elements.h"

namespace diptych::cpu {
namespace {

struct Vec {
  static constexpr int W = 4;           // lanes
  static constexpr int kRows = 2;       // rows of one GEMM tile
  static constexpr int kPanels = 1;     // panels of one GEMM tile
  static constexpr int kPanelsOne = 2;  // the same for a single row
  static constexpr bool kBf16Dot = false;
  static constexpr bool kByteDot = false;
  static constexpr bool kManySums = false;
  static constexpr bool kRoundsBytes = false;
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));

  static I set1_int(int32_t x) { return I{x, x, x, x}; }
  static I load_int(const void* p) {
    I v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static I add_int(I a, I b) { return (I)((U)a + (U)b); }
  static I and_int(I a, I b) { return a & b; }
  static I shift_right4(I a) { return (I)((U)a >> 4); }
  static I shift_left8(I a) { return (I)((U)a << 8); }
  static F to_floats(I a) { return __builtin_convertvector(a, F); }
  // sum + the products of four unsigned bytes of each lane of w with the four signed bytes at x
  static I dot_bytes(I sum, I w, const int8_t* x) {
    U total = (U)sum;
    for (int byte = 0; byte < 4; ++byte) {
      const auto factor = static_cast<uint32_t>(static_cast<int32_t>(x[byte]));
      total += ((U)w >> (8 * byte) & 255u) * factor;
    }
    return (I)total;
  }

  static F set1(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, F v) { memcpy(p, &v, sizeof v); }
  static F load_n(const float* p, int n) {
    F v{};
    memcpy(&v, p, n * sizeof(float));
    return v;
  }
  static void store_n(float* p, F v, int n) { memcpy(p, &v, n * sizeof(float)); }

  template <class E>
  static F load_as(const typename E::Raw* p) {
    return F{E::to_float(p[0]), E::to_float(p[1]), E::to_float(p[2]), E::to_float(p[3])};
  }
  template <class E>
  static F load_as_n(const typename E::Raw* p, int n) {
    F v{};
    for (int i = 0; i < n; ++i) v[i] = E::to_float(p[i]);
    return v;
  }

  static F fma(F a, F b, F c) { return a * b + c; }
  static F max(F a, F b) { return a > b ? a : b; }  // b where either is NaN
  static F min(F a, F b) { return a < b ? a : b; }
  static F mul_pow2(F p, F biased) { return (F)((U)p + ((U)biased << 23)); }
  static F zero_below(F x, F limit, F r) { return x < limit ? F{} : r; }
  static unsigned mask_nan(F v) { return lanes((U)(v != v)); }
  static unsigned mask_equal(F a, F b) { return lanes((U)(a == b)); }
  static float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float largest(F v) {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  }

  // W pairs of bf16 -> the first and the second of each
  static F first_of_pairs(F pairs) { return (F)((U)pairs << 16); }
  static F second_of_pairs(F pairs) { return (F)((U)pairs & 0xffff0000u); }
  static void widen_bytes(uint16_t* out, const int8_t* in) { widen_integers(out, in); }
  static F dot_pairs(F sum, uint32_t x, const uint32_t* w);  // not on this level
  static I four_bytes(const int8_t* x);                      // likewise
  static I dot_bytes(I sum, I w, I x);
  static I larger_size(I top, F v);
  static int32_t largest_int(I v);
  static I round_bytes(int8_t* out, F x);
  static int32_t sum_int(I v);
  static void order_keys(char* out, const char* in, int n);
  static void order_values(char* out, const char* a, const char* b, int n);
  static void split_unsigned(F x, int8_t* high, int8_t* low);
  static void split_limbs(F x, int8_t* high, int8_t* low, I& high_sum, I& low_sum);
  static void store_bf16(uint16_t* p, F v);                  // likewise
  static F exp2_short(F x);                                  // likewise
  static F sums(const F (&v)[8]);
  static F tops(const F (&v)[8]);

 private:
  static unsigned lanes(U m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
};

}  // namespace
}  // namespace diptych::cpu
