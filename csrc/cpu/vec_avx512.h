// Vectors of sixteen floats: AVX-512 F, BW, VL, DQ; with BF16 dot products where the compiler is
// told so.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "elements.h"

namespace diptych::cpu {
namespace {

struct Vec {
  static constexpr int W = 16;          // lanes
  static constexpr int kRows = 6;       // rows of one GEMM tile
  static constexpr int kPanels = 4;     // panels of one GEMM tile
  static constexpr int kPanelsOne = 4;  // the same for a single row
#ifdef __AVX512BF16__
  static constexpr bool kBf16Dot = true;
#else
  static constexpr bool kBf16Dot = false;
#endif
#ifdef __AVX512VNNI__
  static constexpr bool kByteDot = true;  // worth more than widening
#else
  static constexpr bool kByteDot = false;
#endif
  static constexpr bool kManySums = true;  // sums() and tops() are there
  static constexpr bool kRoundsBytes = true;  // larger_size(), largest_int() and round_bytes() are there
  using F = __m512;
  using I = __m512i;  // 32-bit integers

  static I set1_int(int32_t x) { return _mm512_set1_epi32(x); }
  static I load_int(const void* p) { return _mm512_loadu_si512(p); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static I and_int(I a, I b) { return _mm512_and_si512(a, b); }
  static I shift_right4(I a) { return _mm512_srli_epi32(a, 4); }
  static I shift_left8(I a) { return _mm512_slli_epi32(a, 8); }
  static F to_floats(I a) { return _mm512_cvtepi32_ps(a); }
  // sum + the products of four unsigned bytes of each lane of w with the four signed bytes at x
#ifdef __AVX512VNNI__
  // Said in assembly: of 24 sums in registers the compiler makes twice as many copies.
  static I dot_bytes(I sum, I w, const int8_t* x) {
    struct Four {
      int8_t bytes[4];
    };
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(w), "m"(*reinterpret_cast<const Four*>(x)));
    return sum;
  }
#else
  static I dot_bytes(I sum, I w, const int8_t* x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    const I bytes = _mm512_set1_epi32(word);
    const I even = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8),
            odd = _mm512_srai_epi16(bytes, 8);
    const I low = _mm512_and_si512(w, _mm512_set1_epi16(255)), high = _mm512_srli_epi16(w, 8);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(high, odd));
  }
#endif

  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(lane_mask(n), p); }
  static void store_n(float* p, F v, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), v); }

  template <class E>
  static F load_as(const typename E::Raw* p);
  template <class E>
  static F load_as_n(const typename E::Raw* p, int n);

  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F mul_pow2(F p, F biased) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(biased), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
  }
  static F zero_below(F x, F limit, F r) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), r);
  }
  static unsigned mask_nan(F v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
  static unsigned mask_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static float sum(F v) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static float largest(F v) {
    const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }

  // sum() and largest() of up to eight vectors at once, in the same order of operations: lane r is
  // that of v[r].
  template <class Op>
  static inline __attribute__((always_inline)) F reduce8(const F (&v)[8], Op op) {
    F by4[2];
    for (int i = 0; i < 2; ++i) {
      F by8[2];
      for (int j = 0; j < 2; ++j) {
        const F a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
        by8[j] = op(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
      }
      by4[i] = op(_mm512_shuffle_f32x4(by8[0], by8[1], 0x88),
                  _mm512_shuffle_f32x4(by8[0], by8[1], 0xdd));
    }
    const F by2 = op(_mm512_shuffle_ps(by4[0], by4[1], 0x44), _mm512_shuffle_ps(by4[0], by4[1], 0xee));
    const F one = op(by2, _mm512_movehdup_ps(by2));
    const I turn = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 10, 6, 2, 12, 8, 4, 0);
    return _mm512_permutexvar_ps(turn, one);
  }
  static F sums(const F (&v)[8]) {
    return reduce8(v, [](F a, F b) { return _mm512_add_ps(a, b); });
  }
  static F tops(const F (&v)[8]) {
    return reduce8(v, [](F a, F b) { return _mm512_max_ps(a, b); });
  }

  // W pairs of bf16 -> the first and the second of each
  static F first_of_pairs(F pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
  }
  static F second_of_pairs(F pairs) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), mask));
  }
  static I four_bytes(const int8_t* x) {  // to all lanes
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
  }
