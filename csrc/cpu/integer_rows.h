// Rows of activations as integers, and what the tiles of integers.h have in common.
#pragma once

#include <math.h>

#include "cut.h"
#include "gemm.h"
#include "rounding.h"
#if defined(__AVX2__) && !defined(__AVX512F__)
#define DIPTYCH_WORDS  // see integer_words.h
#endif

namespace diptych::cpu {
namespace {

constexpr int64_t kRowBlock = 16;  // of a block
// Where rows are words (integer_words.h): so many products of 128 * kLimit16 are below 2^31.
constexpr int64_t kWordInputs = 512;

// What a call's rows become: `limbs` rows of bytes each.
struct IntegerRows {
  int8_t* values;  // [rows][limbs][stride]; for tiles in blocks of kRowBlock, see integer_tiles.h
  int32_t* sums;   // [rows][limbs][groups]: of the values, times minus the weights' zero
  float* scales;   // [rows]; NaN where a value is not finite
  int64_t stride, limbs, groups, group;
  int32_t zero;
  int64_t byte_rows;  // all
  bool in_blocks;
  // 2: words, of every four inputs the two in the middle in each other's place; then there is one limb,
  // and against int8 with 16 bits the groups are of kWordInputs.
  int64_t value_bytes = 1;

  // Inputs [k, k + kChunk) of a byte row.
  int8_t* chunk(int64_t row, int64_t k) const {
    if (!in_blocks) return values + row * stride + k;
    const int64_t block = row / kRowBlock * kRowBlock, left = byte_rows - block;
    return values + block * stride + k * (left < kRowBlock ? left : kRowBlock) + (row - block) * kChunk;
  }
};

// A whole chunk of byte rows, see round_chunk.
inline void round_full_chunk(const IntegerRows& q, const float* x, int64_t row, int64_t k,
                             float inverse) {
  int8_t* out = q.chunk(row, k);
  int32_t* sums = q.sums + row * q.groups;
  const F factor = Vec::set1(inverse);
  const int64_t part = q.group < kChunk ? q.group : kChunk;
  for (int64_t begin = 0; begin < kChunk; begin += part) {
    I sum = Vec::set1_int(0);
    for (int64_t i = begin; i < begin + part; i += Vec::W)
      sum = Vec::add_int(sum, Vec::round_bytes(out + i, Vec::load(x + k + i) * factor));
    sums[(k + begin) / q.group] -= q.zero * Vec::sum_int(sum);
  }
}

#ifndef DIPTYCH_WORDS
// The same of two bytes for each value.
inline void split_full_chunk(const IntegerRows& q, const float* x, int64_t row, int64_t k,
                             float inverse) {
  int8_t *high = q.chunk(row * 2, k), *low = q.chunk(row * 2 + 1, k);
  int32_t *high_sums = q.sums + row * 2 * q.groups, *low_sums = high_sums + q.groups;
  const F factor = Vec::set1(inverse);
  const int64_t part = q.group < kChunk ? q.group : kChunk;
  for (int64_t begin = 0; begin < kChunk; begin += part) {
    I high_sum = Vec::set1_int(0), low_sum = Vec::set1_int(0);
    for (int64_t i = begin; i < begin + part; i += Vec::W)
      Vec::split_limbs(Vec::load(x + k + i) * factor, high + i, low + i, high_sum, low_sum);
    high_sums[(k + begin) / q.group] -= q.zero * Vec::sum_int(high_sum);
    low_sums[(k + begin) / q.group] -= q.zero * Vec::sum_int(low_sum);
  }
}
#else
// The same of words, any number of inputs.
inline void round_word_chunk(const IntegerRows& q, const float* x, int64_t row, int64_t k,
                             int64_t inside, float inverse) {
  auto* out = reinterpret_cast<int16_t*>(q.values) + row * q.stride + k;
  const F factor = Vec::set1(inverse);
  const int64_t part = q.group < kChunk ? q.group : kChunk;
  for (int64_t begin = 0; begin < kChunk; begin += part) {
    I sum = Vec::set1_int(0);
    for (int64_t i = begin; i < begin + part; i += Vec::W) {
      const int64_t left = inside - i;
      const F values = left >= Vec::W ? Vec::load(x + k + i)
                       : left > 0     ? Vec::load_n(x + k + i, static_cast<int>(left))
                                      : Vec::set1(0.0f);
      sum = Vec::add_int(sum, Vec::round_words(out + i, values * factor));
    }
    q.sums[row * q.groups + (k + begin) / q.group] -= q.zero * Vec::sum_int(sum);
  }
}
#endif

// Inputs [k, k + kChunk) of a row, those from num_in on as zeros.
inline void round_chunk(const IntegerRows& q, const float* x, int64_t row, int64_t k,
                        int64_t inside, float inverse) {
#ifdef DIPTYCH_WORDS
  if (q.value_bytes == 2) return round_word_chunk(q, x, row, k, inside, inverse);
#endif
  if constexpr (Vec::kRoundsBytes) {
    if (q.limbs == 1 && inside == kChunk) return round_full_chunk(q, x, row, k, inverse);
#ifndef DIPTYCH_WORDS
    if (q.limbs == 2 && inside == kChunk) return split_full_chunk(q, x, row, k, inverse);
#endif
  }
  int32_t whole[kChunk] = {};
  for (int64_t i = 0; i < inside; ++i) whole[i] = nearest(x[k + i] * inverse);
  int8_t* first = q.chunk(row * q.limbs, k);
  int32_t* sums = q.sums + row * q.limbs * q.groups;
  const int64_t part = q.group < kChunk ? q.group : kChunk;
  if (q.limbs == 2) {
    int8_t* second = q.chunk(row * q.limbs + 1, k);
    for (int64_t i = 0; i < kChunk; ++i) second[i] = static_cast<int8_t>(whole[i]);
    for (int64_t i = 0; i < kChunk; ++i) whole[i] = (whole[i] - second[i]) >> 8;
    for (int64_t begin = 0; begin < kChunk; begin += part) {
      int32_t sum = 0;
      for (int64_t i = begin; i < begin + part; ++i) sum += second[i];
      sums[q.groups + (k + begin) / q.group] -= q.zero * sum;
    }
  }
  for (int64_t i = 0; i < kChunk; ++i) first[i] = static_cast<int8_t>(whole[i]);
  for (int64_t begin = 0; begin < kChunk; begin += part) {
    int32_t sum = 0;
    for (int64_t i = begin; i < begin + part; ++i) sum += whole[i];
    sums[(k + begin) / q.group] -= q.zero * sum;
  }
}

struct IntegerRowsJob {
  const LinearArgs& a;
  const IntegerRows& q;

