// Linear layers of int8 or int4 weights over integer activations.
//
// Every row of x is rounded to integers of one scale: of 8 bits, or of 16 bits as two bytes, value =
// 256 * high + low, which are multiplied like two rows. Weights are unsigned bytes or nibbles, the
// integer plus kZero8 or kZero4; what that adds is known from the row's own sums and is where an
// accumulator starts. Invariant: sums of integers are exact, so their order is nobody's business;
// int4 sums one group of inputs at a time and adds the groups, scaled, in order as floats. A row's
// bits depend on its own values only.
//
// int8 panels are [K/4][16][4] bytes with one fp32 scale per output. int4 panels are [K/8][16][4]
// bytes whose lower nibbles are inputs 0..3 and whose upper are 4..7, with bf16 scales
// [panel][group][16]. K is padded; padding of x is 0.
#pragma once

#include <math.h>

#include "cut.h"
#include "gemm.h"
#include "pool.h"
#include "rounding.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kRowBlock = 16;  // of a block

// What a call's rows become: `limbs` rows of bytes each.
struct IntegerRows {
  int8_t* values;  // [rows][limbs][stride]; for tiles in blocks of kRowBlock, see integer_tiles.h
  int32_t* sums;   // [rows][limbs][groups]: of the values, times minus the weights' zero
  float* scales;   // [rows]; NaN where a value is not finite
  int64_t stride, limbs, groups, group;
  int32_t zero;
  int64_t byte_rows;  // all
  bool in_blocks;

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

// Inputs [k, k + kChunk) of a row, those from num_in on as zeros.
inline void round_chunk(const IntegerRows& q, const float* x, int64_t row, int64_t k,
                        int64_t inside, float inverse) {
  if constexpr (Vec::kRoundsBytes) {
    if (q.limbs == 1 && inside == kChunk) return round_full_chunk(q, x, row, k, inverse);
    if (q.limbs == 2 && inside == kChunk) return split_full_chunk(q, x, row, k, inverse);
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
    const float limit = q.limbs == 2 ? kLimit16 : kLimit8, largest = largest_of(x, num_in);
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

// acc[r][v] += the products of one step of weights, `w`, with four bytes of every row at `x`. With
// many rows the bytes go through a register once for all of them: loads would be what is waited for.
template <int R, int V>
inline __attribute__((always_inline)) void add_step(I (&acc)[R][V], const I (&w)[V],
                                                    const int8_t* x, int64_t x_stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if constexpr (Vec::kByteDot && R > 2) {
      const I bytes = Vec::four_bytes(x + r * x_stride);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::dot_bytes(acc[r][v], w[v], bytes);
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::dot_bytes(acc[r][v], w[v], x + r * x_stride);
    }
  }
}

// acc[r][v] += the products of inputs [begin, end).
template <int BITS, int R, int V>
inline __attribute__((always_inline)) void add_products(I (&acc)[R][V], const IntegerTile& t,
                                                        int64_t begin, int64_t end,
                                                        Prefetch& prefetch) {
  constexpr int per_step = 32 / BITS;  // inputs
  const I mask = Vec::set1_int(0x0f0f0f0f);
  for (int64_t k = begin; k < end; k += per_step) {
    prefetch.step();
    const uint8_t* at = t.w + k / per_step * (4 * kPanel);
    const int8_t* x = t.x + k;
    I w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      w[v] = Vec::load_int(at + (v / kVecs) * t.panel_stride + (v % kVecs) * 4 * Vec::W);
    if constexpr (BITS == 8) {
      add_step<R, V>(acc, w, x, t.x_stride);
    } else {
      I half[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) half[v] = Vec::and_int(w[v], mask);
      add_step<R, V>(acc, half, x, t.x_stride);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) half[v] = Vec::and_int(Vec::shift_right4(w[v]), mask);
      add_step<R, V>(acc, half, x + 4, t.x_stride);
    }
  }
}

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

// ROWS rows of LIMBS byte rows each, against P panels, of int8.
template <int LIMBS, int ROWS, int P>
void int8_tile(const IntegerTile& t) {
  constexpr int R = ROWS * LIMBS, V = P * kVecs;
  I acc[R][V];
  start<R, V>(acc, t, 0);
  Prefetch prefetch(t.ahead.or_there(t.x), t.padded / 4);
  add_products<8, R, V>(acc, t, 0, t.padded, prefetch);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      F y = Vec::to_floats(acc[r * LIMBS + LIMBS - 1][v]);
      if constexpr (LIMBS == 2)
        y = Vec::fma(Vec::to_floats(acc[r * LIMBS][v]), Vec::set1(256.0f), y);
      store_sum(t, r, v, y);
    }
  }
}

