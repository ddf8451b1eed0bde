// Vectors of int8 and int4 weights widened to bf16 in registers, for narrow_pairs.h; integers.h says
// how they are held. No widening rounds.
#pragma once

#include "rounding.h"

namespace diptych::cpu {
namespace {

// How 64 bytes of a panel become kVectors vectors of bf16, each [16 outputs][2 inputs].
struct Wide {  // bf16 already
  static constexpr bool kKeep = false;
  static constexpr int kVectors = 1;
  static constexpr int64_t panels(int64_t) { return Vec::kPanels; }
  void widen(const uint8_t* in, __m512i (&out)[kVectors]) const {
    out[0] = _mm512_loadu_si512(in);
  }
};

// Both bytes of the bf16 numbers 0..127.
struct alignas(64) MagnitudeTable {
  uint8_t low[128] = {}, high[128] = {};

  constexpr MagnitudeTable() {
    for (int i = 1; i < 128; ++i) {
      int top = 0;  // bit
      while (i >> (top + 1) != 0) ++top;
      const int bits = ((127 + top) << 7) | ((i << (7 - top)) & 127);
      low[i] = static_cast<uint8_t>(bits);
      high[i] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr MagnitudeTable kMagnitudes;

// Where the bytes of bf16 numbers come from: of every four inputs two, from `begin` on, their lower
// bytes in the first and their upper bytes in the second of two vectors.
struct alignas(64) PairOrder {
  uint8_t index[64] = {};

  constexpr explicit PairOrder(int begin) {
    for (int i = 0; i < 64; ++i)
      index[i] = static_cast<uint8_t>(i / 4 * 4 + begin + i % 4 / 2 + 64 * (i % 2));
  }
};
constexpr PairOrder kFirstPairs{0}, kSecondPairs{2};

// int8: each byte's magnitude looks up both bytes of its bf16; the sign goes on top.
class Bytes {
 public:
  static constexpr bool kKeep = false;
  static constexpr int kVectors = 2;
  static constexpr int64_t panels(int64_t rows) { return rows > 4 ? 2 : 4; }  // tables want registers too

  void widen(const uint8_t* in, __m512i (&out)[kVectors]) const {
    const __m512i v = _mm512_xor_si512(_mm512_loadu_si512(in), sign_);  // signed again
    const __m512i size = _mm512_abs_epi8(v);
    const __m512i low = _mm512_permutex2var_epi8(low_[0], size, low_[1]);
    const __m512i high = _mm512_permutex2var_epi8(high_[0], size, high_[1]);
    const __m512i top = _mm512_ternarylogic_epi32(high, v, sign_, 0xf8);  // high | (v & sign)
    out[0] = _mm512_permutex2var_epi8(low, first_, top);
    out[1] = _mm512_permutex2var_epi8(low, second_, top);
  }

 private:
  __m512i sign_ = _mm512_set1_epi8(static_cast<char>(kZero8));
  __m512i low_[2] = {_mm512_load_si512(kMagnitudes.low), _mm512_load_si512(kMagnitudes.low + 64)};
  __m512i high_[2] = {_mm512_load_si512(kMagnitudes.high),
                      _mm512_load_si512(kMagnitudes.high + 64)};
  __m512i first_ = _mm512_load_si512(kFirstPairs.index),
          second_ = _mm512_load_si512(kSecondPairs.index);
};

// int4: a permutation of words looks at the lowest five bits of each, and the table cares for four.
class Nibbles {
 public:
  static constexpr bool kKeep = false;
  static constexpr int kVectors = 4;
  static constexpr int64_t panels(int64_t) { return Vec::kPanels; }

  void widen(const uint8_t* in, __m512i (&out)[kVectors]) const {
    const __m512i v = _mm512_loadu_si512(in);
    out[0] = _mm512_permutexvar_epi16(v, values_);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), values_);
    out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), values_);
    out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), values_);
  }

  // The order in which out[] has inputs, eight at a time: what is multiplied with them has it too.
  static void order(uint16_t* row, int64_t inputs) {
    const __m512i turn = _mm512_set_epi64(
        0x001f001d001b0019, 0x001e001c001a0018, 0x0017001500130011, 0x0016001400120010,
        0x000f000d000b0009, 0x000e000c000a0008, 0x0007000500030001, 0x0006000400020000);
    for (int64_t k = 0; k < inputs; k += kPairInputs)
      _mm512_storeu_si512(row + k, _mm512_permutexvar_epi16(turn, _mm512_loadu_si512(row + k)));
  }

 private:
  static __m512i values() {  // -8..7, twice
    const __m512 low = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (__m512i)_mm512_cvtne2ps_pbh(low, low);
  }

  __m512i values_ = values();
};

// A source whose vectors are kept for the rows that follow.
template <class Source>
struct Kept : Source {
  static constexpr bool kKeep = true;
};

}  // namespace
}  // namespace diptych::cpu
