// The running softmax of rows of attention: its start, one tile's scores, and the merge of two parts.
//
// Pairs of bf16 keep theirs in registers (attention_pairs.h) and share the merge. Invariant: a row's
// maximum, sum and weights follow from its own scores in its own range of keys.
#pragma once

#include <math.h>

#include "attention_bytes.h"
#include "attention_tile.h"
#include "rows.h"

namespace diptych::cpu {
namespace {

void reset(const Softmax& s, int64_t rows, int64_t dim) {
  memset(s.acc, 0, static_cast<size_t>(rows * dim) * 4);
  for (int64_t r = 0; r < rows; ++r) {
    s.largest[r] = -INFINITY;
    s.sum[r] = 0.0f;
  }
}

void scale_row(float* row, float factor, int64_t dim) {
  const F f = Vec::set1(factor);
  each_vec(dim, [&](int64_t i, int n) { Vec::store_n(row + i, Vec::load_n(row + i, n) * f, n); });
}

// total (+) part. A row that has seen no key has sum 0; any other has at least 1 (or NaN).
void merge_rows(const Softmax& total, const Softmax& part, int64_t rows, int64_t dim) {
  alignas(64) float ours[Vec::W], theirs[Vec::W], tops[Vec::W];
  for (int64_t first = 0; first < rows; first += Vec::W) {
    const int n = rows - first < Vec::W ? static_cast<int>(rows - first) : Vec::W;
    const F before = Vec::load_n(total.largest + first, n),
            largest = Vec::load_n(part.largest + first, n), top = Vec::max(largest, before);
    Vec::store(tops, top);
    Vec::store(ours, exp2_vec(before - top));
    Vec::store(theirs, exp2_vec(largest - top));
    for (int i = 0; i < n; ++i) {
      const int64_t r = first + i;
      float* out = total.acc + r * dim;
      const float* acc = part.acc + r * dim;
      if (part.sum[r] == 0.0f) continue;
      if (total.sum[r] == 0.0f) {
        memcpy(out, acc, static_cast<size_t>(dim) * 4);
        total.largest[r] = part.largest[r];
        total.sum[r] = part.sum[r];
        continue;
      }
      const F a = Vec::set1(ours[i]), b = Vec::set1(theirs[i]);
      each_vec(dim, [&](int64_t d, int lanes) {
        Vec::store_n(out + d,
                     Vec::fma(Vec::load_n(acc + d, lanes), b, Vec::load_n(out + d, lanes) * a),
                     lanes);
      });
      total.sum[r] = total.sum[r] * ours[i] + part.sum[r] * theirs[i];
      total.largest[r] = tops[i];
    }
  }
}

// What a row does not see of the tile counts -inf; its running maximum follows.
inline void mask_row(float* s, Range range, const Softmax& state, int64_t r, float* before) {
  if (range.low > 0 || range.high < kTile) {
    for (int64_t j = 0; j < range.low; ++j) s[j] = -INFINITY;
    for (int64_t j = range.high; j < kTile; ++j) s[j] = -INFINITY;
  }
  F top = Vec::load(s);
  for (int j = Vec::W; j < kTile; j += Vec::W) top = Vec::max(Vec::load(s + j), top);
  const float tile_top = Vec::largest(top);
  *before = state.largest[r];
  state.largest[r] = tile_top > *before ? tile_top : *before;
}

// The scores of int8 keys are those of their integers until here.
inline void scale_scores(float* s, const float* scales) {
  for (int j = 0; j < kTile; j += Vec::W)
    Vec::store(s + j, Vec::load(s + j) * Vec::load(scales + j));
}

// The weight of a score: 2 to what it lies below the row's largest.
template <class E>
inline F weight_of(F below) {
  if constexpr (Format<E>::kBytes && Vec::kBf16Dot) {
    return Vec::exp2_short(below);
  } else {
    return exp2_vec(below);
  }
}

// softmax_rows for R rows that see the whole tile, where what has one value per row is computed for
// all of them at once; bits are the same.
template <class E, int R>
void softmax_full(const Workspace& w) {
  F rows[8];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* s = w.scores + r * kTile;
    rows[r] = Vec::load(s);
#pragma GCC unroll 4
    for (int j = Vec::W; j < kTile; j += Vec::W) rows[r] = Vec::max(Vec::load(s + j), rows[r]);
  }
#pragma GCC unroll 8
  for (int r = R; r < 8; ++r) rows[r] = rows[0];
  const F before = Vec::load_n(w.split.largest, R), after = Vec::max(Vec::tops(rows), before);
  const F alpha = exp2_vec(before - after);
  Vec::store_n(w.split.largest, after, R);
  Vec::store(w.alpha, alpha);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* s = w.scores + r * kTile;
    const F shift = Vec::set1(w.split.largest[r]);
    rows[r] = Vec::set1(0.0f);
#pragma GCC unroll 4
    for (int j = 0; j < kTile; j += Vec::W) {
      const F weight = weight_of<E>(Vec::load(s + j) - shift);
      rows[r] = rows[r] + weight;
      Vec::store(s + j, weight);
    }
  }
  Vec::store_n(w.split.sum, Vec::load_n(w.split.sum, R) * alpha + Vec::sums(rows), R);
}

