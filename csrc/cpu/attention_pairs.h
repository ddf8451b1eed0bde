// bf16 KV on levels with bf16 dot products: a few rows against one tile, scores never leaving registers.
//
// Queries and the softmax's weights are rounded to bf16. A row's weights are powers of two of what
// its scores lie above a reference of its own, which is raised only where a score exceeds it by more
// than kSlack: weights of up to 2^kSlack do no harm, and what came before is hardly ever scaled.
// Scores start at minus the reference, so that a sum of products is the power at once. Sums of
// weights stay apart per lane until the split ends.
// Invariant: what happens to a row is decided by its own scores and its own range of keys. A row that
// sees all of a tile gets the same bits with and without FULL; a key that a row does not see never
// enters its arithmetic: its weight is 0 whatever its score is, and its value is not multiplied.
#pragma once

#include "attention_tile.h"

namespace diptych::cpu {
namespace {

struct Pairs {
  // out = x * scale, n values of bf16.
  static void round_scaled(uint16_t* out, const float* x, F scale, int64_t n);
  // The splits of `rows` rows begin: nothing is seen.
  static void reset(const Workspace& w, int64_t rows);
  // All rows of one head against one tile, a few at a time.
  static void add_tile(const Workspace& w, const Pieces& here, int64_t rows, int64_t base, int64_t dim);
  // The splits end: their sums and maxima are what merge_rows expects.
  static void finish(const Workspace& w, int64_t rows);
};

#ifdef __AVX512BF16__
constexpr float kSlack = 8.0f;
constexpr int kTilePairs = kTile / 2, kPanelPairs = kPanel / 2;

// Up to kRows rows of one head, and the running softmax that is theirs alone.
struct PairRows {
  const uint32_t* q;  // [rows, dim / 2]
  float* acc;         // [rows, dim]
  float* sums;        // [rows, W] of weights
  float* starts;      // [rows] minus the reference; 0 as long as it has seen nothing
  float* limits;      // [rows] a score above it raises the reference: kSlack, or -inf at first
  float* scores;      // [kRows, kTile]
  uint32_t* weights;  // [kRows, kTilePairs]
  const TilePlace* place;
  const Pieces* ahead;
  Range range[Vec::kRows];  // of the keys that each sees, where one does not see all
};

inline uint64_t keys_of(Range range) {
  const uint64_t below = range.high >= 64 ? ~uint64_t{0} : (uint64_t{1} << range.high) - 1;
  return range.low >= range.high ? 0 : below & (~uint64_t{0} << range.low);
}

// Rows of which a score, or the first, lies too high: their reference becomes the largest of these
// scores.
template <int R>
__attribute__((noinline)) void raise(const PairRows& w, int columns, int64_t dim) {
  static_assert(R <= 8);
  F rows[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    const float* s = w.scores + (r < R ? r : 0) * kTile;
    rows[r] = Vec::load(s);
    for (int j = Vec::W; j < columns; j += Vec::W) rows[r] = Vec::max(Vec::load(s + j), rows[r]);
  }
  const F tops = Vec::tops(rows), limits = Vec::load_n(w.limits, R);
  const unsigned fresh = Vec::mask_equal(limits, Vec::set1(-INFINITY));
  const unsigned raised = Vec::mask_above(tops, limits) & ((1u << R) - 1);
  alignas(64) float up[Vec::W], factors[Vec::W];
  Vec::store(up, tops);
  Vec::store(factors, exp2_vec(Vec::set1(0.0f) - tops));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (!(raised >> r & 1)) continue;
    float* s = w.scores + r * kTile;
    const F top = Vec::set1(up[r]);
    for (int j = 0; j < columns; j += Vec::W) Vec::store(s + j, Vec::load(s + j) - top);
    w.starts[r] -= up[r];
    w.limits[r] = kSlack;
    if (fresh >> r & 1) continue;
    const F factor = Vec::set1(factors[r]);
    Vec::store(w.sums + r * Vec::W, Vec::load(w.sums + r * Vec::W) * factor);
    float* acc = w.acc + r * dim;
    each_vec(dim, [&](int64_t i, int n) {
      Vec::store_n(acc + i, Vec::load_n(acc + i, n) * factor, n);
    });
  }
}

// The weights of R rows for P panels from `first` on. FULL: each row sees all of them.
template <int R, int P, int DIM, bool FULL>
inline __attribute__((always_inline)) void weights_of(const PairRows& w, int first, int64_t any_dim) {
  const int64_t dim = DIM > 0 ? DIM : any_dim, steps = dim / 2;
  const uint16_t* panels[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    panels[p] = reinterpret_cast<const uint16_t*>(w.place->panels[first + p]);
  F acc[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) acc[r][p] = Vec::set1(w.starts[r]);
  }
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(w.ahead->keys[first + p] + s * 4 * kPanel);
      if constexpr (!FULL) __builtin_prefetch(w.ahead->values[first + p] + s * 4 * kPanel);
    }
    tile_step<BF16Pairs, R, P>(acc, w.q, steps, s, [&](int p) { return panels[p] + s * 2 * kPanel; });
  }
  uint64_t seen[R];
  if constexpr (!FULL) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      seen[r] = keys_of(w.range[r]) >> (first * kPanel);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
        acc[r][p] = Vec::select(static_cast<unsigned>(seen[r] >> (p * kPanel)) & 0xffff, acc[r][p],
                                Vec::set1(-INFINITY));
    }
  }
  unsigned above = 0;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    F top = acc[r][0];
