// Linear layers of int8 or int4 weights where neither bytes nor pairs of bf16 are multiplied at once:
// by sums of two products of 16-bit words. For integers.h, which says how weights are held.
//
// Weights become words in registers, an AND or a shift for two inputs of eight outputs. Rows of x are words
// too, whether of 8 or of 16 bits; sums of kWordInputs inputs fit into 32 bits. Only nibbles with 8 bits are
// multiplied as bytes, whose sums of kNibbleRun inputs fit into words.
#pragma once

#include "integer_rows.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kNibbleRun = 32;  // inputs: 15 * 128 * kNibbleRun / 2 < 2^15

// The weights of a step that come with part `part` of its inputs, as words. Of int4, whose inputs 0..3 are
// the lower nibbles of a lane and 4..7 the upper ones: 0 and 2, 1 and 3, 4 and 6, 5 and 7, as rows have them.
template <int BITS>
inline __attribute__((always_inline)) I words_of(I bytes, int part) {
  if constexpr (BITS == 8) return part == 0 ? Vec::low_bytes(bytes) : Vec::high_bytes(bytes);
  if (part == 0) return Vec::low_nibble_of_words(bytes);
  if (part == 1) return Vec::low_nibble_of_words(Vec::high_bytes(bytes));
  if (part == 2) return Vec::low_nibble_of_words(Vec::shift_right4(bytes));
  return Vec::top_nibble_of_words(bytes);
}

// acc[r][v] += the products of inputs [begin, end).
template <int BITS, int R, int V>
inline __attribute__((always_inline)) void add_word_products(I (&acc)[R][V], const IntegerTile& t,
                                                             int64_t begin, int64_t end,
                                                             Prefetch& prefetch) {
  constexpr int per_step = 32 / BITS, parts = per_step / 2;
  const uint8_t* at = t.w + begin / per_step * (4 * kPanel);
  for (int64_t k = begin; k < end; k += per_step, at += 4 * kPanel) {
    prefetch.step();
    const int8_t* x = t.x + 2 * k;
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      I w[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const uint8_t* bytes = at + (v / kVecs) * t.panel_stride + (v % kVecs) * 4 * Vec::W;
        if (R > 1) bytes = load_again(bytes);
        w[v] = words_of<BITS>(Vec::load_int(bytes), part);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const I two = Vec::four_bytes(x + r * t.x_stride + 4 * part);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] = Vec::dot_words(acc[r][v], w[v], two);
      }
    }
  }
}

// R rows x P panels of int8. The sum of all groups is kept in two: the upper bits of each and the rest.
template <int R, int P>
void word_tile(const IntegerTile& t) {
  constexpr int V = P * kVecs;
  alignas(64) int32_t memory[2 * R * V * Vec::W];
  int32_t *upper = memory, *rest = memory + R * V * Vec::W;
  asm volatile("" : "+r"(upper), "+r"(rest) : : "memory");  // not to be taken apart into registers
  for (int i = 0; i < R * V; ++i) {
    Vec::store_int(upper + i * Vec::W, Vec::set1_int(0));
    Vec::store_int(rest + i * Vec::W, Vec::set1_int(0));
  }
  Prefetch prefetch(t.ahead.or_there(t.x), t.padded / 4);
  int64_t g = 0;
  for (int64_t begin = 0; begin < t.padded; begin += t.group, ++g) {
    I acc[R][V];
    start<R, V>(acc, t, g);
    const int64_t end = begin + t.group < t.padded ? begin + t.group : t.padded;
    add_word_products<8, R, V>(acc, t, begin, end, prefetch);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const int64_t at = (r * V + v) * Vec::W;
        const I high = Vec::shift_right16(acc[r][v]), low = Vec::low_word(acc[r][v]);
        Vec::store_int(upper + at, Vec::add_int(Vec::load_int(upper + at), high));
        Vec::store_int(rest + at, Vec::add_int(Vec::load_int(rest + at), low));
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int r = 0; r < R; ++r) {
      const int64_t at = (r * V + v) * Vec::W;
      const F high = Vec::to_floats(Vec::load_int(upper + at));
      const F low = Vec::to_floats(Vec::load_int(rest + at));
      store_sum(t, r, v, Vec::fma(high, Vec::set1(65536.0f), low));
    }
  }
}

// sum[r][v] = the sums of the products of group `g`'s inputs, which begin at `begin`, of bytes: in memory on
// the way, as registers are for those of a run.
template <int R, int V>
inline __attribute__((always_inline)) void sum_group_bytes(I (&sum)[R][V], const IntegerTile& t,
                                                           int64_t begin, int64_t g,
                                                           Prefetch& prefetch) {
  alignas(64) int32_t memory[R * V * Vec::W];
  int32_t* sums = memory;
  asm volatile("" : "+r"(sums) : : "memory");
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const I zero = Vec::set1_int(t.sums[r * t.sums_stride + g]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) Vec::store_int(sums + (r * V + v) * Vec::W, zero);
  }
  const uint8_t* at = t.w + begin / 2 * kPanel;
  const int8_t* x = t.x + begin;
  for (int64_t done = 0; done < t.group; done += kNibbleRun) {
    I acc[R][V];  // words
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::set1_int(0);
    }
#pragma GCC unroll 1
    for (int step = 0; step < kNibbleRun / 8; ++step, at += 4 * kPanel, x += 8) {
      prefetch.step();
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        I w[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          const uint8_t* bytes = at + (v / kVecs) * t.panel_stride + (v % kVecs) * 4 * Vec::W;
          if (R > 1) bytes = load_again(bytes);
          const I both = Vec::load_int(bytes);
          w[v] = Vec::low_nibbles(half == 0 ? both : Vec::shift_right4(both));
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const I four = Vec::four_bytes(x + r * t.x_stride + 4 * half);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) acc[r][v] = Vec::dot_byte_pairs(acc[r][v], w[v], four);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        int32_t* here = sums + (r * V + v) * Vec::W;
        sum[r][v] = Vec::add_int(Vec::load_int(here), Vec::sum_words(acc[r][v]));
        Vec::store_int(here, sum[r][v]);
      }
    }
  }
}

struct WordTiles {
  static constexpr int kLimbs = 1, kPanelsOne = 2;
  template <int R, int P>
  static void run(const IntegerTile& t) {
    word_tile<R, P>(t);
  }
};

// WORDS: rows are words.
template <bool WORDS>
struct NibbleTiles {
  static constexpr int kLimbs = 1, kPanelsOne = 2;
  template <int R, int P>
  static void run(const IntegerTile& t) {
    int4_tile<NibbleTiles, R, P>(t);
  }
  template <int R, int V>
  static inline __attribute__((always_inline)) void sum_group(I (&sum)[R][V], const IntegerTile& t,
                                                              int64_t begin, int64_t g,
                                                              Prefetch& prefetch) {
    if constexpr (WORDS) {
      start<R, V>(sum, t, g);
      add_word_products<4, R, V>(sum, t, begin, begin + t.group, prefetch);
    } else {
      sum_group_bytes<R, V>(sum, t, begin, g, prefetch);
    }
  }
};

}  // namespace
}  // namespace diptych::cpu
