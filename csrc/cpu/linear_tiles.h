// Linear layers of bf16 weights on AMX tiles.
//
// A work item takes its panels two at a time and goes through all its rows with them, 32 at once (up
// to 16 rows in all: four panels). The next panels are fetched into the second cache meanwhile, so
// that memory is read all the time. Sums that are more than stored (a bias, SiLU) are finished while the
// next block is multiplied, when vector units are free. An element's sum is one accumulator over all
// inputs: any cut gives the same bits.
#pragma once

#include "cut.h"
#include "gemm.h"
#include "widening.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kUnitRows = 2 * kTileRows;
constexpr int64_t kTileRowsPerItemMax = 512;
constexpr int64_t kTileRowBytesPerItem = 1280 << 10;  // of x, in the second cache

// Rows rounded to bf16 in blocks, as gemm_amx.h reads them.
struct TileRows {
  uint16_t* data;
  int64_t inputs;  // padded
  int64_t height;  // rows of a block; the last one may have fewer, and has room for all

  TileRows(void* memory, int64_t padded, int64_t rows)
      : data(static_cast<uint16_t*>(memory)), inputs(padded),
        height(rows < kTileRows ? rows : kTileRows) {}

  static size_t bytes(int64_t rows, int64_t padded) {
    return static_cast<size_t>((rows < kTileRows ? rows : round_up(rows, kTileRows)) * padded * 2);
  }
  // Where inputs [k, k + 32) of a row lie, for k a multiple of 32.
  uint16_t* at(int64_t row, int64_t k) const {
    return data + row / height * height * inputs + k * height + row % height * kPairInputs;
  }
};

struct TileRoundJob {
  const LinearArgs& a;
  TileRows to;

  static void item(void* context, int64_t row) {
    const auto& job = *static_cast<const TileRoundJob*>(context);
    const int64_t inputs = job.a.num_in;
    const float* x = row_of(job.a, row);
    auto* pairs = reinterpret_cast<uint32_t*>(job.to.at(row, 0));
    const int64_t step = job.to.height * kPairInputs / 2;
    int64_t k = 0;
    for (; k + kPairInputs <= inputs; k += kPairInputs, pairs += step)
      Vec::store_bf16(pairs, Vec::load(x + k), Vec::load(x + k + Vec::W));
    auto part = [&](int64_t from) {
      const int64_t n = inputs - from < 0 ? 0 : inputs - from;
      return Vec::load_n(x + from, static_cast<int>(n < Vec::W ? n : Vec::W));
    };
    for (; k < job.to.inputs; k += kPairInputs, pairs += step)
      Vec::store_bf16(pairs, part(k), part(k + Vec::W));
    if (job.a.width != Width::kInt4) return;  // see nibble_tiles.h
    for (k = 0; k < job.to.inputs; k += kPairInputs) Nibbles::order(job.to.at(row, k), kPairInputs);
  }
};

// Sums of a block that wait to become outputs, vector by vector.
struct TileSums {
  const LinearArgs& a;
  TileRows rounded;              // what becomes of `out` where the next layer takes it so
  const float* tiles = nullptr;  // of 16 rows b and panel p at b * stride + p, [16][16]
  int64_t stride = 0;
  int64_t row = 0, panel = 0;    // of the layer, first ones
  int64_t rows = 0, panels = 0;  // panels: of outputs
  int64_t next_row = 0, next_panel = 0;

  bool step() {
    if (next_row == rows) return false;
    one(next_row, next_panel);
    if (++next_panel == panels) next_panel = 0, ++next_row;
    return true;
  }
  void drain() {
    while (step()) continue;
  }

  void one(int64_t r, int64_t p) const {
    const float* sums = tiles + (r / kTileRows * stride + p) * kTileFloats + r % kTileRows * kPanel;
    const int64_t column = (panel + p) * kPanel, left = a.num_out - column;
    if (a.silu) {
      const int64_t inner = a.num_out / 2;
      const F gate = finished(sums, column, kPanel),
              up = finished(sums + stride / 2 * kTileFloats, inner + column, kPanel);
      if (a.rounded_out) return round(row + r, column, inner, silu_of(gate, up));
      Vec::store(a.out + (row + r) * inner + column, silu_of(gate, up));
    } else {
      const int n = left < kPanel ? static_cast<int>(left) : kPanel;
      float* out = a.out + (row + r) * a.num_out + column;
      const F y = finished(sums, column, n);
      Vec::store_n(out, a.add ? Vec::load_n(out, n) + y : y, n);
    }
  }

