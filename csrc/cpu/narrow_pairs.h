// Linear layers of int8 or int4 weights over bf16 activations, for processors that multiply pairs of
// bf16 at the rate of bytes: half the multiplications of sixteen-bit integers (integers.h).
//
// The integers are widened to bf16 as they are, which is exact. int8: one fp32 accumulator per output,
// scaled in the end. int4: sums of one group of inputs are fp32 accumulators, which are added, scaled,
// to a row's sum, group after group. One tile of rows widens in registers; of more rows the first tile
// keeps what it widened, piece by piece, in a cache for the others; for many rows int8 is widened before
// the first. Invariant: an output takes the same products and groups in the same order in all these
// ways, so its bits do not depend on the rows and columns computed beside it.
#pragma once

#include "cut.h"
#include "gemm.h"
#include "widening.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kNarrowPieceFewRows = 256;    // inputs of an item widened at once: first cache
constexpr int64_t kNarrowPieceManyRows = 2048;  // second cache
constexpr int64_t kNarrowFewRows = 32;          // of an item

// Some rows against some panels: what one tile works on.
struct NarrowTile {
  const uint32_t* x;  // first row, pairs
  int64_t x_stride;
  const uint8_t* w;  // first panel
  int64_t panel_stride;  // bytes
  int64_t inputs, group;
  const float* scales;    // int8: of the first column
  const uint16_t* steps;  // int4: of the first panel and group
  int64_t steps_stride;   // int4: between panels
  const float* bias;      // of the first column, or null
  float* out;             // first row and column
  int64_t out_stride, columns;  // valid columns from the first one on
  bool accumulate;              // to what is in `out`
  int64_t ahead = 0;  // packed panels: bytes from what is read to what is to be fetched
  Ahead share = {};   // wide and kept panels: to be fetched meanwhile
  uint8_t* kept = nullptr;  // of the first panel
  int64_t kept_stride = 0;  // bytes between panels

  int lanes(int panel) const {
    const int64_t left = columns - panel * kPanel;
    return left < kPanel ? static_cast<int>(left < 0 ? 0 : left) : kPanel;
  }
};

// acc[r][p] += the products of inputs [begin, end).
template <class Source, int R, int P>
inline __attribute__((always_inline)) void add_pairs(F (&acc)[R][P], const NarrowTile& t,
                                                     const Source& source, Prefetch& prefetch,
                                                     int64_t begin, int64_t end) {
  constexpr int vectors = Source::kVectors;
  constexpr bool alone = vectors > 1 && !Source::kKeep;  // nobody else reads the panels
  const uint8_t* w = t.w + begin / vectors * (2 * kPanel);
  const uint32_t* x_end = t.x + end / 2;
  uint8_t* kept = t.kept + begin * (2 * kPanel);
  for (const uint32_t* x = t.x + begin / 2; x < x_end; x += vectors, w += kLine) {
    if constexpr (!alone) prefetch.step();
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      __m512i wide[vectors];
      if constexpr (alone) __builtin_prefetch(w + p * t.panel_stride + t.ahead, 0, 2);
      source.widen(w + p * t.panel_stride, wide);
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i) {
        if constexpr (Source::kKeep)
          _mm512_store_si512(kept + p * t.kept_stride + i * kLine, wide[i]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m512i pair = _mm512_set1_epi32(static_cast<int>(x[r * t.x_stride + i]));
          acc[r][p] = _mm512_dpbf16_ps(acc[r][p], (__m512bh)pair, (__m512bh)wide[i]);
        }
      }
    }
    kept += vectors * kLine;
  }
}

// y, scaled where there are scales to apply, plus bias, to its place.
inline void store_scaled(const NarrowTile& t, int64_t row, int panel, F y) {
  const int n = t.lanes(panel);
  float* out = t.out + row * t.out_stride + panel * kPanel;
  if (t.scales != nullptr) y = y * Vec::load_n(t.scales + panel * kPanel, n);
  if (t.bias != nullptr) y = y + Vec::load_n(t.bias + panel * kPanel, n);
  Vec::store_n(out, y, n);
}

template <int R, int P>
inline __attribute__((always_inline)) void clear(F (&acc)[R][P]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) acc[r][p] = Vec::set1(0.0f);
  }
}

