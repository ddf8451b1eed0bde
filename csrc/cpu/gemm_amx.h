// Products of bf16 on AMX tiles: the sums of one small block of rows and panels.
//
// One step multiplies up to 16 rows by a panel over 32 inputs. Rounded rows come in blocks, each
// [inputs/32][rows of the block][32], so that a tile is one piece of memory. Invariant: an output
// element is one accumulator that takes its steps in order of k, whatever tiles lie around it; a tile
// row never meets another row. So its bits do not depend on the rows and columns computed beside it.
//
// A tile of operands is set to zero after its last use: that gives its register back. A core has few
// more of them than the eight with names, and fewer yet while its other thread is busy: each load
// and product needs a free one, and with eight in use a step takes up to five times as long.
#pragma once

#include <immintrin.h>

namespace diptych::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kTileSteps = 16;  // pairs of inputs in one tile
constexpr int64_t kTileValues = kTileRows * kPairInputs;  // bf16, of a full tile
constexpr int64_t kTileFloats = kTileRows * kPanel;

// What the processor reads when tiles are set: its format.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void load() const {
    asm volatile("" : : "r"(this) : "memory");  // of which the next line claims to read eight bytes
    _tile_loadconfig(this);
  }
};

// Accumulators 0..3, activations 4 and 5, weights 6 and 7. The upper pair of accumulators and tile
// 5 have `low` rows, the others `high`; a single row block has all four in `high` rows. `bytes`: of a
// row of activations; weights have a row for every four.
struct TileConfig : TileShapes {
  TileConfig(int64_t high, int64_t low, int64_t bytes = 64) {
    const int64_t second = low > 0 ? low : high;
    const int64_t tile_rows[8] = {high, high, second, second, high, second, bytes / 4, bytes / 4};
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? bytes : 64);
      rows[i] = static_cast<uint8_t>(tile_rows[i]);
    }
  }
};

// Blocks of rows by panels whose sums are computed at once.
constexpr int kUnitTiles = 4;

struct TileUnit {
  const uint16_t* x[2];  // blocks of rows
  int64_t x_step;        // values from one step of a block to the next
  const uint16_t* w[kUnitTiles];  // panels
  int64_t steps;
  float* sums[kUnitTiles];  // of block b and panel p at b * panels + p
  int64_t stride;           // bytes between rows of sums
};

template <class Meanwhile>
inline __attribute__((always_inline)) void steps_two_by_two(const TileUnit& u,
                                                            Meanwhile& meanwhile) {
  const uint16_t *x0 = u.x[0], *x1 = u.x[1], *w0 = u.w[0], *w1 = u.w[1];
  for (int64_t s = 0; s < u.steps; ++s) {
    _tile_loadd(6, w0, 64);
    _tile_loadd(4, x0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x1, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_zero(6);
    _tile_loadd(6, w1, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_zero(4);
    _tile_dpbf16ps(3, 5, 6);
    _tile_zero(5);
    _tile_zero(6);
    x0 += u.x_step, x1 += u.x_step, w0 += kTileValues, w1 += kTileValues;
    meanwhile.step();
  }
}

// One block by two or four panels.
template <int panels, class Meanwhile>
inline __attribute__((always_inline)) void steps_of_one(const TileUnit& u, Meanwhile& meanwhile) {
  const uint16_t *x = u.x[0], *w0 = u.w[0], *w1 = u.w[1], *w2 = u.w[2], *w3 = u.w[3];
  for (int64_t s = 0; s < u.steps; ++s) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_zero(6);
    _tile_loadd(6, w1, 64);
    _tile_dpbf16ps(1, 4, 6);
    if constexpr (panels == 4) {
      _tile_zero(6);
      _tile_loadd(6, w2, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_zero(6);
      _tile_loadd(6, w3, 64);
      _tile_dpbf16ps(3, 4, 6);
      w2 += kTileValues, w3 += kTileValues;
    }
    _tile_zero(4);
    _tile_zero(6);
    x += u.x_step, w0 += kTileValues, w1 += kTileValues;
    meanwhile.step();
  }
}

// blocks by panels: 2 by 2, 1 by 2 or 1 by 4. meanwhile.step() is called once a step: vector units
// are free then.
template <int blocks, int panels, class Meanwhile>
inline void multiply_unit(const TileUnit& u, Meanwhile meanwhile) {
  constexpr bool four = blocks * panels == 4;
  asm volatile("" ::: "memory");  // tile loads are not known to read what was stored before
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (blocks == 2) {
    steps_two_by_two(u, meanwhile);
  } else {
    steps_of_one<panels>(u, meanwhile);
  }
  _tile_stored(0, u.sums[0], u.stride);
  _tile_stored(1, u.sums[1], u.stride);
  if (four) _tile_stored(2, u.sums[2], u.stride);
  if (four) _tile_stored(3, u.sums[3], u.stride);
}

}  // namespace
}  // namespace diptych::cpu
