// The bf16 GEMM on AMX tiles, included by gemm.h on the level that has them.
//
// One step multiplies up to 16 rows by a panel over 32 inputs. Rows come in blocks of 16 (the last
// one lower), each [K/32][rows of the block][32], so that a tile is one piece of memory. Invariant: an output element is one
// accumulator that takes its steps in order of k, whatever tiles lie around it; a tile row never
// meets another row. So its bits do not depend on the rows and columns computed beside it.
#pragma once

#include <immintrin.h>

namespace diptych::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kTileSteps = 16;  // pairs of inputs in one tile

// Accumulators 0..3, activations 4 and 5, weights 6 and 7. The upper pair of accumulators and tile
// 5 have `low` rows, the others `high`; a single row block has all four in `high` rows.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig(int64_t high, int64_t low) {
    const int64_t second = low > 0 ? low : high;
    const int64_t tile_rows[8] = {high, high, second, second, high, second, kTileRows, kTileRows};
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = static_cast<uint8_t>(tile_rows[i]);
    }
  }
};

struct TileRegion {  // where an accumulator starts and ends: out itself, or a copy of its part
  float* at;
  int64_t stride;  // bytes
};

constexpr int64_t kTileFloats = kTileRows * kPanel;

inline TileRegion open_region(const TileArgs<BF16Pairs>& a, int64_t row, int64_t rows,
                              int64_t panel, float* spare) {
  float* out = a.out + row * a.out_stride + panel * kPanel;
  const int64_t columns = a.columns - panel * kPanel;
  if (columns >= kPanel) return {out, a.out_stride * 4};
  for (int64_t r = 0; a.accumulate && r < rows; ++r)
    Vec::store(spare + r * kPanel, Vec::load_n(out + r * a.out_stride, static_cast<int>(columns)));
  return {spare, kPanel * 4};
}

inline void close_region(const TileArgs<BF16Pairs>& a, int64_t row, int64_t rows, int64_t panel,
                         const TileRegion& region) {
  float* out = a.out + row * a.out_stride + panel * kPanel;
  const int64_t left = a.columns - panel * kPanel;
  if (left >= kPanel && a.bias == nullptr) return;
  const int n = left < kPanel ? static_cast<int>(left) : kPanel;
  const F bias =
      a.bias == nullptr ? Vec::set1(0.0f) : Vec::load_n(a.bias + panel * kPanel, n);
  for (int64_t r = 0; r < rows; ++r) {
    const F y = Vec::load(reinterpret_cast<const float*>(
        reinterpret_cast<const char*>(region.at) + r * region.stride));
    Vec::store_n(out + r * a.out_stride, a.bias == nullptr ? y : y + bias, n);
  }
}

#define DIPTYCH_OPEN_TILE(tile, region)                     \
  if (a.accumulate) {                                       \
    _tile_loadd(tile, (region).at, (region).stride);        \
  } else {                                                  \
    _tile_zero(tile);                                       \
  }