// R rows against P panels of int8.
template <class Source, int R, int P>
__attribute__((noinline)) void whole_tile(const NarrowTile& t) {
  F acc[R][P];
  clear<R, P>(acc);
  for (int p = 0; t.accumulate && p < P; ++p) {
    for (int r = 0; r < R; ++r)
      acc[r][p] = Vec::load_n(t.out + r * t.out_stride + p * kPanel, t.lanes(p));
  }
  Prefetch prefetch(t.share.or_there(t.x), t.inputs / (2 * Source::kVectors));
  add_pairs<Source, R, P>(acc, t, Source(), prefetch, 0, t.inputs);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store_scaled(t, r, p, acc[r][p]);
  }
}

// The same of int4. The running sums stay in memory: registers are for the group's.
template <class Source, int R, int P>
__attribute__((noinline)) void grouped_tile(const NarrowTile& t) {
  alignas(64) float memory[R * P * kPanel];
  float* sums = memory;
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) {
      const float* out = t.out + r * t.out_stride + p * kPanel;
      Vec::store(sums + (r * P + p) * kPanel,
                 t.accumulate ? Vec::load_n(out, t.lanes(p)) : Vec::set1(0.0f));
    }
  }
  const Source source;
  Prefetch prefetch(t.share.or_there(t.x), t.inputs / (2 * Source::kVectors));
  const uint16_t* steps = t.steps;
  for (int64_t k = 0; k < t.inputs; k += t.group, steps += kPanel) {
    asm volatile("" : "+r"(sums) : : "memory");  // not to be taken apart into registers
    F acc[R][P];
    clear<R, P>(acc);
    add_pairs<Source, R, P>(acc, t, source, prefetch, k, k + t.group);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const F scale = Vec::load_as<BF16>(steps + p * t.steps_stride);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* sum = sums + (r * P + p) * kPanel;
        Vec::store(sum, Vec::fma(scale, acc[r][p], Vec::load(sum)));
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) store_scaled(t, r, p, Vec::load(sums + (r * P + p) * kPanel));
  }
}

template <class Source, int P, int R = Vec::kRows>
void narrow_tile_rows(const NarrowTile& t, int64_t rows) {
  if constexpr (R > 1 && !Source::kKeep) {  // those have a full tile
    if (rows < R) return narrow_tile_rows<Source, P, R - 1>(t, rows);
  }
  if constexpr (P != 1 && P != Source::panels(R)) {
    __builtin_unreachable();
  } else if constexpr (Source::kVectors == 2) {
    whole_tile<Source, R, P>(t);
  } else {
    grouped_tile<Source, R, P>(t);
  }
}

// All `rows` rows against `panels` panels; `first` describes the first row and panel.
template <class Source>
void narrow_gemm(const NarrowTile& first, int64_t rows, int64_t panels) {
  NarrowTile t = first;
  const int64_t tiles = (rows + Vec::kRows - 1) / Vec::kRows;
  for (int64_t r = 0; r < rows; r += Vec::kRows) {
    const int64_t height = rows - r < Vec::kRows ? rows - r : Vec::kRows;
    const int64_t wide = Source::panels(height);
    for (int64_t p = 0; p < panels;) {
      t.x = first.x + r * first.x_stride;
      t.w = first.w + p * first.panel_stride;
      if (first.scales != nullptr) t.scales = first.scales + p * kPanel;
      if (first.steps != nullptr) t.steps = first.steps + p * first.steps_stride;
      if (first.bias != nullptr) t.bias = first.bias + p * kPanel;
      t.out = first.out + r * first.out_stride + p * kPanel;
      t.kept = first.kept + p * first.kept_stride;
      t.columns = first.columns - p * kPanel;
      t.share = p == 0 ? first.share.of_tile(r / Vec::kRows, tiles) : Ahead{};
      if (panels - p < wide) {
        narrow_tile_rows<Source, 1>(t, height);
        p += 1;
      } else if (wide == 2) {
        narrow_tile_rows<Source, 2>(t, height);
        p += 2;
      } else {
        narrow_tile_rows<Source, 4>(t, height);
        p += 4;
      }
    }
  }
}

// All that t describes of some panels, widened, to where they are kept.
template <class Source>
void widen_panels(const NarrowTile& t, int64_t panels) {
  constexpr int vectors = Source::kVectors;
  const Source source;
  for (int64_t p = 0; p < panels; ++p) {
    const uint8_t* w = t.w + p * t.panel_stride;
    uint8_t* kept = t.kept + p * t.kept_stride;
    uint8_t* const end = kept + t.inputs * (2 * kPanel);
    for (; kept < end; kept += vectors * kLine, w += kLine) {
      __m512i wide[vectors];
      source.widen(w, wide);
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i) _mm512_store_si512(kept + i * kLine, wide[i]);
    }
  }
}

