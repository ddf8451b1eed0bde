// Linear layers of int8 or int4 weights over integer activations on tiles of bytes, see integers.h.
//
// The byte rows of x come in blocks of 16 (the last one lower), each [K/64][rows of the block][64], so
// that a tile is one piece of memory; int8 panels are tiles as they are, int4 panels are unpacked to
// signed bytes, which need no sums. int8 multiplies two blocks by two panels at a time and finishes one
// such square while it multiplies the next. int4 multiplies a block by a panel: the sums of a group of
// inputs are converted and added in registers while later groups are multiplied. Invariant: sums of
// integers are exact, and floats take the same operations in the same order as without tiles, so
// nothing here shows in a bit of a result.
#pragma once

#include <string.h>

#include "cut.h"
#include "integers.h"

namespace diptych::cpu {
namespace {

// Rows: fewer are as fast without tiles.
constexpr int64_t kTileRowsMin8 = 4, kTileRowsMin4 = 13;
constexpr int64_t kBytesPanelsMany = 16;   // of an item with many rows
constexpr int64_t kBytesRowsMax = 256;     // byte rows of an item
constexpr int64_t kPieceOfBytes = 640;     // inputs of one pass over an item of int8: first cache
constexpr int64_t kPieceOfNibbles = 512;   // of int4, unpacked for kStripPanels
constexpr int64_t kStripPanels = 4;
constexpr int64_t kTileSums = kRowBlock * kPanel;
constexpr int kGroupsInFlight = 4;  // of int4
constexpr int kGroupLag = 2;        // groups that are multiplied before the first one is added

// Accumulators 0..3, x 4 and 5, weights 6 and 7. The upper pair of accumulators and tile 5 have `low`
// rows, the others `high`; a tile of weights has `inputs` inputs.
struct alignas(64) ByteTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  ByteTiles(int64_t high, int64_t low, int64_t inputs) {
    const int64_t second = low > 0 ? low : high;
    const int64_t of_tile[8] = {high, high, second, second, high, second, inputs / 4, inputs / 4};
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? inputs : 64);
      rows[i] = static_cast<uint8_t>(of_tile[i]);
    }
  }
};

// The tiles as they are set; a change costs about as much as twenty multiplications.
class TileSetting {
 public:
  ~TileSetting() { _tile_release(); }
  void set(int64_t high, int64_t low, int64_t inputs) {
    const int64_t wanted = (high * 32 + low) * 128 + inputs;
    if (wanted == now_) return;
    now_ = wanted;
    const ByteTiles config(high, low, inputs);
    asm volatile("" : : "r"(&config) : "memory");  // of which the next line claims to read eight bytes
    _tile_loadconfig(&config);
  }

 private:
  int64_t now_ = 0;
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

// One pass over K for a square: tile_steps() multiplies `steps` steps from step `first` on.
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
                     int32_t* sums, bool last, Prefetch& prefetch) {
  asm volatile("" ::: "memory");
  Finishing<LIMBS, P> spaces[2];
  int turn = 0;
  const int64_t share = ((s.high + s.low) / LIMBS + steps - 1) / steps;
  Prefetch ahead = prefetch;
  for (int64_t end = s.panel + panels; s.panel + P <= end; s.panel += P) {
    Finishing<LIMBS, P>& before = spaces[turn ^ 1];
    open_sums<BLOCKS, P>(first == 0 ? nullptr : sums);
    multiply_bytes<BLOCKS, P>(t, s, first, steps, [&]() __attribute__((always_inline)) {
      ahead.step();
      before.step(share);
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
  prefetch = ahead;
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
  Prefetch prefetch(t.ahead.or_there(t.x), blocks * (pairs + panels % 2) * all);
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
        bytes_by_panels<LIMBS, b, 2>(t, s, pairs * 2, first, now, sums, last, prefetch);
        if (panels % 2 == 0) return;
        s.panel = pairs * 2;
        int32_t* at = sums == nullptr ? nullptr : sums + pairs * 4 * kTileSums;
        bytes_by_panels<LIMBS, b, 1>(t, s, 1, first, now, at, last, prefetch);
      };
      if (s.low > 0) {
        run(std::integral_constant<int, 2>());
      } else {
        run(std::integral_constant<int, 1>());
      }
    }
  }
}

// `inputs` inputs of a panel of nibbles as signed bytes, [inputs/4][16][4].
class NibbleBytes {
 public:
  inline __attribute__((always_inline)) void unpack(const uint8_t* in, int8_t* out,
                                                    int64_t inputs) const {
    for (int64_t k = 0; k < inputs; k += 8, in += kLine, out += 2 * kLine) {
      const __m512i v = _mm512_loadu_si512(in);  // a permutation looks at six bits, the table cares for four
      _mm512_storeu_si512(out, _mm512_permutexvar_epi8(v, values_));
      _mm512_storeu_si512(out + kLine, _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), values_));
    }
  }

 private:
  __m512i values_ = _mm512_broadcast_i32x4(
      _mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
};