// Rows [row, row + high) and the `low` rows after them, against panels `panel` and the next.
inline void tiles_two_by_two(const TileArgs<BF16Pairs>& a, int64_t row, int64_t high, int64_t low,
                             int64_t panel, float* spare) {
  const TileRegion r0 = open_region(a, row, high, panel, spare),
                   r1 = open_region(a, row, high, panel + 1, spare + kTileFloats),
                   r2 = open_region(a, row + high, low, panel, spare + 2 * kTileFloats),
                   r3 = open_region(a, row + high, low, panel + 1, spare + 3 * kTileFloats);
  DIPTYCH_OPEN_TILE(0, r0)
  DIPTYCH_OPEN_TILE(1, r1)
  DIPTYCH_OPEN_TILE(2, r2)
  DIPTYCH_OPEN_TILE(3, r3)
  const uint32_t* x = a.x + row * a.x_stride + a.first_step * high;
  const uint32_t* x_low = a.x + (row + high) * a.x_stride + a.first_step * low;
  const uint16_t* w = a.w + panel * a.panel_stride;
  for (int64_t s = 0; s < a.steps; s += kTileSteps) {
    _tile_loadd(4, x + s * high, 64);
    _tile_loadd(6, w + s * 2 * kPanel, 64);
    _tile_loadd(7, w + a.panel_stride + s * 2 * kPanel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x_low + s * low, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, r0.at, r0.stride);
  _tile_stored(1, r1.at, r1.stride);
  _tile_stored(2, r2.at, r2.stride);
  _tile_stored(3, r3.at, r3.stride);
  close_region(a, row, high, panel, r0);
  close_region(a, row, high, panel + 1, r1);
  close_region(a, row + high, low, panel, r2);
  close_region(a, row + high, low, panel + 1, r3);
}

// Up to 16 rows against four panels.
inline void tiles_four(const TileArgs<BF16Pairs>& a, int64_t row, int64_t rows, int64_t panel,
                       float* spare) {
  TileRegion r[4];
  for (int p = 0; p < 4; ++p)
    r[p] = open_region(a, row, rows, panel + p, spare + p * kTileFloats);
  DIPTYCH_OPEN_TILE(0, r[0])
  DIPTYCH_OPEN_TILE(1, r[1])
  DIPTYCH_OPEN_TILE(2, r[2])
  DIPTYCH_OPEN_TILE(3, r[3])
  const uint32_t* x = a.x + row * a.x_stride + a.first_step * rows;
  const uint16_t* w = a.w + panel * a.panel_stride;
  const int64_t next = a.panel_stride;
  for (int64_t s = 0; s < a.steps; s += kTileSteps, w += kTileSteps * 2 * kPanel) {
    _tile_loadd(4, x + s * rows, 64);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, w + 2 * next, 64);
    _tile_loadd(7, w + 3 * next, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, r[0].at, r[0].stride);
  _tile_stored(1, r[1].at, r[1].stride);
  _tile_stored(2, r[2].at, r[2].stride);
  _tile_stored(3, r[3].at, r[3].stride);
  for (int p = 0; p < 4; ++p) close_region(a, row, rows, panel + p, r[p]);
}

// Up to 16 rows against one panel.
inline void tiles_one(const TileArgs<BF16Pairs>& a, int64_t row, int64_t rows, int64_t panel,
                      float* spare) {
  const TileRegion r = open_region(a, row, rows, panel, spare);
  DIPTYCH_OPEN_TILE(0, r)
  const uint32_t* x = a.x + row * a.x_stride + a.first_step * rows;
  const uint16_t* w = a.w + panel * a.panel_stride;
  for (int64_t s = 0; s < a.steps; s += kTileSteps) {
    _tile_loadd(4, x + s * rows, 64);
    _tile_loadd(6, w + s * 2 * kPanel, 64);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, r.at, r.stride);
  close_region(a, row, rows, panel, r);
}

#undef DIPTYCH_OPEN_TILE

template <>
void gemm<BF16Pairs>(TileArgs<BF16Pairs> a, int64_t rows, int64_t panels) {
  alignas(64) float spare[4 * kTileFloats];
  int64_t row = 0, configured = 0;
  auto configure = [&configured](int64_t high, int64_t low) {
    const int64_t wanted = high * 32 + low;
    if (wanted == configured) return;
    configured = wanted;
    const TileConfig config(high, low);
    _tile_loadconfig(&config);
  };
  for (; rows - row > kTileRows; row += 2 * kTileRows) {
    const int64_t low = rows - row < 2 * kTileRows ? rows - row - kTileRows : kTileRows;
    configure(kTileRows, low);
    int64_t p = 0;
    for (; p + 2 <= panels; p += 2) tiles_two_by_two(a, row, kTileRows, low, p, spare);
    if (p == panels) continue;
    tiles_one(a, row, kTileRows, p, spare);
    configure(low, 0);
    tiles_one(a, row + kTileRows, low, p, spare);
  }
  if (row < rows) {
    configure(rows - row, 0);
    int64_t p = 0;
    for (; p + 4 <= panels; p += 4) tiles_four(a, row, rows - row, p, spare);
    for (; p < panels; ++p) tiles_one(a, row, rows - row, p, spare);
  }
  _tile_release();
}

}  // namespace
}  // namespace diptych::cpu