  static void item(void* context, int64_t row) {
    const auto& job = *static_cast<const IntegerRowsJob*>(context);
    const IntegerRows& q = job.q;
    const int64_t num_in = job.a.num_in;
    const float* x = job.a.x + row * num_in;
    const float limit = job.a.act_bits == 16 ? kLimit16 : kLimit8, largest = largest_of(x, num_in);
    const bool finite = isfinite(largest), nothing = !finite || largest < kNothing;
    q.scales[row] = !finite ? NAN : nothing ? 0.0f : largest / limit;
    const float inverse = nothing ? 0.0f : limit / largest;
    for (int64_t i = 0; i < q.limbs * q.groups; ++i) q.sums[row * q.limbs * q.groups + i] = 0;
    for (int64_t k = 0; k < q.stride; k += kChunk) {
      int64_t inside = num_in - k < 0 ? 0 : num_in - k;
      if (nothing) inside = 0;  // what is not finite has no integer
      round_chunk(q, x, row, k, inside < kChunk ? inside : kChunk, inverse);
    }
  }
};

// Some rows against some panels: what one tile works on.
struct IntegerTile {
  const int8_t* x;      // first row
  int64_t x_stride;     // bytes
  const int32_t* sums;  // first row
  int64_t sums_stride;
  const float* x_scales;
  const uint8_t* w;  // first panel
  int64_t panel_stride, padded, group;
  const float* scales;         // int8: of the first column
  const uint16_t* steps;       // int4: of the first panel
  int64_t steps_stride;        // int4: between panels
  const float* bias;           // of the first column, or null
  float* out;                  // first row and column
  int64_t out_stride, columns;  // valid columns from the first one on
  Ahead ahead;                  // to be fetched meanwhile
};

// out = y times the scales, plus bias, for row r and vector v of the tile.
inline void store_sum(const IntegerTile& t, int r, int v, F y) {
  const int64_t left = t.columns - v * Vec::W;
  if (left <= 0) return;
  const int n = left < Vec::W ? static_cast<int>(left) : Vec::W;
  if (t.scales != nullptr) y = y * Vec::load_n(t.scales + v * Vec::W, n);
  y = y * Vec::set1(t.x_scales[r]);
  if (t.bias != nullptr) y = y + Vec::load_n(t.bias + v * Vec::W, n);
  Vec::store_n(t.out + r * t.out_stride + v * Vec::W, y, n);
}

template <int R, int V>
inline __attribute__((always_inline)) void start(I (&acc)[R][V], const IntegerTile& t, int64_t g) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = Vec::set1_int(t.sums[r * t.sums_stride + g]);
  }
}

// ROWS rows against P panels of int4. Tiles::sum_group(sum, t, begin, g, prefetch) says what the products
// of group `g`'s inputs, which begin at `begin`, sum up to. The running sums stay in memory: registers are
// for the group's.
template <class Tiles, int ROWS, int P>
void int4_tile(const IntegerTile& t) {
  constexpr int V = P * kVecs;
  alignas(64) float memory[ROWS * V * Vec::W];
  float* sums = memory;
  asm volatile("" : "+r"(sums) : : "memory");  // not to be taken apart into registers
  for (int i = 0; i < ROWS * V; ++i) Vec::store(sums + i * Vec::W, Vec::set1(0.0f));
  int64_t g = 0;
  Prefetch prefetch(t.ahead.or_there(t.x), t.padded / 8);
  for (int64_t begin = 0; begin < t.padded; begin += t.group, ++g) {
    I whole[ROWS][V];
    Tiles::sum_group(whole, t, begin, g, prefetch);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const F step = Vec::load_as<BF16>(t.steps + (v / kVecs) * t.steps_stride + g * kPanel +
                                        (v % kVecs) * Vec::W);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        float* sum = sums + (r * V + v) * Vec::W;
        Vec::store(sum, Vec::fma(step, Vec::to_floats(whole[r][v]), Vec::load(sum)));
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int r = 0; r < ROWS; ++r) store_sum(t, r, v, Vec::load(sums + (r * V + v) * Vec::W));
  }
}

}  // namespace
}  // namespace diptych::cpu