// A block of byte rows against a panel of int4 over some groups.
struct NibbleTile {
  const int8_t* x;      // of the block, of the first group
  int64_t byte_rows;
  const uint8_t* w;     // packed, of the first group: unpacked on the way
  const int8_t* bytes;  // or unpacked already
  int64_t groups, group;
  const uint16_t* steps;  // scales of the first group
  float* sums;  // [rows][16] between passes
  bool first, last;
};

// R: byte rows, at least those of the block (what is beside them is computed for nothing). INPUTS: of a tile.
template <int LIMBS, int R, int INPUTS, bool UNPACKED>
void int4_block(const NibbleTile& t, const IntegerTile& whole, int64_t row, int64_t panel,
                Prefetch& prefetch) {
  constexpr int rows = R / LIMBS;
  constexpr int64_t tile_bytes = INPUTS * kPanel;
  alignas(64) int32_t ring[kGroupsInFlight][kTileSums];
  alignas(64) int8_t bytes[UNPACKED ? 1 : kGroupsInFlight][UNPACKED ? 64 : 128 * kPanel];
  const NibbleBytes nibbles;
  F acc[rows];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) acc[r] = t.first ? Vec::set1(0.0f) : Vec::load(t.sums + r * kPanel);
  const int64_t tiles = t.group / INPUTS;  // of a group
  auto prepare = [&](int64_t g) __attribute__((always_inline)) {
    if constexpr (!UNPACKED) {
      if (g >= t.groups) return;
      nibbles.unpack(t.w + g * t.group * kPanel / 2, bytes[g % kGroupsInFlight], t.group);
    }
  };
  auto multiply = [&](int64_t g) __attribute__((always_inline)) {
    const int8_t* w = UNPACKED ? t.bytes + g * t.group * kPanel : bytes[g % kGroupsInFlight];
    _tile_zero(0);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t k = g * t.group + i * INPUTS;
      _tile_loadd(4, t.x + k / kChunk * kChunk * t.byte_rows + k % kChunk, kChunk);
      _tile_loadd(6, w + i * tile_bytes, kChunk);
      _tile_dpbssd(0, 4, 6);
      _tile_zero(4);
      _tile_zero(6);
    }
    _tile_stored(0, ring[g % kGroupsInFlight], kChunk);
  };
  auto add = [&](int64_t g) __attribute__((always_inline)) {
    const int32_t* from = ring[g % kGroupsInFlight];
    const F step = Vec::load_as<BF16>(t.steps + g * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      I sum = Vec::load_int(from + r * LIMBS * kPanel);
      if constexpr (LIMBS == 2)  // fits: a group is short
        sum = Vec::add_int(Vec::shift_left8(sum), Vec::load_int(from + (2 * r + 1) * kPanel));
      acc[r] = Vec::fma(step, Vec::to_floats(sum), acc[r]);
    }
  };
  for (int64_t g = 0; g < kGroupLag; ++g) prepare(g);
  for (int64_t g = 0; g < t.groups; ++g) {
    prefetch.step();
    prepare(g + kGroupLag);
    asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
    multiply(g);
    if (g >= kGroupLag) add(g - kGroupLag);
  }
  for (int64_t g = t.groups < kGroupLag ? 0 : t.groups - kGroupLag; g < t.groups; ++g) add(g);
  const int64_t valid = t.byte_rows / LIMBS;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    if (!t.last) {
      Vec::store(t.sums + r * kPanel, acc[r]);
    } else if (r < valid) {
      IntegerTile to = whole;
      to.x_scales += row / LIMBS;
      to.out += row / LIMBS * to.out_stride + panel * kPanel;
      to.columns -= panel * kPanel;
      if (to.bias != nullptr) to.bias += panel * kPanel;
      store_sum(to, r, 0, acc[r]);
    }
  }
}

template <int LIMBS, int INPUTS, bool UNPACKED>
inline void int4_block_rows(const NibbleTile& t, const IntegerTile& whole, int64_t row,
                            int64_t panel, Prefetch& prefetch) {
  if (t.byte_rows <= 4) return int4_block<LIMBS, 4, INPUTS, UNPACKED>(t, whole, row, panel, prefetch);
  if (t.byte_rows <= 8) return int4_block<LIMBS, 8, INPUTS, UNPACKED>(t, whole, row, panel, prefetch);
  int4_block<LIMBS, 16, INPUTS, UNPACKED>(t, whole, row, panel, prefetch);
}

// One block of rows: panel after panel is unpacked on the way.
template <int LIMBS, int INPUTS>
void int4_few_rows(const IntegerTile& t, int64_t byte_rows, int64_t panels) {
  TileSetting setting;
  setting.set(byte_rows, 0, INPUTS);
  const int64_t groups = t.padded / t.group;
  Prefetch prefetch(t.ahead.or_there(t.x), panels * groups);
  for (int64_t p = 0; p < panels; ++p) {
    const NibbleTile tile{t.x,     byte_rows, t.w + p * t.panel_stride,     nullptr, groups,
                          t.group, t.steps + p * t.steps_stride, nullptr, true,    true};
    int4_block_rows<LIMBS, INPUTS, false>(tile, t, 0, p, prefetch);
  }
}