#ifdef __AVX512VNNI__
  static I dot_bytes(I sum, I w, I x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
#else
  static I dot_bytes(I sum, I w, I x);  // not on this level
#endif
  // The bits of the largest |v| so far; those of a NaN are larger than all others
  static I larger_size(I top, F v) {
    const I size = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_max_epi32(top, size);
  }
  static int32_t largest_int(I v) { return _mm512_reduce_max_epi32(v); }
  // To the nearest integers, ties to even, which fit into bytes
  static I round_bytes(int8_t* out, F x) {
    const I whole = _mm512_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(whole));
    return whole;
  }
  static int32_t sum_int(I v) { return _mm512_reduce_add_epi32(v); }
  // Words 0..15 and 16..31 of `n` bytes at `in` in turn, as unsigned bytes with 128 for 0
  static void order_keys(char* out, const char* in, int n) {
    const __m512i turn = _mm512_set_epi32(
        0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a, 0x00190009,
        0x00180008, 0x00170007, 0x00160006, 0x00150005, 0x00140004, 0x00130003, 0x00120002,
        0x00110001, 0x00100000);
    const __m512i both = n == 64 ? _mm512_loadu_si512(in)
                                 : _mm512_castsi256_si512(_mm256_loadu_si256(
                                       reinterpret_cast<const __m256i*>(in)));
    _mm512_storeu_si512(out, _mm512_xor_si512(_mm512_permutexvar_epi16(turn, both),
                                              _mm512_set1_epi8(-128)));
  }
  // n words at `a` and n at `b` in turn; whole vectors are written
  static void order_values(char* out, const char* a, const char* b, int n) {
    const __mmask32 mask = n == 32 ? ~0u : (1u << n) - 1;
    const __m512i first = _mm512_maskz_loadu_epi16(mask, a), second = _mm512_maskz_loadu_epi16(mask, b);
    const __m512i low = _mm512_set_epi32(
        0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a, 0x00290009,
        0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004, 0x00230003, 0x00220002,
        0x00210001, 0x00200000);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, low, second));
    if (n > 16) _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi16(first, high, second));
  }
  // Integers of 16 bits without sign, ties to even, as 256 * high + low
  static void split_unsigned(F x, int8_t* high, int8_t* low) {
    const I whole = _mm512_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high),
                     _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
  }
  // The same with a sign; the sums take them along
  static void split_limbs(F x, int8_t* high, int8_t* low, I& high_sum, I& low_sum) {
    const I whole = _mm512_cvtps_epi32(x);
    const I top = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    high_sum = _mm512_add_epi32(high_sum, top);
    low_sum = _mm512_add_epi32(low_sum, _mm512_sub_epi32(whole, _mm512_slli_epi32(top, 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(top));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
  }
  // 32 integers -> bf16, exactly
  static void widen_bytes(uint16_t* out, const int8_t* in) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    const F low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const F high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
#ifdef __AVX512BF16__
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    const auto store = [](uint16_t* to, F v) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)));
    };
    store(out, low);
    store(out + 16, high);
#endif
  }
#ifndef __AVX512BF16__
  static F dot_pairs(F sum, uint32_t x, const uint32_t* w);  // not on this level
  static void store_bf16(uint16_t* p, F v);                  // likewise
  static F exp2_short(F x);                                  // likewise
#else
  static F dot_pairs(F sum, uint32_t x, const uint32_t* w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)),
                            (__m512bh)_mm512_loadu_si512(w));
  }
  // 2^x for x <= 0 to 16 bits, which is more than bf16 keeps; 1 for 0, 0 below -150
  static F exp2_short(F x) {
    const F above = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);  // NaN stays
    const F whole = _mm512_roundscale_ps(above, 0), r = _mm512_sub_ps(above, whole);
    F p = _mm512_fmadd_ps(_mm512_set1_ps(9.6181291e-3f), r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), whole);
  }
  static void store_bf16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
  static F dot_pairs(F sum, uint32_t x, F pairs) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)),
                            (__m512bh)_mm512_castps_si512(pairs));
  }
  // 2^x for x below 100 to 13 bits, and exactly 1 for 0; -inf is not a number
  static F exp2_pair(F x) {
    const F whole = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, whole);
    F p = _mm512_fmadd_ps(_mm512_set1_ps(5.50088465e-2f), r, _mm512_set1_ps(2.42211174e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93282960e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), whole);
  }
  // 32 floats -> bf16, 16 pairs in the floats' order
  static F round_pairs(F first, F second) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
  static void store_bf16(uint32_t* p, F first, F second) {
    store(reinterpret_cast<float*>(p), round_pairs(first, second));
  }
  static unsigned mask_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static F select(unsigned mask, F a, F b) {  // a where the lane's bit is set
    return _mm512_mask_mov_ps(b, static_cast<__mmask16>(mask), a);
  }
  static F and_bits(F a, uint32_t bits) {
    return _mm512_and_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits))));
  }
#endif

 private:
  static __mmask16 lane_mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F widen_bf16(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
};

template <>
inline __m512 Vec::load_as<F32>(const float* p) {
  return _mm512_loadu_ps(p);
}
template <>
inline __m512 Vec::load_as<BF16>(const uint16_t* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <>
inline __m512 Vec::load_as<F16>(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <>
inline __m512 Vec::load_as_n<F32>(const float* p, int n) {
  return _mm512_maskz_loadu_ps(lane_mask(n), p);
}
template <>
inline __m512 Vec::load_as_n<BF16>(const uint16_t* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(lane_mask(n), p));
}
template <>
inline __m512 Vec::load_as_n<F16>(const uint16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(n), p));
}

}  // namespace
}  // namespace diptych::cpu
