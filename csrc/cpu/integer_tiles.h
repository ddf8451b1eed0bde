// Linear layers of int8 weights over integer activations on tiles of bytes, see integers.h; int4 is in
// nibble_tiles.h.
//
// The byte rows of x come in blocks of 16 (the last one lower), each [K/64][rows of the block][64], so
// that a tile is one piece of memory; panels are tiles as they are. Two blocks are multiplied by two
// panels at a time, and one such square is finished while the next is multiplied. Invariant: sums of
// integers are exact, and floats take the same operations in the same order as without tiles, so
// nothing here shows in a bit of a result.
#pragma once

#include <string.h>

#include "cut.h"
#include "integers.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kPieceOfBytes = 640;     // inputs of one pass over an item of int8: first cache
constexpr int64_t kTileSums = kRowBlock * kPanel;

// The tiles as they are set; a change costs about as much as twenty multiplications.
class TileSetting {
 public:
  ~TileSetting() { _tile_release(); }
  void set(int64_t high, int64_t low, int64_t bytes) {  // as in TileConfig
    const int64_t wanted = (high * 32 + low) * 128 + bytes;
    if (wanted == now_) return;
    now_ = wanted;
    const TileConfig config(high, low, bytes);
    config.load();
  }

 private:
  int64_t now_ = 0;
};

// What is to be fetched meanwhile, shared out to so many calls of step(): a tile is many lines.
class Fetch {
 public:
  Fetch(const Ahead& ahead, int64_t steps)
      : at_(ahead.data), lines_(ahead.lines), each_((ahead.lines + steps - 1) / steps) {}

  inline __attribute__((always_inline)) void step() {
    const int64_t now = each_ < lines_ ? each_ : lines_;
    for (int64_t i = 0; i < now; ++i) __builtin_prefetch(at_ + i * kLine, 0, 2);
    at_ += now * kLine, lines_ -= now;
  }

 private:
  const char* at_;
  int64_t lines_, each_;
};

// One or two blocks of byte rows against P panels of int8.
struct Square {
  int64_t row, high, low;  // byte rows of the item
  int64_t panel;           // of the item
};

// The sums of a square on their way to `out`, some rows at a time.
template <int LIMBS, int P>
class Finishing {
 public:
  alignas(64) int32_t tiles[4 * kTileSums];

  void open(const IntegerTile& t, const Square& s) {
    row_ = 0;
    high_ = s.high / LIMBS;
    rows_ = (s.high + s.low) / LIMBS;
    const int64_t first = s.row / LIMBS, column = s.panel * kPanel;
    x_scales_ = t.x_scales + first;
    sums_ = t.sums + s.row;
    out_ = t.out + first * t.out_stride + column;
    out_stride_ = t.out_stride;
    has_bias_ = t.bias != nullptr;
    for (int p = 0; p < P; ++p) {
      const int64_t left = t.columns - column - p * kPanel;
      lanes_[p] = static_cast<int>(left < 0 ? 0 : left < kPanel ? left : kPanel);
      scales_[p] = Vec::load_n(t.scales + column + p * kPanel, lanes_[p]);
      if (has_bias_) bias_[p] = Vec::load_n(t.bias + column + p * kPanel, lanes_[p]);
    }
  }

  // `count` more rows, where so many are left.
  inline __attribute__((always_inline)) void step(int64_t count) {
    const int64_t first = row_, end = first + count < rows_ ? first + count : rows_;
    if (first >= end) return;
    row_ = end;
    if (lanes_[P - 1] == kPanel && !has_bias_) return finish<true>(first, end);
    finish<false>(first, end);
  }

  void close() { step(rows_); }