  void round(int64_t at_row, int64_t column, int64_t inner, F y) const {
    const int64_t half = column % kPairInputs;
    Vec::store_bf16(rounded.at(at_row, column - half) + half, y);
    if (column + kPanel < inner) return;
    for (int64_t c = inner; c < rounded.inputs; c += kPanel) {
      const int64_t rest = c % kPairInputs;
      Vec::store_bf16(rounded.at(at_row, c - rest) + rest, Vec::set1(0.0f));
    }
  }

  F finished(const float* sums, int64_t column, int n) const {
    const F y = Vec::load(sums);
    return a.bias == nullptr ? y : y + Vec::load_n(a.bias + column, n);
  }
};

// What is done beside the steps of a block: earlier sums are finished, and memory that is needed soon
// is asked for.
struct Meanwhile {
  TileSums& sums;
  const char* weights[2];  // two stretches of the next unit's
  int64_t lines, lines_a_step;  // of each
  const char* outputs = nullptr;  // two lines of each row that the block writes
  int64_t rows = 0, stride = 0;   // bytes

  inline __attribute__((always_inline)) void step() {
    sums.step();
    if (!sums.a.silu) sums.step();
    for (int64_t i = 0; i < lines_a_step && lines > 0; ++i, --lines) {
      __builtin_prefetch(weights[0], 0, 2);
      __builtin_prefetch(weights[1], 0, 2);
      weights[0] += kLine, weights[1] += kLine;
    }
    if (rows > 0) {
      __builtin_prefetch(outputs, 1, 3);
      __builtin_prefetch(outputs + kLine, 1, 3);
      outputs += stride, --rows;
    }
  }
};

struct TileJob {
  const LinearArgs& a;
  TileRows x;
  Cut cut;
  // A unit is what is multiplied at once: `panels` panels, of which `own` are of outputs, by up to
  // `most_rows` rows.
  const bool few = cut.rows <= kTileRows;
  const int panels = few ? 4 : 2, own = a.silu ? panels / 2 : panels;
  const int64_t most_rows = few ? kTileRows : kUnitRows;

  static void item(void* context, int64_t index) {
    const auto& job = *static_cast<const TileJob*>(context);
    const Place place = job.cut.place(index);
    const TileConfig config(job.x.height, 0);
    config.load();
    TileSums sums{job.a, job.rounded_out()};
    alignas(64) float memory[2][kUnitTiles * kTileFloats];
    int turn = 0;  // of the two memories
    for (int64_t p = 0; p < place.panels; p += job.own) {
      Meanwhile meanwhile = job.ahead(place, p, index, sums);
      job.unit(place, place.panel + p, meanwhile, memory, turn);
    }
    sums.drain();
    _tile_release();
  }

  TileRows rounded_out() const {
    return {a.out, a.rounded_out ? padded_inputs(*a.next) : kPairInputs, a.rows};
  }

  // The unit of weights that this thread is likely to read after the one at place.panel + p.
  Meanwhile ahead(const Place& place, int64_t p, int64_t index, TileSums& sums) const {
    int64_t panel = place.panel + p + own;
    if (p + own >= place.panels) {
      const int64_t next = index + num_threads();
      if (next >= cut.items) return {sums, {}, 0, 0};
      panel = cut.place(next).panel;
      if (panel == place.panel) return {sums, {}, 0, 0};
    }
    if (!fetches_ahead(a)) return {sums, {}, 0, 0};
    const int64_t bytes = panel_bytes(a), half = panels / 2;
    const int64_t lines = half * bytes / kLine;
    const auto* w = static_cast<const char*>(a.w) + panel * bytes;
    const int64_t second = a.silu ? cut.panels : half;
    const int64_t steps = x.inputs / kPairInputs * ((place.rows + most_rows - 1) / most_rows);
    return {sums, {w, w + second * bytes}, lines, (lines + steps - 1) / steps};
  }

