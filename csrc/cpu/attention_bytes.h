// int8 KV multiplied as it is, on levels with sums of byte products.
//
// Queries and the softmax's weights become integers of 16 bits, two bytes each, with a scale per row;
// weights take the values' scales along, with a scale per row and tile. Sums of integers are exact, so
// a key that a row does not see counts as weight 0 without a trace. The instruction wants one side
// unsigned: weights are, and keys are offset by 128; what that adds is where an accumulator starts.
#pragma once

#include "attention_tile.h"

namespace diptych::cpu {
namespace {

constexpr float kLimitWeight = 65535.0f;
constexpr int kByteRows = 3;  // rows at once: two bytes each, against four vectors

// fn(first, count) over at most kRows rows, shared out evenly.
template <class Fn>
inline void each_byte_rows(int64_t rows, Fn fn) {
  const int64_t calls = (rows + kByteRows - 1) / kByteRows, each = (rows + calls - 1) / calls;
  for (int64_t i = 0; i < rows; i += each) fn(i, rows - i < each ? rows - i : each);
}

inline int64_t whole_vectors(int64_t dim) { return (dim + 15) / 16 * 16; }

// 16 tokens of one head in the order of the products: keys [dim/4][16][4], values [4][columns][4].
inline void order_piece(char* keys, char* values, const char* k, const char* v, int64_t dim) {
  const int64_t row = 4 * whole_vectors(dim);
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4) Vec::order_keys(keys + d * kPanel, k + d * kPanel, 16 * 4);
  if (d < dim) Vec::order_keys(keys + d * kPanel, k + d * kPanel, 16 * 2);
  for (int64_t g = 0; g < kPanel / 4; ++g, values += row, v += 4 * dim) {
    for (d = 0; d + 32 <= dim; d += 32)
      Vec::order_values(values + 4 * d, v + 2 * d, v + 2 * (dim + d), 32);
    if (d < dim)
      Vec::order_values(values + 4 * d, v + 2 * d, v + 2 * (dim + d), static_cast<int>(dim - d));
  }
}

// A query of n floats as two rows of bytes, `stride` apart, padded with zeros to whole vectors;
// `sums`: where the accumulators of either begin. Returns the scale: NaN where a value is not finite.
inline float round_query(int8_t* out, int64_t stride, int32_t* sums, const float* x, int64_t n) {
  const float largest = largest_of(x, n);
  const bool finite = isfinite(largest), nothing = !finite || largest < kNothing;
  const F inverse = Vec::set1(nothing ? 0.0f : kLimit16 / largest);
  I high = Vec::set1_int(0), low = high;
  for (int64_t i = 0; i < n; i += Vec::W) {
    const int some = n - i < Vec::W ? static_cast<int>(n - i) : Vec::W;
    const F scaled = nothing ? Vec::set1(0.0f) : Vec::load_n(x + i, some) * inverse;
    Vec::split_limbs(scaled, out + i, out + stride + i, high, low);
  }
  sums[0] = -kZero8 * Vec::sum_int(high);
  sums[1] = -kZero8 * Vec::sum_int(low);
  return !finite ? NAN : nothing ? 0.0f : largest / kLimit16;
}

// acc[2 r + limb][v] += bytes of row r times vectors of four bytes per lane, `steps` of them. Asks for as
// many lines from each place in `ahead` on.
template <bool KEYS, int R, int V>
inline __attribute__((always_inline)) void add_limbs(I (&acc)[2 * R][V], const int8_t* x,
                                                     int64_t x_stride, const char* w,
                                                     int64_t step_bytes, int64_t vector_bytes,
                                                     int64_t steps, const char* const* ahead,
                                                     int64_t offset) {
  for (int64_t s = 0; s < steps; ++s, w += step_bytes, x += 4, offset += kLine) {
    if constexpr (V == kTilePanels) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(ahead[v] + offset);
    }
    I bytes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bytes[v] = Vec::load_int(w + v * vector_bytes);
#pragma GCC unroll 16
    for (int r = 0; r < 2 * R; ++r) {
      const I four = Vec::four_bytes(x + r * x_stride);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[r][v] = KEYS ? Vec::dot_bytes(acc[r][v], bytes[v], four)
                         : Vec::dot_bytes(acc[r][v], four, bytes[v]);
      }
    }
  }
}

inline F join_limbs(I high, I low) {
  return Vec::fma(Vec::to_floats(high), Vec::set1(256.0f), Vec::to_floats(low));
}

