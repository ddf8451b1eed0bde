// One row block against one tile of keys: where its K and V lie, scores, weighted values.
//
// The pool holds keys as panels and values as rows or, in bf16, as rows of pairs (kernels.h), which is
// what the products read; nothing is copied. Here queries and weights are fp32; bf16 KV on a level with
// bf16 dot products has its own code (attention_pairs.h). int8 KV is widened to bf16 tile by tile, or
// multiplied as bytes (attention_bytes.h). A key that a row does not see never enters its arithmetic.
#pragma once

#include <math.h>

#include "gemm.h"
#include "rows.h"

namespace diptych::cpu {
namespace {

constexpr int kTilePanels = kTile / kPanel;

template <class E>
struct Format {
  using Tile = E;   // what keys and values are multiplied as
  static constexpr bool kScaled = false, kBytes = false;
  static constexpr int64_t kUnit = 1;  // keys that lie side by side in V
  static constexpr bool kDot = false;  // as pairs, by attention_pairs.h
};
template <>
struct Format<BF16> {
  using Tile = BF16;
  static constexpr bool kScaled = false, kBytes = false;
  static constexpr int64_t kUnit = 2;
  static constexpr bool kDot = Vec::kBf16Dot;
};
template <>
struct Format<I8> : Format<BF16> {
  static constexpr bool kScaled = true, kBytes = Vec::kByteDot;
  static constexpr bool kDot = false;
};
static_assert(Vec::kByteDot || !Vec::kBf16Dot, "int8 KV is widened for products of floats only");

// The running softmax of some rows: acc / sum is the result over the keys seen so far.
struct Softmax {
  float *acc, *largest, *sum;  // [rows, dim], [rows], [rows]
};

struct TilePlace {
  const char* panels[kTilePanels];  // null: nobody sees a key of it
  const char* values[kTile];        // per key or pair of keys
};

// Where a tile's pieces (kPanel keys of one head, or their values) lie in the pool.
struct Pieces {
  const char *keys[kTilePanels], *values[kTilePanels];

  Pieces moved(int64_t bytes) const {
    Pieces to;
    for (int p = 0; p < kTilePanels; ++p)
      to.keys[p] = keys[p] + bytes, to.values[p] = values[p] + bytes;
    return to;
  }
};

struct Workspace {
  void* q;                  // [rows, q_stride] scaled: floats or pairs of bf16
  int64_t q_stride;
  float* scores;            // [kRows, kTile]
  uint32_t* weights;        // [kRows, kTile / 2] pairs of bf16, or bytes, where values are multiplied so
  float* alpha;             // [kRows] by which a tile's values shrink what came before them
  Softmax split, total;
  // Of pairs (attention_pairs.h): [rows, W], [rows, start_lanes], [rows].
  float *sums, *starts, *limits;
  int64_t start_lanes;
  float* tile_memory;       // of attention_tiles.h
  int64_t *low, *high;      // [rows]: the keys that a row sees, [low, high)
  TilePlace* place;                 // of the tile
  // Memory is asked for what comes next while a tile is computed: pieces of one sequence lie anywhere,
  // and what hardware follows ends with each. Where that is done already `ahead` is the tile's own.
  const Pieces* ahead;              // of pairs and bytes
  uint16_t* wide;                   // int8: [2, kTile, dim] keys and values of the tile as bf16
  float *k_scales, *v_scales;       // int8: [kTile]
  // Byte products (attention_bytes.h): q and weights are two rows of bytes per row.
  char *key_bytes, *value_bytes;     // of the tile
  float *q_steps, *steps;            // scales of [rows] queries, of the tile's [kRows] weights
  int32_t* q_sums;                   // [rows, 2]: where sums begin
};

struct Range {
  int64_t low, high;
};

inline Range row_range(const Workspace& w, int64_t r, int64_t base) {  // inside the tile
  const int64_t low = w.low[r] > base ? w.low[r] - base : 0;
  const int64_t high = w.high[r] - base < kTile ? w.high[r] - base : kTile;
  return low < high ? Range{low, high} : Range{0, 0};
}

inline bool sees_any(const Workspace& w, int64_t r, int64_t base) {
  const Range range = row_range(w, r, base);
  return range.low < range.high;
}

// The keys that all of `rows` rows see, in whole units; empty or less where there are none.
template <class RangeOf>
inline __attribute__((always_inline)) Range shared_keys(int64_t rows, int64_t unit, RangeOf range_of) {
  Range shared{0, kTile};
  for (int64_t r = 0; r < rows; ++r) {
    const Range range = range_of(r);
    shared.low = range.low > shared.low ? range.low : shared.low;
    shared.high = range.high < shared.high ? range.high : shared.high;
  }
  return {round_up(shared.low, unit), shared.high / unit * unit};
}

// R rows against P panels.
template <class E, int R, int P>
void score_tile(const Workspace& w, int64_t first, int64_t dim) {
  constexpr int V = P * kVecs;
  const auto* q = static_cast<const float*>(w.q);
  const typename E::Raw* panels[P];
  for (int p = 0; p < P; ++p)
    panels[p] = reinterpret_cast<const typename E::Raw*>(w.place->panels[first + p]);
  F acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = Vec::set1(0.0f);
  }
  const int64_t steps = dim / Format<E>::kUnit;
  for (int64_t s = 0; s < steps; ++s) {
    tile_step<E, R, V>(acc, q, w.q_stride, s,
                       [&](int p) { return panels[p] + s * Operand<E>::kRawPerStep; });
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* out = w.scores + r * kTile + first * kPanel;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) Vec::store(out + v * Vec::W, acc[r][v]);
  }
}