 private:
  template <bool PLAIN>
  inline __attribute__((always_inline)) void finish(int64_t first, int64_t end) {
    // Copies: `out` might lie anywhere.
    const int64_t high = high_, stride = out_stride_;
    const float* x_scales = x_scales_;
    const int32_t* sums = sums_;
    float* out = out_ + first * stride;
    F scales[P], bias[P];
    for (int p = 0; p < P; ++p) scales[p] = scales_[p], bias[p] = PLAIN ? scales_[p] : bias_[p];
    for (int64_t r = first; r < end; ++r, out += stride) {
      const int32_t* from = tiles + r * LIMBS * kPanel + (r < high ? 0 : 2 * kTileSums - high * LIMBS * kPanel);
      const F x_scale = Vec::set1(x_scales[r]);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        F y = part(from + p * kTileSums, sums[r * LIMBS]);
        if constexpr (LIMBS == 2)
          y = Vec::fma(y, Vec::set1(256.0f), part(from + p * kTileSums + kPanel, sums[r * 2 + 1]));
        y = y * scales[p] * x_scale;
        if constexpr (PLAIN) {
          Vec::store(out + p * kPanel, y);
        } else {
          if (has_bias_) y = y + bias[p];
          Vec::store_n(out + p * kPanel, y, lanes_[p]);
        }
      }
    }
  }

  static F part(const int32_t* from, int32_t sum) {
    return Vec::to_floats(Vec::add_int(Vec::load_int(from), Vec::set1_int(sum)));
  }

  int64_t row_ = 0, rows_ = 0, high_ = 0;
  const float* x_scales_;
  const int32_t* sums_;
  float* out_;
  int64_t out_stride_;
  F scales_[P], bias_[P];
  int lanes_[P];
  bool has_bias_;
};

// One pass over K for a square: `steps` steps from step `first` on.
template <int BLOCKS, int P, class Between>
inline __attribute__((always_inline)) void multiply_bytes(const IntegerTile& t, const Square& s,
                                                          int64_t first, int64_t steps,
                                                          Between between) {
  const int8_t* x = t.x + s.row * t.x_stride + first * kChunk * s.high;
  const int8_t* x_low = t.x + (s.row + s.high) * t.x_stride + first * kChunk * s.low;
  const uint8_t* w = t.w + s.panel * t.panel_stride + first * kChunk * kPanel;
  const uint8_t* w_next = w + t.panel_stride;
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(6, w + i * kChunk * kPanel, kChunk);
    _tile_loadd(4, x + i * kChunk * s.high, kChunk);
    _tile_dpbsud(0, 4, 6);
    if constexpr (BLOCKS == 2) {
      _tile_loadd(5, x_low + i * kChunk * s.low, kChunk);
      _tile_dpbsud(2, 5, 6);
    }
    _tile_zero(6);  // see gemm_amx.h
    if constexpr (P == 2) {
      _tile_loadd(6, w_next + i * kChunk * kPanel, kChunk);
      _tile_dpbsud(1, 4, 6);
      if constexpr (BLOCKS == 2) _tile_dpbsud(3, 5, 6);
      _tile_zero(6);
    }
    _tile_zero(4);
    if constexpr (BLOCKS == 2) _tile_zero(5);
    between();
  }
}

template <int BLOCKS, int P>
inline void open_sums(const int32_t* sums) {  // null: zeros
  if (sums == nullptr) {
    _tile_zero(0);
    if constexpr (P == 2) _tile_zero(1);
    if constexpr (BLOCKS == 2) _tile_zero(2);
    if constexpr (BLOCKS == 2 && P == 2) _tile_zero(3);
    return;
  }
  _tile_loadd(0, sums, kChunk);
  if constexpr (P == 2) _tile_loadd(1, sums + kTileSums, kChunk);
  if constexpr (BLOCKS == 2) _tile_loadd(2, sums + 2 * kTileSums, kChunk);
  if constexpr (BLOCKS == 2 && P == 2) _tile_loadd(3, sums + 3 * kTileSums, kChunk);
}

template <int BLOCKS, int P>
inline void store_sums(int32_t* sums) {
  _tile_stored(0, sums, kChunk);
  if constexpr (P == 2) _tile_stored(1, sums + kTileSums, kChunk);
  if constexpr (BLOCKS == 2) _tile_stored(2, sums + 2 * kTileSums, kChunk);
  if constexpr (BLOCKS == 2 && P == 2) _tile_stored(3, sums + 3 * kTileSums, kChunk);
}

