// Vectors of eight floats: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "elements.h"

namespace diptych::cpu {
namespace {

struct Vec {
  static constexpr int W = 8;           // lanes
  static constexpr int kRows = 4;       // rows of one GEMM tile
  static constexpr int kPanels = 1;     // panels of one GEMM tile
  static constexpr int kPanelsOne = 4;  // the same for a single row
  static constexpr bool kBf16Dot = false;
  static constexpr bool kByteDot = false;
  static constexpr bool kManySums = false;
  static constexpr bool kRoundsBytes = false;
  using F = __m256;
  using I = __m256i;  // 32-bit integers

  static I set1_int(int32_t x) { return _mm256_set1_epi32(x); }
  static I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static I and_int(I a, I b) { return _mm256_and_si256(a, b); }
  static I shift_right4(I a) { return _mm256_srli_epi32(a, 4); }
  static I shift_left8(I a) { return _mm256_slli_epi32(a, 8); }
  static F to_floats(I a) { return _mm256_cvtepi32_ps(a); }
  // sum + the products of four unsigned bytes of each lane of w with the four signed bytes at x
  static I dot_bytes(I sum, I w, const int8_t* x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    const I bytes = _mm256_set1_epi32(word);
    const I even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8),
            odd = _mm256_srai_epi16(bytes, 8);
    const I low = _mm256_and_si256(w, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(w, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(high, odd));
  }

  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F load_n(const float* p, int n) { return _mm256_maskload_ps(p, lane_mask(n)); }
  static void store_n(float* p, F v, int n) { _mm256_maskstore_ps(p, lane_mask(n), v); }

  template <class E>
  static F load_as(const typename E::Raw* p);
  template <class E>
  static F load_as_n(const typename E::Raw* p, int n) {
    typename E::Raw lanes[W] = {};
    memcpy(lanes, p, n * sizeof lanes[0]);
    return load_as<E>(lanes);
  }

  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F mul_pow2(F p, F biased) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  }
  static F zero_below(F x, F limit, F r) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), r);
  }
  static unsigned mask_nan(F v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)); }
  static unsigned mask_equal(F a, F b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  }
  static float sum(F v) {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }
  static float largest(F v) {
    const __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
  }

  // W pairs of bf16 -> the first and the second of each
  static void split_pairs(F pairs, F& first, F& second) {
    const __m256i v = _mm256_castps_si256(pairs);
    first = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    second =
        _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
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
  static __m256i lane_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

template <>
inline __m256 Vec::load_as<F32>(const float* p) {
  return _mm256_loadu_ps(p);
}
template <>
inline __m256 Vec::load_as<BF16>(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
template <>
inline __m256 Vec::load_as<F16>(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

}  // namespace
}  // namespace diptych::cpu