#pragma GCC unroll 4
    for (int p = 1; p < P; ++p) top = Vec::max(acc[r][p], top);
    above |= Vec::mask_above(top, Vec::set1(w.limits[r]));
  }
  if (__builtin_expect(above != 0, 0)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) Vec::store(w.scores + r * kTile + p * kPanel, acc[r][p]);
    }
    raise<R>(w, P * kPanel, dim);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) acc[r][p] = Vec::load(w.scores + r * kTile + p * kPanel);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    F sum = Vec::load(w.sums + r * Vec::W), part[P / 2];
#pragma GCC unroll 4
    for (int p = 0; p < P; p += 2) {
      F a = Vec::exp2_pair(acc[r][p]), b = Vec::exp2_pair(acc[r][p + 1]);
      if constexpr (!FULL) {
        const F nothing = Vec::set1(0.0f);
        a = Vec::select(static_cast<unsigned>(seen[r] >> (p * kPanel)) & 0xffff, a, nothing);
        b = Vec::select(static_cast<unsigned>(seen[r] >> ((p + 1) * kPanel)) & 0xffff, b, nothing);
      }
      part[p / 2] = a + b;
      Vec::store_bf16(w.weights + r * kTilePairs + (first + p) * kPanelPairs, a, b);
    }
    Vec::store(w.sums + r * Vec::W, sum + (P == 4 ? part[0] + part[P / 2 - 1] : part[0]));
  }
}

// V vectors of columns from d on, of which the last has `lanes`.
template <int R, int V>
struct Values {
  F acc[R][V];
  const PairRows& w;
  float* out;
  int64_t dim, d;
  int lanes;

  inline __attribute__((always_inline)) Values(const PairRows& rows, int64_t dim, int64_t d, int lanes)
      : w(rows), out(rows.acc + d), dim(dim), d(d), lanes(lanes) {
    each([&](int r, int v) {
      const float* at = out + r * dim + v * Vec::W;
      acc[r][v] = lanes < Vec::W ? Vec::load_n(at, lanes) : Vec::load(at);
    });
  }

  inline __attribute__((always_inline)) void store() {
    each([&](int r, int v) {
      float* at = out + r * dim + v * Vec::W;
      lanes < Vec::W ? Vec::store_n(at, acc[r][v], lanes) : Vec::store(at, acc[r][v]);
    });
  }

  // All rows and the pair of keys s of the tile, whose values are at `at`.
  inline __attribute__((always_inline)) void add(int64_t s, const char* at) {
    const auto* pairs = reinterpret_cast<const float*>(at) + d;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const F x = lanes < Vec::W ? Vec::load_n(pairs + v * Vec::W, lanes) : Vec::load(pairs + v * Vec::W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        acc[r][v] = Vec::dot_pairs(acc[r][v], w.weights[r * kTilePairs + s], x);
    }
  }

  // Row r and the keys [range.low, range.high).
  inline __attribute__((always_inline)) void add_row(F (&sums)[V], int r, Range range) {
    for (int64_t key = range.low; key < range.high;) {
      const bool second = key % 2 != 0, both = !second && key + 2 <= range.high;
      const uint32_t mask = both ? ~0u : second ? 0xffff0000u : 0xffffu;
      const auto* pairs = reinterpret_cast<const float*>(w.place->values[key / 2]) + d;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const F x = lanes < Vec::W ? Vec::load_n(pairs + v * Vec::W, lanes) : Vec::load(pairs + v * Vec::W);
        sums[v] = Vec::dot_pairs(sums[v], w.weights[r * kTilePairs + key / 2], Vec::and_bits(x, mask));
      }
      key += both ? 2 : 1;
    }
  }

  template <class Fn>
  static inline __attribute__((always_inline)) void each(Fn fn) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) fn(r, v);
    }
  }
};

// Adds the tile's weighted values to V vectors of columns. FULL: each row sees all of it.
template <int R, int V, bool FULL>
inline __attribute__((always_inline)) void add_values(const PairRows& w, int64_t d, int lanes,
                                                      int64_t dim) {
  Values<R, V> sums(w, dim, d, lanes);
  if constexpr (FULL) {
    for (int64_t p = 0; p < kTilePanels; ++p) {
      const char *at = w.place->values[p * kPanelPairs], *next = w.ahead->values[p] + d * 4;
#pragma GCC unroll 2
      for (int64_t i = 0; i < kPanelPairs; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) __builtin_prefetch(next + i * dim * 4 + v * Vec::W * 4);
        sums.add(p * kPanelPairs + i, at + i * dim * 4);
      }
    }
  } else {
    // The pairs that all rows see are shared; each row still adds its keys in order.
    const Range common = shared_keys(R, 2, [&](int64_t r) { return w.range[r]; });
    const bool shared = common.low < common.high;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      sums.add_row(sums.acc[r], r, {w.range[r].low, shared ? common.low : w.range[r].high});
    for (int64_t s = common.low / 2; s < common.high / 2; ++s) sums.add(s, w.place->values[s]);
    if (shared) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums.add_row(sums.acc[r], r, {common.high, w.range[r].high});
    }
  }
  sums.store();
}

