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

#include "integer_rows.h"
#include "pool.h"
#ifdef DIPTYCH_WORDS
#include "integer_words.h"
#endif

namespace diptych::cpu {
namespace {

#ifndef DIPTYCH_WORDS
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

template <int BITS, int LIMBS>
struct ByteTiles {
  static constexpr int kLimbs = LIMBS, kPanelsOne = Vec::kPanels;
  template <int ROWS, int P>
  static void run(const IntegerTile& t) {
    if constexpr (BITS == 8) {
      int8_tile<LIMBS, ROWS, P>(t);
    } else {
      int4_tile<ByteTiles, ROWS, P>(t);
    }
  }
  template <int ROWS, int V>
  static inline __attribute__((always_inline)) void sum_group(I (&sum)[ROWS][V],
                                                              const IntegerTile& t, int64_t begin,
                                                              int64_t g, Prefetch& prefetch) {
    I acc[ROWS * LIMBS][V];
    start<ROWS * LIMBS, V>(acc, t, g);
    add_products<4, ROWS * LIMBS, V>(acc, t, begin, begin + t.group, prefetch);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        sum[r][v] = acc[r * LIMBS + LIMBS - 1][v];
        if constexpr (LIMBS == 2)  // fits: a group is short
          sum[r][v] = Vec::add_int(Vec::shift_left8(acc[r * LIMBS][v]), sum[r][v]);
      }
    }
  }
};
#endif

// Tiles: kLimbs, kPanelsOne (panels of a tile of a single row), and run<ROWS, P>(t).
template <class Tiles, int P, int ROWS = Vec::kRows / Tiles::kLimbs>
void integer_tile_rows(const IntegerTile& t, int64_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return integer_tile_rows<Tiles, P, ROWS - 1>(t, rows);
  }
  Tiles::template run<ROWS, P>(t);
}

// All `rows` rows against `panels` panels; `t` describes the first row and panel.
template <class Tiles>
void integer_gemm(const IntegerTile& first, int64_t rows, int64_t panels) {
  constexpr int64_t height = Vec::kRows / Tiles::kLimbs;
  const int64_t wide = rows == 1 ? Tiles::kPanelsOne : Vec::kPanels;
  const int64_t across = (panels + wide - 1) / wide, tiles = (rows + height - 1) / height * across;
  for (int64_t r = 0; r < rows; r += height) {
    const int64_t left = rows - r < height ? rows - r : height;
    for (int64_t p = 0; p < panels;) {
      IntegerTile t = first;
      t.x += r * Tiles::kLimbs * t.x_stride;
      t.sums += r * Tiles::kLimbs * t.sums_stride;
      t.x_scales += r;
      t.w += p * t.panel_stride;
      if (t.scales != nullptr) t.scales += p * kPanel;
      if (t.steps != nullptr) t.steps += p * t.steps_stride;
      if (t.bias != nullptr) t.bias += p * kPanel;
      t.out += r * t.out_stride + p * kPanel;
      t.columns -= p * kPanel;
      t.ahead = p % wide == 0 ? first.ahead.of_tile(r / height * across + p / wide, tiles) : Ahead{};
      if (rows == 1 && panels - p >= Tiles::kPanelsOne) {
        Tiles::template run<1, Tiles::kPanelsOne>(t);
        p += Tiles::kPanelsOne;
      } else if (panels - p >= Vec::kPanels) {
        integer_tile_rows<Tiles, Vec::kPanels>(t, left);
        p += Vec::kPanels;
      } else if (panels - p >= kPanelsFew) {
        integer_tile_rows<Tiles, kPanelsFew>(t, left);
        p += kPanelsFew;
      } else {
        integer_tile_rows<Tiles, 1>(t, left);
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
#ifdef DIPTYCH_WORDS
    if (int8) return integer_gemm<WordTiles>(t, place.rows, place.panels);
    if (q.value_bytes == 2) return integer_gemm<NibbleTiles<true>>(t, place.rows, place.panels);
    integer_gemm<NibbleTiles<false>>(t, place.rows, place.panels);
#else
    if (int8 && q.limbs == 1) integer_gemm<ByteTiles<8, 1>>(t, place.rows, place.panels);
    if (!int8 && q.limbs == 1) integer_gemm<ByteTiles<4, 1>>(t, place.rows, place.panels);
    if constexpr (kTiles || !kPairs) {  // there x is bf16, see narrow_pairs.h
      if (int8 && q.limbs == 2) integer_gemm<ByteTiles<8, 2>>(t, place.rows, place.panels);
    }
    if constexpr (!kPairs) {  // likewise, and nibble_tiles.h
      if (!int8 && q.limbs == 2) integer_gemm<ByteTiles<4, 2>>(t, place.rows, place.panels);
    }
#endif
  }

  IntegerTile tile(const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) const {
    const int64_t column = panel * kPanel;
    const bool int8 = a.width == Width::kInt8;
    IntegerTile t;
    t.x_stride = q.stride * q.value_bytes;
    t.padded = q.stride;
    t.x = q.values + place.row * q.limbs * t.x_stride;
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