struct NarrowJob {
  const LinearArgs& a;
  const uint32_t* x;
  int64_t x_stride;
  Cut cut;

  void part(const Place& place, int64_t panel, const Sums& sums, const Ahead& next) const {
    if (a.width == Width::kInt8) return part_of<Bytes>(place, panel, sums, next);
    part_of<Nibbles>(place, panel, sums, next);
  }

  template <class Source>
  void part_of(const Place& place, int64_t panel, const Sums& sums, const Ahead& next) const {
    const bool int8 = a.width == Width::kInt8;
    NarrowTile t;
    t.x = x + place.row * x_stride;
    t.x_stride = x_stride;
    t.panel_stride = panel_bytes(a);
    t.w = static_cast<const uint8_t*>(a.w) + panel * t.panel_stride;
    t.inputs = padded_inputs(a);
    t.group = int8 ? t.inputs : a.group;
    t.scales = int8 ? static_cast<const float*>(a.scales) + panel * kPanel : nullptr;
    t.steps_stride = t.inputs / t.group * kPanel;
    t.steps = int8 ? nullptr : static_cast<const uint16_t*>(a.scales) + panel * t.steps_stride;
    t.bias = a.bias == nullptr ? nullptr : a.bias + panel * kPanel;
    t.out = sums.at;
    t.out_stride = sums.stride;
    t.columns = sums.columns;
    t.accumulate = false;
    if (place.rows > Vec::kRows) {
      pieces<Source>(t, place.rows, place.panels, next);
      return;
    }
    t.ahead = next.data == nullptr ? kNearBytes : next.data - reinterpret_cast<const char*>(t.w);
    narrow_gemm<Source>(t, place.rows, place.panels);
  }

  // `next`: what is likely to be read after `whole`.
  template <class Source>
  void pieces(const NarrowTile& whole, int64_t rows, int64_t panels, const Ahead& next) const {
    constexpr bool int8 = Source::kVectors == 2;
    const int64_t longest = rows <= kNarrowFewRows ? kNarrowPieceFewRows : kNarrowPieceManyRows;
    const int64_t piece = whole.inputs < longest ? whole.inputs : longest;
    const int64_t wide_stride = piece * kPanel * 2;  // bytes
    auto* wide =
        static_cast<uint8_t*>(scratch(kScratchItem, static_cast<size_t>(panels * wide_stride)));
    for (int64_t k = 0; k < whole.inputs; k += piece) {
      const bool last = k + piece >= whole.inputs;
      NarrowTile t = whole;
      t.x += k / 2;
      t.w += k / Source::kVectors * (2 * kPanel);
      t.inputs = last ? whole.inputs - k : piece;
      t.kept = wide;
      t.kept_stride = wide_stride;
      t.accumulate = k > 0;
      if (!last) t.scales = nullptr, t.bias = nullptr;
      if (!int8) t.steps += k / t.group * kPanel;
      const int64_t line = next.lines * k / whole.inputs;
      t.share = {next.data + line * kLine,
                 next.lines * (k + t.inputs) / whole.inputs - line};
      int64_t done = 0;  // rows
      if (rows <= kNarrowFewRows || !int8) {
        done = Vec::kRows;
        const Ahead share = t.share;
        t.share = share.of_tile(0, (rows + Vec::kRows - 1) / Vec::kRows);
        narrow_gemm<Kept<Source>>(t, done, panels);
        t.share = {share.data + t.share.lines * kLine, share.lines - t.share.lines};
        t.x += done * t.x_stride;
        t.out += done * t.out_stride;
      } else {
        widen_panels<Source>(t, panels);
      }
      if constexpr (int8) {
        TileArgs<BF16Pairs> g;
        g.x = t.x;
        g.x_stride = t.x_stride;
        g.w = reinterpret_cast<const uint16_t*>(wide);
        g.panel_stride = wide_stride / 2;
        g.steps = t.inputs / 2;
        g.out = t.out;
        g.out_stride = t.out_stride;
        g.bias = t.bias;
        g.scales = t.scales;
        g.columns = t.columns;
        g.accumulate = t.accumulate;
        g.ahead = t.share;
        gemm<BF16Pairs>(g, rows - done, panels);
      } else {
        t.w = wide;
        t.panel_stride = wide_stride;
        narrow_gemm<Wide>(t, rows - done, panels);
      }
    }
  }
};

}  // namespace
}  // namespace diptych::cpu