template <int R, int DIM, bool FULL>
void attend_rows(const PairRows& w, int64_t any_dim) {
  const int64_t dim = DIM > 0 ? DIM : any_dim;
  if constexpr (FULL) {
    weights_of<R, kTilePanels, DIM, true>(w, 0, dim);
  } else {
    int64_t low = kTile, high = 0;
    for (const Range* range = w.range; range < w.range + R; ++range) {
      if (range->low >= range->high) continue;
      low = range->low < low ? range->low : low;
      high = range->high > high ? range->high : high;
    }
    if (low >= high) return;
    if (high <= kTile / 2) {
      weights_of<R, kTilePanels / 2, DIM, false>(w, 0, dim);
    } else if (low >= kTile / 2) {
      weights_of<R, kTilePanels / 2, DIM, false>(w, kTilePanels / 2, dim);
    } else {
      weights_of<R, kTilePanels, DIM, false>(w, 0, dim);
    }
  }
  int64_t d = 0;
  for (; d + 4 * Vec::W <= dim; d += 4 * Vec::W) add_values<R, 4, FULL>(w, d, Vec::W, dim);
  if constexpr (DIM == 0) {
    for (; d < dim; d += Vec::W)
      add_values<R, 1, FULL>(w, d, dim - d < Vec::W ? static_cast<int>(dim - d) : Vec::W, dim);
  }
}

// `count` rows, at most kRows.
template <bool FULL, int R = Vec::kRows>
void attend_some(const PairRows& w, int64_t count, int64_t dim) {
  if constexpr (R > 1) {
    if (count < R) return attend_some<FULL, R - 1>(w, count, dim);
  }
  if (dim == 64) return attend_rows<R, 64, FULL>(w, dim);
  if (dim == 128) return attend_rows<R, 128, FULL>(w, dim);
  attend_rows<R, 0, FULL>(w, dim);
}

void Pairs::round_scaled(uint16_t* out, const float* x, F scale, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * Vec::W <= n; i += 2 * Vec::W)
    Vec::store_bf16(reinterpret_cast<uint32_t*>(out + i), Vec::load(x + i) * scale,
                    Vec::load(x + i + Vec::W) * scale);
  for (; i < n; i += Vec::W) {
    alignas(64) uint16_t some[2 * Vec::W];
    const int left = n - i < Vec::W ? static_cast<int>(n - i) : Vec::W;
    Vec::store_bf16(some, Vec::load_n(x + i, left) * scale);
    memcpy(out + i, some, static_cast<size_t>(left) * sizeof some[0]);
  }
}

void Pairs::add_tile(const Workspace& w, const Pieces& here, int64_t rows, int64_t base,
                     int64_t dim) {
  const char* any = nullptr;  // in place of panels that nobody sees
  for (const char* panel : w.place->panels) any = panel != nullptr ? panel : any;
  for (const char*& panel : w.place->panels) panel = panel != nullptr ? panel : any;
  const int64_t calls = (rows + Vec::kRows - 1) / Vec::kRows, each = (rows + calls - 1) / calls;
  for (int64_t r = 0; r < rows; r += each) {
    const int64_t count = rows - r < each ? rows - r : each;
    PairRows some{static_cast<const uint32_t*>(w.q) + r * (dim / 2), w.split.acc + r * dim,
                  w.sums + r * Vec::W, w.starts + r, w.limits + r, w.scores, w.weights, w.place,
                  r + each < rows ? &here : w.ahead, {}};
    // Both ends of a row's range grow with the row.
    if (w.low[r + count - 1] <= base && w.high[r] >= base + kTile) {
      attend_some<true>(some, count, dim);
    } else {
      for (int64_t i = 0; i < count; ++i) some.range[i] = row_range(w, r + i, base);
      attend_some<false>(some, count, dim);
    }
  }
}

void Pairs::reset(const Workspace& w, int64_t rows) {
  memset(w.sums, 0, static_cast<size_t>(rows * Vec::W) * 4);
  memset(w.starts, 0, static_cast<size_t>(rows * w.start_lanes) * 4);
  for (int64_t r = 0; r < rows; ++r) w.limits[r] = -INFINITY;
}

void Pairs::finish(const Workspace& w, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    w.split.sum[r] = Vec::sum(Vec::load(w.sums + r * Vec::W));
    w.split.largest[r] = 0.0f - w.starts[r * w.start_lanes];
  }
}
#endif

}  // namespace
}  // namespace diptych::cpu
