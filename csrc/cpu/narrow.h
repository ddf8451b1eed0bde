// Weights held as int8 or int4 (integers.h says how), widened to bf16 panels just before tiles read
// them: bf16 tiles are faster than sixteen-bit integers there.
//
// int8 has one scale per output, applied to the finished sum. int4 has a scale per group of inputs
// and output of five significant bits: scale times nibble is then a bf16 number exactly. So widening
// never rounds and a narrow layer is, bit for bit, the bf16 layer of the widened weights (times its
// scales).
#pragma once

#include "cut.h"
#include "integers.h"

namespace diptych::cpu {
namespace {

// Panels are read piece by piece in turn, too short a stretch for the machine to read ahead itself.
constexpr int64_t kAheadWords = 512;

// `inputs` (a multiple of 4) inputs of one panel: in [inputs/4][16] words of bytes, out
// [inputs/2][16][2] bf16.
inline void widen_int8(const uint32_t* in, uint16_t* out, int64_t inputs) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u)),
                zero = _mm512_set1_epi8(static_cast<char>(kZero8));
  auto real = [](__m512i byte_on_top) {  // of an int32 with the byte in its upper bits
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(byte_on_top, 24)));
  };
  for (int64_t k = 0; k < inputs; k += 4, in += kPanel, out += 4 * kPanel) {
    __builtin_prefetch(in + kAheadWords);
    const __m512i v = _mm512_xor_si512(_mm512_loadu_si512(in), zero);  // signed again
    const __m512i a = real(_mm512_slli_epi32(v, 24)), b = real(_mm512_slli_epi32(v, 16)),
                  c = real(_mm512_slli_epi32(v, 8)), d = real(v);
    // (x & y) | ~x & z, of bits
    _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(high, b, _mm512_srli_epi32(a, 16), 0xca));
    _mm512_storeu_si512(out + 2 * kPanel,
                        _mm512_ternarylogic_epi32(high, d, _mm512_srli_epi32(c, 16), 0xca));
  }
}

// The same for words of eight nibbles in one group; scales: [16].
inline void widen_int4(const uint32_t* in, const uint16_t* scales, uint16_t* out,
                       int64_t inputs) {
  const __m512 scale = Vec::load_as<BF16>(scales);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  auto real = [&](__m512i nibble_first) {  // the permutation looks at the lowest four bits only
    return _mm512_castps_si512(
        _mm512_mul_ps(_mm512_permutexvar_ps(nibble_first, values), scale));
  };
  for (int64_t k = 0; k < inputs; k += 8, in += kPanel, out += 8 * kPanel) {
    __builtin_prefetch(in + kAheadWords);
    const __m512i v = _mm512_loadu_si512(in);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // inputs 2 i and 2 i + 1
      const unsigned shift = static_cast<unsigned>(16 * (i % 2) + 4 * (i / 2));
      const __m512i first = real(_mm512_srli_epi32(v, shift));
      const __m512i second = real(_mm512_srli_epi32(v, shift + 8));
      _mm512_storeu_si512(
          out + i * 2 * kPanel,
          _mm512_ternarylogic_epi32(high, second, _mm512_srli_epi32(first, 16), 0xca));
    }
  }
}

// Inputs [begin, begin + inputs) of panel `panel`; both multiples of 32.
inline void widen(const LinearArgs& a, int64_t padded, int64_t panel, int64_t begin,
                  int64_t inputs, uint16_t* out) {
  const auto* words = static_cast<const uint32_t*>(a.w);
  if (a.width == Width::kInt8) {
    widen_int8(words + panel * padded * kPanel / 4 + begin / 4 * kPanel, out, inputs);
    return;
  }
  const int64_t groups = padded / a.group;
  for (int64_t k = begin; k < begin + inputs;) {
    const int64_t group = k / a.group, group_end = (group + 1) * a.group;
    const int64_t end = group_end < begin + inputs ? group_end : begin + inputs;
    widen_int4(words + panel * padded * kPanel / 8 + k / 8 * kPanel,
               static_cast<const uint16_t*>(a.scales) + (panel * groups + group) * kPanel, out + (k - begin) * kPanel, end - k);
    k = end;
  }
}

}  // namespace
}  // namespace diptych::cpu