// The same of int4. The running sums stay in memory: registers are for the group's.
template <int LIMBS, int ROWS, int P>
void int4_tile(const IntegerTile& t) {
  constexpr int R = ROWS * LIMBS, V = P * kVecs;
  alignas(64) float memory[ROWS * V * Vec::W];
  float* sums = memory;
  asm volatile("" : "+r"(sums) : : "memory");  // not to be taken apart into registers
  for (int i = 0; i < ROWS * V; ++i) Vec::store(sums + i * Vec::W, Vec::set1(0.0f));
  int64_t g = 0;
  Prefetch prefetch(t.ahead.or_there(t.x), t.padded / 8);
  for (int64_t begin = 0; begin < t.padded; begin += t.group, ++g) {
    I acc[R][V];
    start<R, V>(acc, t, g);
    add_products<4, R, V>(acc, t, begin, begin + t.group, prefetch);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const F step = Vec::load_as<BF16>(t.steps + (v / kVecs) * t.steps_stride + g * kPanel +
                                        (v % kVecs) * Vec::W);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        I whole = acc[r * LIMBS + LIMBS - 1][v];
        if constexpr (LIMBS == 2)  // fits: a group is short
          whole = Vec::add_int(Vec::shift_left8(acc[r * LIMBS][v]), whole);
        float* sum = sums + (r * V + v) * Vec::W;
        Vec::store(sum, Vec::fma(step, Vec::to_floats(whole), Vec::load(sum)));
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int r = 0; r < ROWS; ++r) store_sum(t, r, v, Vec::load(sums + (r * V + v) * Vec::W));
  }
}

template <int BITS, int LIMBS, int P, int ROWS = Vec::kRows / LIMBS>
void integer_tile_rows(const IntegerTile& t, int64_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return integer_tile_rows<BITS, LIMBS, P, ROWS - 1>(t, rows);
  }
  if constexpr (BITS == 8) {
    int8_tile<LIMBS, ROWS, P>(t);
  } else {
    int4_tile<LIMBS, ROWS, P>(t);
  }
}

// All `rows` rows against `panels` panels; `t` describes the first row and panel.
template <int BITS, int LIMBS>
void integer_gemm(const IntegerTile& first, int64_t rows, int64_t panels) {
  constexpr int64_t height = Vec::kRows / LIMBS;
  const int64_t tiles = (rows + height - 1) / height;
  for (int64_t r = 0; r < rows; r += height) {
    const int64_t left = rows - r < height ? rows - r : height;
    for (int64_t p = 0; p < panels;) {
      IntegerTile t = first;
      t.x += r * LIMBS * t.x_stride;
      t.sums += r * LIMBS * t.sums_stride;
      t.x_scales += r;
      t.w += p * t.panel_stride;
      if (t.scales != nullptr) t.scales += p * kPanel;
      if (t.steps != nullptr) t.steps += p * t.steps_stride;
      if (t.bias != nullptr) t.bias += p * kPanel;
      t.out += r * t.out_stride + p * kPanel;
      t.columns -= p * kPanel;
      t.ahead = p == 0 ? first.ahead.of_tile(r / height, tiles) : Ahead{};
      if (panels - p >= Vec::kPanels) {
        integer_tile_rows<BITS, LIMBS, Vec::kPanels>(t, left);
        p += Vec::kPanels;
      } else if (panels - p >= kPanelsFew) {
        integer_tile_rows<BITS, LIMBS, kPanelsFew>(t, left);
        p += kPanelsFew;
      } else {
        integer_tile_rows<BITS, LIMBS, 1>(t, left);
        p += 1;
      }
    }
  }
}

struct IntegerJob {
  const LinearArgs& a;
  const IntegerRows& q;
  Cut cut;

  void part(const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) const {
    const IntegerTile t = tile(place, panel, sums, ahead);
    const bool int8 = a.width == Width::kInt8;
    if (int8 && q.limbs == 1) integer_gemm<8, 1>(t, place.rows, place.panels);
    if (!int8 && q.limbs == 1) integer_gemm<4, 1>(t, place.rows, place.panels);
    if constexpr (kTiles || !kPairs) {  // there x is bf16, see narrow_pairs.h
      if (int8 && q.limbs == 2) integer_gemm<8, 2>(t, place.rows, place.panels);
    }
    if constexpr (!kPairs) {  // likewise, and nibble_tiles.h
      if (!int8 && q.limbs == 2) integer_gemm<4, 2>(t, place.rows, place.panels);
    }
  }

  IntegerTile tile(const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) const {
    const int64_t column = panel * kPanel;
    const bool int8 = a.width == Width::kInt8;
    IntegerTile t;
    t.x = q.values + place.row * q.limbs * q.stride;
    t.x_stride = t.padded = q.stride;
    t.sums = q.sums + place.row * q.limbs * q.groups;
    t.sums_stride = q.groups;
    t.x_scales = q.scales + place.row;
    t.panel_stride = q.stride * kPanel / (int8 ? 1 : 2);
    t.w = static_cast<const uint8_t*>(a.w) + panel * t.panel_stride;
    t.group = q.group;
    t.scales = int8 ? static_cast<const float*>(a.scales) + column : nullptr;
    t.steps_stride = q.groups * kPanel;
    t.steps = int8 ? nullptr : static_cast<const uint16_t*>(a.scales) + panel * t.steps_stride;
    t.bias = a.bias == nullptr ? nullptr : a.bias + column;
    t.out = sums.at;
    t.out_stride = sums.stride;
    t.columns = sums.columns;
    t.ahead = ahead;
    return t;
  }
};

}  // namespace
}  // namespace diptych::cpu
