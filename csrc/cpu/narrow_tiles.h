// Linear layers of int8 and int4 weights on tiles: work items of integer_tiles.h and nibble_tiles.h.
#pragma once

#include "cut.h"
#include "integer_tiles.h"
#include "integers.h"
#include "linear_tiles.h"
#include "nibble_tiles.h"

namespace diptych::cpu {
namespace {

// Rows: fewer are as fast without tiles.
constexpr int64_t kTileRowsMin8 = 4, kTileRowsMin4 = 13;
constexpr int64_t kPanelsManyRows = 16;  // of an item
constexpr int64_t kNarrowRowsMax = 256;  // of an item; byte rows

struct ByteTileJob : IntegerJob {
  void part(const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) const {
    const IntegerTile t = tile(place, panel, sums, ahead);
    const int64_t byte_rows = place.rows * q.limbs;
    if (a.width == Width::kInt4) return nibbles(t, place.rows, place.panels);
    if (q.limbs == 1) return int8_on_tiles<1>(t, byte_rows, place.panels);
    int8_on_tiles<2>(t, byte_rows, place.panels);
  }

  static void nibbles(const IntegerTile& t, int64_t rows, int64_t panels) {
    nibbles_on_tiles<NibbleBytes>(
        {reinterpret_cast<const char*>(t.x), t.x_stride, rows, t.w, t.panel_stride, t.padded, t.steps,
         t.steps_stride, t.x_scales, t.bias, t.out, t.out_stride, t.columns, t.ahead},
        t.group, panels);
  }
};

// int4 over rows of bf16.
struct NibblePairsJob {
  const LinearArgs& a;
  TileRows x;
  Cut cut;

  void part(const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) const {
    const int64_t steps_stride = x.inputs / a.group * kPanel, bytes = panel_bytes(a);
    nibbles_on_tiles<NibblePairs>(
        {reinterpret_cast<const char*>(x.data) + place.row * x.inputs * 2, x.inputs * 2, place.rows,
         static_cast<const uint8_t*>(a.w) + panel * bytes, bytes, x.inputs,
         static_cast<const uint16_t*>(a.scales) + panel * steps_stride, steps_stride, nullptr,
         a.bias == nullptr ? nullptr : a.bias + panel * kPanel, sums.at, sums.stride, sums.columns,
         ahead, x.height},
        a.group, place.panels);
  }
};

inline Cut narrow_cut(const LinearArgs& a, int64_t limbs) {
  const int64_t panels = panels_to_cut(a), unit = 2 * kRowBlock / limbs;
  int64_t group_panels = kGroupPanels;
  if (a.rows > unit) {
    group_panels = kPanelsManyRows;
    while (group_panels > kGroupPanels && panels < 4 * num_threads() * group_panels) group_panels /= 2;
  }
  return {panels, a.rows, group_panels, kNarrowRowsMax / limbs, unit};
}

inline bool integers_want_tiles(const LinearArgs& a) {
  return a.rows >= (a.width == Width::kInt4 ? kTileRowsMin4 : kTileRowsMin8);
}

inline void integers_on_tiles(const LinearArgs& a, const IntegerRows& q) {
  ByteTileJob job{{a, q, narrow_cut(a, q.limbs)}};
  run_unless_small(job.cut.items, run_parts<ByteTileJob>, &job, a.rows * a.num_out * a.num_in);
}

inline void nibbles_by_pairs(const LinearArgs& a) {
  const int64_t padded = padded_inputs(a);
  const TileRows x(scratch(kScratchCall, TileRows::bytes(a.rows, padded)), padded, a.rows);
  TileRoundJob rounding{a, x};
  round_rows(a, TileRoundJob::item, &rounding, true);
  NibblePairsJob job{a, x, narrow_cut(a, 1)};
  run_unless_small(job.cut.items, run_parts<NibblePairsJob>, &job, a.rows * a.num_out * a.num_in);
}

}  // namespace
}  // namespace diptych::cpu