// Some panels and inputs are unpacked into the first cache for all rows.
template <int LIMBS, int INPUTS>
void int4_many_rows(const IntegerTile& t, int64_t byte_rows, int64_t panels) {
  TileSetting setting;
  const int64_t blocks = (byte_rows + kRowBlock - 1) / kRowBlock;
  const int64_t piece = t.padded < kPieceOfNibbles ? t.padded : kPieceOfNibbles;
  const int64_t byte_stride = piece * kPanel;
  auto* sums = static_cast<float*>(
      scratch(kScratchItem, static_cast<size_t>(blocks * kStripPanels * kTileSums * 4 +
                                                kStripPanels * byte_stride)));
  auto* bytes = reinterpret_cast<int8_t*>(sums + blocks * kStripPanels * kTileSums);
  const NibbleBytes nibbles;
  Prefetch prefetch(t.ahead.or_there(t.x), panels * blocks * (t.padded / t.group));
  for (int64_t strip = 0; strip < panels; strip += kStripPanels) {
    const int64_t strip_panels = panels - strip < kStripPanels ? panels - strip : kStripPanels;
    for (int64_t k = 0; k < t.padded; k += piece) {
      const int64_t inputs = t.padded - k < piece ? t.padded - k : piece;
      for (int64_t p = 0; p < strip_panels; ++p)
        nibbles.unpack(t.w + (strip + p) * t.panel_stride + k * kPanel / 2, bytes + p * byte_stride,
                       inputs);
      NibbleTile tile;
      tile.groups = inputs / t.group;
      tile.group = t.group;
      tile.first = k == 0;
      tile.last = k + inputs == t.padded;
      tile.w = nullptr;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = b * kRowBlock;
        tile.byte_rows = byte_rows - row < kRowBlock ? byte_rows - row : kRowBlock;
        tile.x = t.x + row * t.x_stride + k * tile.byte_rows;
        setting.set(tile.byte_rows, 0, INPUTS);
        for (int64_t p = 0; p < strip_panels; ++p) {
          tile.bytes = bytes + p * byte_stride;
          tile.steps = t.steps + (strip + p) * t.steps_stride + k / t.group * kPanel;
          tile.sums = sums + (b * kStripPanels + p) * kTileSums;
          int4_block_rows<LIMBS, INPUTS, true>(tile, t, row, strip + p, prefetch);
        }
      }
    }
  }
}

template <int LIMBS>
void int4_on_tiles(const IntegerTile& t, int64_t byte_rows, int64_t panels) {
  const bool half = t.group < kChunk;
  if (byte_rows <= kRowBlock)
    return half ? int4_few_rows<LIMBS, 32>(t, byte_rows, panels)
                : int4_few_rows<LIMBS, 64>(t, byte_rows, panels);
  half ? int4_many_rows<LIMBS, 32>(t, byte_rows, panels)
       : int4_many_rows<LIMBS, 64>(t, byte_rows, panels);
}

struct ByteTileJob {
  const IntegerJob& rows;

  static void item(void* context, int64_t index) {
    const IntegerJob& job = static_cast<const ByteTileJob*>(context)->rows;
    each_part(job.a, job.cut, index,
              [&](const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) {
                const IntegerTile t = job.tile(place, panel, sums, ahead);
                const int64_t limbs = job.q.limbs, byte_rows = place.rows * limbs;
                const bool int8 = job.a.width == Width::kInt8;
                if (int8 && limbs == 1) int8_on_tiles<1>(t, byte_rows, place.panels);
                if (int8 && limbs == 2) int8_on_tiles<2>(t, byte_rows, place.panels);
                if (!int8 && limbs == 1) int4_on_tiles<1>(t, byte_rows, place.panels);
                if (!int8 && limbs == 2) int4_on_tiles<2>(t, byte_rows, place.panels);
              });
  }
};

inline void integers_on_tiles(const LinearArgs& a, const IntegerRows& q) {
  const int64_t panels = panels_to_cut(a), unit = 2 * kRowBlock;  // byte rows
  int64_t group_panels = kGroupPanels;
  if (q.byte_rows > unit) {
    group_panels = kBytesPanelsMany;
    while (group_panels > kGroupPanels && panels < 4 * num_threads() * group_panels) group_panels /= 2;
  }
  const IntegerJob job{
      a, q, {panels, a.rows, group_panels, kBytesRowsMax / q.limbs, unit / q.limbs}};
  ByteTileJob tiles{job};
  run_unless_small(job.cut.items, ByteTileJob::item, &tiles, a.rows * a.num_out * a.num_in);
}

}  // namespace
}  // namespace diptych::cpu