// A square's blocks against `panels` panels from its own on, over `steps` steps from `first` on. sums:
// null where these are all, else [panels / P][4] tiles between passes.
template <int LIMBS, int BLOCKS, int P>
void bytes_by_panels(const IntegerTile& t, Square s, int64_t panels, int64_t first, int64_t steps,
                     int32_t* sums, bool last, Fetch& fetch) {
  asm volatile("" ::: "memory");
  Finishing<LIMBS, P> spaces[2];
  int turn = 0;
  const int64_t share = ((s.high + s.low) / LIMBS + steps - 1) / steps;
  Fetch ahead = fetch;
  for (int64_t end = s.panel + panels; s.panel + P <= end; s.panel += P) {
    Finishing<LIMBS, P>& before = spaces[turn ^ 1];
    open_sums<BLOCKS, P>(first == 0 ? nullptr : sums);
    // The lines that the square's own sums go to are far apart, and asked for in time.
    const float* out = t.out + s.row / LIMBS * t.out_stride + s.panel * kPanel;
    int64_t rows = last ? (s.high + s.low) / LIMBS : 0;
    multiply_bytes<BLOCKS, P>(t, s, first, steps, [&]() __attribute__((always_inline)) {
      ahead.step();
      before.step(share);
      for (int64_t i = 0; i < share && rows > 0; ++i, --rows, out += t.out_stride) {
        __builtin_prefetch(out, 1, 3);
        if constexpr (P == 2) __builtin_prefetch(out + kPanel, 1, 3);
      }
    });
    if (!last) {
      store_sums<BLOCKS, P>(sums);
    } else {
      store_sums<BLOCKS, P>(spaces[turn].tiles);
      spaces[turn].open(t, s);
      turn ^= 1;
    }
    if (sums != nullptr) sums += 4 * kTileSums;
  }
  fetch = ahead;
  spaces[turn ^ 1].close();
}

// All byte rows of an item against its panels.
template <int LIMBS>
void int8_on_tiles(const IntegerTile& t, int64_t byte_rows, int64_t panels) {
  TileSetting setting;
  const int64_t all = t.padded / kChunk, pairs = panels / 2;
  const int64_t passes = byte_rows > 2 * kRowBlock ? (t.padded + kPieceOfBytes - 1) / kPieceOfBytes : 1;
  const int64_t steps = (all + passes - 1) / passes;
  int32_t* sums = nullptr;
  if (passes > 1)
    sums = static_cast<int32_t*>(
        scratch(kScratchItem, static_cast<size_t>((panels + 1) / 2 * 4 * kTileSums) * 4));
  const int64_t blocks = (byte_rows + 2 * kRowBlock - 1) / (2 * kRowBlock);
  Fetch fetch(t.ahead, blocks * (pairs + panels % 2) * all);
  for (int64_t row = 0; row < byte_rows; row += 2 * kRowBlock) {
    const int64_t left = byte_rows - row, second = left - kRowBlock;
    Square s{row, left < kRowBlock ? left : kRowBlock,
             second < 0 ? 0 : second < kRowBlock ? second : kRowBlock, 0};
    setting.set(s.high, s.low, kChunk);
    for (int64_t first = 0; first < all; first += steps) {
      const int64_t now = all - first < steps ? all - first : steps;
      const bool last = first + now == all;
      auto run = [&](auto blocks) {
        constexpr int b = decltype(blocks)::value;
        s.panel = 0;
        bytes_by_panels<LIMBS, b, 2>(t, s, pairs * 2, first, now, sums, last, fetch);
        if (panels % 2 == 0) return;
        s.panel = pairs * 2;
        int32_t* at = sums == nullptr ? nullptr : sums + pairs * 4 * kTileSums;
        bytes_by_panels<LIMBS, b, 1>(t, s, 1, first, now, at, last, fetch);
      };
      if (s.low > 0) {
        run(std::integral_constant<int, 2>());
      } else {
        run(std::integral_constant<int, 1>());
      }
    }
  }
}

}  // namespace
}  // namespace diptych::cpu