// Scores of R rows against the tile.
template <int R = kByteRows>
void score_bytes(const Workspace& w, int64_t first, int64_t rows, int64_t dim) {
  if constexpr (R > 1) {
    if (rows < R) return score_bytes<R - 1>(w, first, rows, dim);
  }
  constexpr int V = kTilePanels;
  const int64_t steps = (dim + 3) / 4, panel_bytes = steps * 4 * kPanel;
  const auto* q = static_cast<const int8_t*>(w.q) + first * 2 * w.q_stride;
  for (int64_t p = 0; p < kTilePanels; p += V) {
    I acc[2 * R][V];
#pragma GCC unroll 16
    for (int r = 0; r < 2 * R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::set1_int(w.q_sums[2 * first + r]);
    }
    add_limbs<true, R, V>(acc, q, w.q_stride, w.key_bytes + p * panel_bytes, 4 * kPanel, panel_bytes,
                    steps, w.ahead->keys, 0);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = (p + v) * kPanel;
        const F y = join_limbs(acc[2 * r][v], acc[2 * r + 1][v]) * Vec::set1(w.q_steps[first + r]);
        Vec::store(w.scores + (first + r) * kTile + at, y * Vec::load(w.k_scales + at));
      }
    }
  }
}

// A row's weights, scaled as the values are, from floats to bytes; outside `range` they are 0.
inline void round_weights(const Workspace& w, int64_t r, Range range) {
  float* s = w.scores + r * kTile;
  for (int64_t j = 0; j < range.low; ++j) s[j] = 0.0f;
  for (int64_t j = range.high; j < kTile; ++j) s[j] = 0.0f;
  unsigned nan = 0;
  F top = Vec::set1(0.0f);
#pragma GCC unroll 4
  for (int j = 0; j < kTile; j += Vec::W) {
    const F x = Vec::load(s + j);
    nan |= Vec::mask_nan(x);
    top = Vec::max(x, top);
  }
  const float largest = nan != 0 ? NAN : Vec::largest(top);
  const bool finite = isfinite(largest), nothing = !finite || largest < kNothing;
  const F inverse = Vec::set1(nothing ? 0.0f : kLimitWeight / largest);
  auto* bytes = reinterpret_cast<int8_t*>(w.weights) + r * 2 * kTile;
#pragma GCC unroll 4
  for (int j = 0; j < kTile; j += Vec::W) {
    const F scaled = finite ? Vec::load(s + j) * inverse : Vec::set1(0.0f);
    Vec::split_unsigned(scaled, bytes + j, bytes + kTile + j);
  }
  w.steps[r] = !finite ? NAN : nothing ? 0.0f : largest / kLimitWeight;
}

template <int R, int V>
inline __attribute__((always_inline)) void weigh_bytes_at(const Workspace& w, int64_t first,
                                                          int64_t base, int64_t d, int64_t dim) {
  const int64_t row = 4 * whole_vectors(dim);
  I acc[2 * R][V];
#pragma GCC unroll 16
  for (int r = 0; r < 2 * R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Vec::set1_int(0);
  }
  add_limbs<false, R, V>(acc, reinterpret_cast<const int8_t*>(w.weights) + first * 2 * kTile, kTile, w.value_bytes + 4 * d,
                  row, 4 * Vec::W, kTile / 4, w.ahead->values, d * kPanel);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (!sees_any(w, first + r, base)) continue;
    float* out = w.split.acc + (first + r) * dim + d;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t left = dim - d - v * Vec::W;
      const int n = left < Vec::W ? static_cast<int>(left) : Vec::W;
      const F y = join_limbs(acc[2 * r][v], acc[2 * r + 1][v]);
      Vec::store_n(out + v * Vec::W,
                   Vec::fma(Vec::set1(w.steps[first + r]), y, Vec::load_n(out + v * Vec::W, n)), n);
    }
  }
}

// Adds the tile's values to the rows that see any of it.
template <int R = kByteRows>
void weigh_bytes(const Workspace& w, int64_t first, int64_t rows, int64_t base, int64_t dim) {
  if constexpr (R > 1) {
    if (rows < R) return weigh_bytes<R - 1>(w, first, rows, base, dim);
  }
  int64_t d = 0;
  for (; d + 3 * Vec::W < dim; d += 4 * Vec::W) weigh_bytes_at<R, 4>(w, first, base, d, dim);
  for (; d < dim; d += Vec::W) weigh_bytes_at<R, 1>(w, first, base, d, dim);
}

}  // namespace
}  // namespace diptych::cpu
