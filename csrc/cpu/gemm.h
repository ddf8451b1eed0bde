// The register-blocked GEMM tile that linear layers and attention share, templated on the level's
// Vec.
//
// Weights come in panels of 16 columns: fp32 and fp16 as [K][16], bf16 as [K/2][16][2] (K padded
// with zeros). Invariant: every output element is one accumulator that starts at zero (or, to go on
// over K, at what `out` holds) and takes its K products in order of k, for every tile shape; so its
// bits do not depend on how many rows or columns are computed beside it.
#pragma once

#include "ahead.h"
#include "kernels.h"

namespace diptych::cpu {
namespace {

using F = Vec::F;
#ifdef __AMX_BF16__
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
constexpr bool kPairs = kTiles || Vec::kBf16Dot;  // bf16 rows are multiplied as packed pairs
constexpr int kVecs = kPanel / Vec::W;  // vectors of one row of a panel
constexpr int kPanelsFew = Vec::kPanels > 1 ? Vec::kPanels / 2 : 1;  // of a tile in a small group

// What a row of activations looks like to the tile, and how many K steps (pairs for bf16) it has.
template <class E>
struct Operand {
  using Act = float;
  static int64_t steps(int64_t k) { return k; }
  static constexpr int kActsPerStep = 1;
  static constexpr int kRawPerStep = kPanel;
};
template <>
struct Operand<BF16> {
  using Act = float;  // values rounded to bf16
  static int64_t steps(int64_t k) { return (k + 1) / 2; }
  static constexpr int kActsPerStep = 2;
  static constexpr int kRawPerStep = 2 * kPanel;
};
struct BF16Pairs {  // BF16 weights against packed pairs of bf16 activations
  using Raw = uint16_t;
};
template <>
struct Operand<BF16Pairs> {
  using Act = uint32_t;
  static int64_t steps(int64_t k) { return (k + 1) / 2; }
  static constexpr int kActsPerStep = 1;
  static constexpr int kRawPerStep = 2 * kPanel;
};

template <class E>
struct TileArgs {
  const typename Operand<E>::Act* x;  // [rows, x_stride]
  int64_t x_stride;
  const typename E::Raw* w;  // first panel
  int64_t panel_stride;      // Raw elements
  int64_t steps;
  float* out;  // [rows, out_stride]
  int64_t out_stride;
  const float* bias;  // of the first column, or null
  int64_t columns;    // valid columns from the first one on
  bool accumulate = false;
  const float* scales = nullptr;  // of the first column: sums are multiplied, then the bias added
  Ahead ahead = {};   // to be fetched meanwhile
  bool near = false;  // without that: the weights come from memory, see kNearRowsMin
};

// One step of R rows of x against V vectors of weights; panel(p): step `s` of panel p.
template <class E, int R, int V, class Panel>
inline __attribute__((always_inline)) void tile_step(F (&acc)[R][V],
                                                     const typename Operand<E>::Act* rows,
                                                     int64_t x_stride, int64_t s, Panel panel) {
  if constexpr (sizeof(typename Operand<E>::Act) == 4 && Operand<E>::kRawPerStep == kPanel) {
    F wv[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) wv[v] = Vec::load_as<E>(panel(v / kVecs) + (v % kVecs) * Vec::W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F x = Vec::set1(rows[r * x_stride + s]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::fma(x, wv[v], acc[r][v]);
    }
  } else if constexpr (Operand<E>::kActsPerStep == 1) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const uint32_t* pairs =
          reinterpret_cast<const uint32_t*>(panel(v / kVecs) + (v % kVecs) * 2 * Vec::W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        acc[r][v] = Vec::dot_pairs(acc[r][v], rows[r * x_stride + s], pairs);
    }
  } else {
    // One half of the pairs after the other: registers are for accumulators.
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      F wv[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const auto* pairs =
            reinterpret_cast<const float*>(panel(v / kVecs) + (v % kVecs) * 2 * Vec::W);
        if (R > 1) pairs = load_again(pairs);
        wv[v] = half == 0 ? Vec::first_of_pairs(Vec::load(pairs)) : Vec::second_of_pairs(Vec::load(pairs));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const F x = Vec::set1(rows[r * x_stride + 2 * s + half]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] = Vec::fma(x, wv[v], acc[r][v]);
      }
    }
  }
}

// R rows x P panels.
template <class E, int R, int P>
void tile(const TileArgs<E>& a) {
  constexpr int V = P * kVecs;
  F acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = Vec::set1(0.0f);
  }
  if (a.accumulate) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = a.columns - v * Vec::W;
      if (left <= 0) break;
      const int n = left < Vec::W ? static_cast<int>(left) : Vec::W;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        acc[r][v] = Vec::load_n(a.out + r * a.out_stride + v * Vec::W, n);
    }
  }
  auto step = [&](int64_t s) __attribute__((always_inline)) {
    const typename E::Raw* w = a.w + s * Operand<E>::kRawPerStep;
    tile_step<E, R, V>(acc, a.x, a.x_stride, s, [&](int p) { return w + p * a.panel_stride; });
  };
  if (a.ahead.lines > 0) {
    Prefetch prefetch(a.ahead, a.steps);
    for (int64_t s = 0; s < a.steps; ++s) {
      prefetch.step();
      step(s);
    }
  } else if (a.near) {
    const typename E::Raw* w = a.w;
    for (int64_t s = 0; s < a.steps; ++s, w += Operand<E>::kRawPerStep) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
        __builtin_prefetch(reinterpret_cast<const char*>(w + p * a.panel_stride) + kNearBytes);
      step(s);
    }
  } else {
    for (int64_t s = 0; s < a.steps; ++s) step(s);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int64_t left = a.columns - v * Vec::W;
    if (left <= 0) break;
    const int n = left < Vec::W ? static_cast<int>(left) : Vec::W;
    const F bias = a.bias == nullptr ? Vec::set1(0.0f) : Vec::load_n(a.bias + v * Vec::W, n);
    const F scale = a.scales == nullptr ? bias : Vec::load_n(a.scales + v * Vec::W, n);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      F y = acc[r][v];
      if (a.scales != nullptr) y = y * scale;
      if (a.bias != nullptr) y = y + bias;
      Vec::store_n(a.out + r * a.out_stride + v * Vec::W, y, n);
    }
  }
}