template <class E, int R = Vec::kRows>
void softmax_full_rows(const Workspace& w, int64_t count) {
  if constexpr (R > 1) {
    if (count < R) return softmax_full_rows<E, R - 1>(w, count);
  }
  softmax_full<E, R>(w);
}

// Scores become weights, in place; maxima and sums follow. At most kRows rows. full: every row sees
// the whole tile. Accumulators follow too, or, with floats of a full tile, w.alpha says how.
template <class E>
void softmax_rows(const Workspace& w, int64_t rows, bool full, int64_t base, int64_t dim) {
  if constexpr (Vec::kManySums && !Format<E>::kScaled) {
    if (full) return softmax_full_rows<E>(w, rows);
  }
  alignas(64) float alpha[16] = {}, after[16] = {};
  static_assert(Vec::kRows <= 16 && 16 % Vec::W == 0);
  for (int64_t r = 0; r < rows; ++r) {
    const Range range = full ? Range{0, kTile} : row_range(w, r, base);
    if (range.low < range.high) {
      if constexpr (Format<E>::kScaled && !Format<E>::kBytes)
        scale_scores(w.scores + r * kTile, w.k_scales);
      mask_row(w.scores + r * kTile, range, w.split, r, &alpha[r]);
    }
    after[r] = w.split.largest[r];
  }
  for (int64_t r = 0; r < rows; r += Vec::W)
    Vec::store(alpha + r, exp2_vec(Vec::load(alpha + r) - Vec::load(after + r)));
  for (int64_t r = 0; r < rows; ++r) {
    if (!full && !sees_any(w, r, base)) continue;
    float* s = w.scores + r * kTile;
    const F shift = Vec::set1(after[r]);
    F sum = Vec::set1(0.0f);
#pragma GCC unroll 4
    for (int j = 0; j < kTile; j += Vec::W) {
      const F below = Vec::load(s + j) - shift;
      F weight = weight_of<E>(below);
      sum = sum + weight;
      if constexpr (Format<E>::kScaled) weight = weight * Vec::load(w.v_scales + j);
      Vec::store(s + j, weight);
    }
    if constexpr (Format<E>::kBytes)
      round_weights(w, r, full ? Range{0, kTile} : row_range(w, r, base));
    w.split.sum[r] = w.split.sum[r] * alpha[r] + Vec::sum(sum);
    if (full && !Format<E>::kBytes) {
      w.alpha[r] = alpha[r];
    } else if (alpha[r] != 1.0f) {
      scale_row(w.split.acc + r * dim, alpha[r], dim);
    }
  }
}

}  // namespace
}  // namespace diptych::cpu
