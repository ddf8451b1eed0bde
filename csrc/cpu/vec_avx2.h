// Vectors of eight floats: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "elements.h"

namespace diptych::cpu {
namespace {

struct Vec {
  static constexpr int W = 8;           // lanes
  static constexpr int kRows = 6;       // rows of one GEMM tile
  static constexpr int kPanels = 1;     // panels of one GEMM tile
  static constexpr int kPanelsOne = 4;  // the same for a single row
  static constexpr bool kBf16Dot = false;
  static constexpr bool kByteDot = false;
  static constexpr bool kManySums = false;
  static constexpr bool kRoundsBytes = true;
  using F = __m256;
  using I = __m256i;  // 32-bit integers

  static I set1_int(int32_t x) { return _mm256_set1_epi32(x); }
  static I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static void store_int(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static I shift_right4(I a) { return _mm256_srli_epi32(a, 4); }
  static I shift_right16(I a) { return _mm256_srai_epi32(a, 16); }
  static I low_word(I a) { return _mm256_and_si256(a, _mm256_set1_epi32(65535)); }
  static F to_floats(I a) { return _mm256_cvtepi32_ps(a); }
  // Each lane's 16-bit parts, as their lower or upper bytes without sign
  static I low_bytes(I a) { return and_mask<0x00ff00ffu>(a); }
  static I low_nibbles(I a) { return and_mask<0x0f0f0f0fu>(a); }
  static I low_nibble_of_words(I a) { return and_mask<0x000f000fu>(a); }
  static I top_nibble_of_words(I a) { return _mm256_srli_epi16(a, 12); }
  static I high_bytes(I a) { return _mm256_srli_epi16(a, 8); }
  static I four_bytes(const void* x) {  // to all lanes
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
  }
  // sum + per lane the products of two words. Compilers would add products to each other first, for
  // which registers do not suffice.
  static I dot_words(I sum, I a, I b) {
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
    return sum;
  }
  // sum + per word the products of two bytes, those of w without sign; it has to fit
  static I dot_byte_pairs(I sum, I w, I x) {
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(w, x)));
    return sum;
  }
  static I sum_words(I a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }  // per lane
  // The bits of the largest |v| so far; those of a NaN are larger than all others
  static I larger_size(I top, F v) {
    const I size = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(top, size);
  }
  static int32_t largest_int(I v) {
    return reduce(v, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
  }
  static int32_t sum_int(I v) {
    return reduce(v, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
  }
  // To the nearest integers, ties to even, which fit into bytes
  static I round_bytes(int8_t* out, F x) {
    const I whole = _mm256_cvtps_epi32(x);
    store_bytes(out, whole);
    return whole;
  }
  // The same of words; of every four the two in the middle change places
  static I round_words(int16_t* out, F x) {
    const I whole = _mm256_cvtps_epi32(x);
    const I pick = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    const I words = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(whole, pick), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(words));
    return whole;
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
  static F first_of_pairs(F pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
  }
  static F second_of_pairs(F pairs) {
    return _mm256_castsi256_ps(and_mask<0xffff0000u>(_mm256_castps_si256(pairs)));
  }
  static void widen_bytes(uint16_t* out, const int8_t* in) { widen_integers(out, in); }
  static F dot_pairs(F sum, uint32_t x, const uint32_t* w);  // not on this level
  static I dot_bytes(I sum, I w, I x);                       // likewise
  static void order_keys(char* out, const char* in, int n);
  static void order_values(char* out, const char* a, const char* b, int n);
  static void split_unsigned(F x, int8_t* high, int8_t* low);
  static void split_limbs(F x, int8_t* high, int8_t* low, I& high_sum, I& low_sum);
  static void store_bf16(uint16_t* p, F v);                  // likewise
  static F exp2_short(F x);                                  // likewise
  static F sums(const F (&v)[8]);
  static F tops(const F (&v)[8]);

 private:
  // With a mask from memory: registers are for sums, and a compiler would keep it in one
  template <uint32_t BITS>
  static I and_mask(I a) {
    alignas(32) static constexpr uint32_t kMask[W] = {BITS, BITS, BITS, BITS, BITS, BITS, BITS, BITS};
    I out;
    asm("vpand %2, %1, %0" : "=x"(out) : "x"(a), "m"(kMask));
    return out;
  }
  // One of eight integers after the other
  template <class Op>
  static int32_t reduce(I v, Op op) {
    const __m128i a = op(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i b = op(a, _mm_shuffle_epi32(a, 0x4e));
    return _mm_cvtsi128_si32(op(b, _mm_shuffle_epi32(b, 0xb1)));
  }
  static void store_bytes(int8_t* out, I v) {  // the lowest of each lane
    const I pick = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const I lanes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(v, pick),
                                                _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(lanes));
  }
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