template <class E, int P>
void tile_rows(const TileArgs<E>& a, int64_t rows) {
  switch (rows) {
    case 1:
      return tile<E, 1, P>(a);
    case 2:
      return tile<E, 2, P>(a);
    case 3:
      if constexpr (Vec::kRows >= 3) return tile<E, 3, P>(a);
      break;
    case 4:
      if constexpr (Vec::kRows >= 4) return tile<E, 4, P>(a);
      break;
    case 5:
      if constexpr (Vec::kRows >= 5) return tile<E, 5, P>(a);
      break;
    case 6:
      if constexpr (Vec::kRows >= 6) return tile<E, 6, P>(a);
      break;
  }
  __builtin_unreachable();
}

// All `rows` rows against `panels` panels; `a` describes the first row and panel.
template <class E>
void gemm(TileArgs<E> a, int64_t rows, int64_t panels) {
  const TileArgs<E> first = a;
  const int64_t tiles = (rows + Vec::kRows - 1) / Vec::kRows;
  const bool few = rows >= kNearRowsMin && rows < kAheadRowsMin;
  for (int64_t r = 0; r < rows; r += Vec::kRows) {
    const int64_t tile_height = rows - r < Vec::kRows ? rows - r : Vec::kRows;
    a.near = few && r == 0;
    int64_t p = 0;
    while (p < panels) {
      a.x = first.x + r * a.x_stride;
      a.w = first.w + p * a.panel_stride;
      a.out = first.out + r * a.out_stride + p * kPanel;
      a.bias = first.bias == nullptr ? nullptr : first.bias + p * kPanel;
      a.scales = first.scales == nullptr ? nullptr : first.scales + p * kPanel;
      a.columns = first.columns - p * kPanel;
      a.ahead = p == 0 ? first.ahead.of_tile(r / Vec::kRows, tiles) : Ahead{};
      const int64_t left = panels - p;
      if (tile_height == 1 && left >= Vec::kPanelsOne) {
        tile<E, 1, Vec::kPanelsOne>(a);
        p += Vec::kPanelsOne;
      } else if (left >= Vec::kPanels) {
        tile_rows<E, Vec::kPanels>(a, tile_height);
        p += Vec::kPanels;
      } else if (left >= kPanelsFew) {
        tile_rows<E, kPanelsFew>(a, tile_height);
        p += kPanelsFew;
      } else {
        tile_rows<E, 1>(a, tile_height);
        p += 1;
      }
    }
  }
}

}  // namespace
}  // namespace diptych::cpu

#ifdef __AMX_BF16__
#include "gemm_amx.h"
#endif