  void unit(const Place& place, int64_t panel, Meanwhile& meanwhile,
            float (&memory)[2][kUnitTiles * kTileFloats], int& turn) const {
    const int64_t outputs = place.panel + place.panels - panel;  // panels that are left
    const bool stored = !a.silu && !a.add && a.bias == nullptr && outputs >= panels &&
                        (panel + panels) * kPanel <= a.num_out;
    TileUnit u{};
    u.x_step = x.height * kPairInputs;
    u.steps = x.inputs / kPairInputs;
    weights(panel, outputs, u.w);
    for (int64_t r = place.row; r < place.row + place.rows; r += most_rows) {
      const int64_t left = place.row + place.rows - r, rows = left < most_rows ? left : most_rows;
      const bool whole = stored && rows == most_rows;
      float* first = whole ? a.out + r * a.num_out + panel * kPanel : memory[turn];
      for (int i = 0; i < kUnitTiles; ++i) {
        u.sums[i] = whole ? first + i / panels * kTileRows * a.num_out + i % panels * kPanel
                          : first + i * kTileFloats;
      }
      u.stride = (whole ? a.num_out : kPanel) * 4;
      u.x[0] = x.at(r, 0);
      u.x[1] = rows > kTileRows ? x.at(r + kTileRows, 0) : nullptr;
      meanwhile.rows = whole || a.add ? rows : 0;
      meanwhile.outputs = reinterpret_cast<const char*>(a.out + r * a.num_out + panel * kPanel);
      meanwhile.stride = a.num_out * 4;
      multiply(u, meanwhile);
      meanwhile.sums.drain();
      if (whole) continue;
      meanwhile.sums.tiles = first, meanwhile.sums.stride = panels;
      meanwhile.sums.row = r, meanwhile.sums.rows = rows;
      meanwhile.sums.panel = panel, meanwhile.sums.panels = outputs < own ? outputs : own;
      meanwhile.sums.next_row = meanwhile.sums.next_panel = 0;
      turn ^= 1;
    }
  }

  void multiply(const TileUnit& u, Meanwhile& meanwhile) const {
    if (few) return multiply_unit<1, 4>(u, meanwhile);
    if (u.x[1] == nullptr) return multiply_unit<1, 2>(u, meanwhile);
    multiply_unit<2, 2>(u, meanwhile);
  }

  // The panels of a unit; those that the item does not have are the first one.
  void weights(int64_t first, int64_t outputs, const uint16_t* (&w)[kUnitTiles]) const {
    for (int p = 0; p < panels; ++p) {
      const int64_t panel = first + p % own + (p < own ? 0 : cut.panels);
      w[p] = p % own < outputs ? static_cast<const uint16_t*>(a.w) + panel * x.inputs * kPanel : w[0];
    }
  }
};

inline bool on_tiles(const LinearWeights& w) {
  return w.width == Width::kModel && w.dtype == DType::kBF16;
}

// Whether LinearArgs::add may be asked for.
inline bool adds_up(const LinearWeights& w) { return on_tiles(w); }

// Whether `to` may have its input from `from` (with a SiLU) rounded, in the same memory.
inline bool takes_rounded(const LinearWeights& to, const LinearWeights& from, int64_t rows) {
  return on_tiles(to) && on_tiles(from) &&
         TileRows::bytes(rows, padded_inputs(to)) <= static_cast<size_t>(rows * to.num_in * 4);
}

// Whether it may have rows of bf16 that lie as those of x do.
inline bool takes_rounded_rows(const LinearWeights&) { return false; }

inline void linear_tiles(const LinearArgs& a) {
  const int64_t padded = padded_inputs(a);
  void* memory = const_cast<float*>(a.x);
  if (!a.rounded_x) memory = scratch(kScratchCall, TileRows::bytes(a.rows, padded));
  const TileRows x(memory, padded, a.rows);
  TileRoundJob rounding{a, x};
  if (!a.rounded_x) round_rows(a, TileRoundJob::item, &rounding, true);
  const int64_t panels = panels_to_cut(a), fit = kTileRowBytesPerItem / (2 * padded);
  int64_t most = fit < kRowsPerItemMin ? kRowsPerItemMin
                                       : fit < kTileRowsPerItemMax ? fit : kTileRowsPerItemMax;
  most = rows_for_all(panels / kGroupPanels, most);
  TileJob job{a, x, {panels, a.rows, kGroupPanels, most, kUnitRows}};
  run_unless_small(job.cut.items, TileJob::item, &job, a.rows * a.num_out * a.num_in);
}

}  // namespace
}  // namespace diptych::cpu