template <class E, int R = Vec::kRows>
void score_rows(const Workspace& w, int64_t count, bool all, int64_t dim) {
  if constexpr (R > 1) {
    if (count < R) return score_rows<E, R - 1>(w, count, all, dim);
  }
  if constexpr (Vec::kPanels >= kTilePanels) {
    if (all) return score_tile<E, R, kTilePanels>(w, 0, dim);
  }
  for (int p = 0; p < kTilePanels; ++p) {
    if (w.place->panels[p] != nullptr) score_tile<E, R, 1>(w, p, dim);
  }
}

// acc[r][v] += the values of step s of the tile (one key, or two), weighted, for V vectors of columns
// from d on; `halves`: which of the two count.
template <class E, int R, int V>
inline __attribute__((always_inline)) void weigh_step(F (&acc)[R][V], const Workspace& w,
                                                      int64_t row, int64_t s, int64_t d,
                                                      int columns, int halves) {
  constexpr int64_t unit = Format<E>::kUnit;
  const auto* value = reinterpret_cast<const typename E::Raw*>(w.place->values[s]) + d * unit;
#pragma GCC unroll 2
  for (int half = 0; half < unit; ++half) {
    if (unit == 2 && (halves & 1 << half) == 0) continue;
    F x[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const auto* at = value + v * Vec::W * unit;
      if constexpr (unit == 1) {
        x[v] = columns < Vec::W ? Vec::load_as_n<E>(at, columns) : Vec::load_as<E>(at);
      } else {
        const auto* floats = reinterpret_cast<const float*>(at);
        if (R > 1) floats = load_again(floats);
        const F pairs = columns < Vec::W ? Vec::load_n(floats, columns) : Vec::load(floats);
        x[v] = half == 0 ? Vec::first_of_pairs(pairs) : Vec::second_of_pairs(pairs);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F weight = Vec::set1(w.scores[(row + r) * kTile + unit * s + half]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::fma(weight, x[v], acc[r][v]);
    }
  }
}

// Keys [range.low, range.high) of the tile, in order, for R rows and V vectors of columns. SHRINK: the
// accumulators are multiplied by w.alpha on the way, which is 1 for most: cheaper than a branch.
template <class E, int R, int V, bool SHRINK>
void weigh_columns(const Workspace& w, int64_t row, Range range, int64_t d, int columns,
                   int64_t dim) {
  constexpr int64_t unit = Format<E>::kUnit;
  F acc[R][V];
  float* out = w.split.acc + row * dim + d;
  const bool whole = columns >= Vec::W;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      acc[r][v] = whole ? Vec::load(out + r * dim + v * Vec::W) : Vec::load_n(out + r * dim, columns);
      if constexpr (SHRINK) acc[r][v] = acc[r][v] * Vec::set1(w.alpha[r]);
    }
  }
  int64_t s = range.low / unit;
  const int64_t end = range.high / unit;
  if (range.low % unit != 0) {
    const int halves = range.high > range.low ? 2 : 0;
    weigh_step<E, R, V>(acc, w, row, s, d, columns, halves);
    ++s;
  }
  if (whole) {
    for (; s < end; ++s) weigh_step<E, R, V>(acc, w, row, s, d, Vec::W, 3);
  } else {
    for (; s < end; ++s) weigh_step<E, R, V>(acc, w, row, s, d, columns, 3);
  }
  if (range.high % unit != 0 && s == end) weigh_step<E, R, V>(acc, w, row, s, d, columns, 1);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      if (whole) {
        Vec::store(out + r * dim + v * Vec::W, acc[r][v]);
      } else {
        Vec::store_n(out + r * dim, acc[r][v], columns);
      }
    }
  }
}

template <class E, int R, bool SHRINK = false>
void weigh_rows(const Workspace& w, int64_t row, Range range, int64_t dim) {
  constexpr int V = Vec::W == 16 ? 4 : 2;
  if (range.low >= range.high) return;
  int64_t d = 0;
  for (; d + V * Vec::W <= dim; d += V * Vec::W)
    weigh_columns<E, R, V, SHRINK>(w, row, range, d, Vec::W, dim);
  for (; d + Vec::W <= dim; d += Vec::W) weigh_columns<E, R, 1, SHRINK>(w, row, range, d, Vec::W, dim);
  if (d < dim) weigh_columns<E, R, 1, SHRINK>(w, row, range, d, static_cast<int>(dim - d), dim);
}

template <class E, bool SHRINK = false, int R = Vec::kRows>
void weigh_shared(const Workspace& w, int64_t count, Range range, int64_t dim) {
  if constexpr (R > 1) {
    if (count < R) return weigh_shared<E, SHRINK, R - 1>(w, count, range, dim);
  }
  weigh_rows<E, R, SHRINK>(w, 0, range, dim);
}

// At most kRows rows. Those whose ranges differ a little share the pairs that all of them see; each
// row still adds its keys in order.
template <class E>
void weigh_values(const Workspace& w, int64_t rows, int64_t base, int64_t dim) {
  const Range common = shared_keys(rows, Format<E>::kUnit,
                                   [&](int64_t i) { return row_range(w, i, base); });
  if (common.low >= common.high) {
    for (int64_t i = 0; i < rows; ++i) weigh_rows<E, 1>(w, i, row_range(w, i, base), dim);
    return;
  }
  for (int64_t i = 0; i < rows; ++i)
    weigh_rows<E, 1>(w, i, {row_range(w, i, base).low, common.low}, dim);
  weigh_shared<E>(w, rows, common, dim);
  for (int64_t i = 0; i < rows; ++i)
    weigh_rows<E, 1>(w, i, {common.high, row_range(w, i, base).high}, dim);
}

}  // namespace
}  // namespace diptych::cpu
