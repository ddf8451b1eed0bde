// Linear layers of int4 weights on tiles, over bytes (integers.h) or over bf16 rows (linear_tiles.h).
//
// A block of up to 16 rows meets a panel: the sums of one group of inputs are a tile, which is scaled
// and added to fp32 sums in registers, group after group, while later groups are multiplied. Weights
// become bytes or bf16 without their scales, on the way with one block of rows, else some panels and
// inputs for all rows in the first cache. Invariant: an output's groups are summed and added in one
// order, so its bits do not depend on the rows, columns and items around it.
#pragma once

#include "cut.h"
#include "integers.h"
#include "integer_tiles.h"
#include "widening.h"

namespace diptych::cpu {
namespace {

constexpr int kGroupsInFlight = 4;
constexpr int kGroupLag = 3;  // groups that are multiplied before the first one is added
constexpr int64_t kStripPanels = 2;
constexpr int64_t kStripBytes = 24 << 10;  // of weights that all rows meet: first cache

// What nibbles become. kInputs: of a tile; kSize: bytes of a value.
struct NibbleBytes {
  static constexpr int64_t kInputs = 64, kSize = 1;

  static inline __attribute__((always_inline)) void multiply() { _tile_dpbssd(0, 4, 6); }
  static F sums(const char* from) { return Vec::to_floats(Vec::load_int(from)); }

  // `inputs` inputs of a panel, [inputs/4][16][4].
  inline __attribute__((always_inline)) void unpack(const uint8_t* in, char* out,
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

struct NibblePairs {
  static constexpr int64_t kInputs = 32, kSize = 2;

  static inline __attribute__((always_inline)) void multiply() { _tile_dpbf16ps(0, 4, 6); }
  static F sums(const char* from) { return Vec::load(reinterpret_cast<const float*>(from)); }

  // [inputs/2][16][2], every eight in the order of Nibbles.
  inline __attribute__((always_inline)) void unpack(const uint8_t* in, char* out,
                                                    int64_t inputs) const {
    for (int64_t k = 0; k < inputs; k += 8, in += kLine, out += 4 * kLine) {
      __m512i wide[4];
      nibbles_.widen(in, wide);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + i * kLine, wide[i]);
    }
  }

 private:
  Nibbles nibbles_;
};

// Some rows against some panels: what an item's part works on.
struct NibbleRows {
  const char* x;  // of the first block; row `first` of all is in it
  int64_t row_bytes;  // of x
  int64_t rows;
  const uint8_t* w;  // first panel
  int64_t panel_stride, inputs;
  const uint16_t* steps;  // of the first panel
  int64_t steps_stride;   // between panels
  const float* x_scales;  // of the first row, or null
  const float* bias;      // of the first column, or null
  float* out;
  int64_t out_stride, columns;  // valid columns from the first one on
  Ahead ahead;                  // to be fetched meanwhile

  int64_t block_rows = 0;  // that a block of x has room for; 0: as many as it has

  int64_t height(int64_t row) const { return rows - row < kRowBlock ? rows - row : kRowBlock; }
  int64_t step_bytes(int64_t row) const { return (block_rows > 0 ? block_rows : height(row)) * kLine; }
};

// A block against a panel over some groups.
struct NibbleTile {
  const char* x;       // of the block, of the first group
  int64_t step_bytes;  // from one tile of x to the next
  const uint8_t* w;    // packed, of the first group: unpacked on the way
  const char* wide;    // or unpacked already
  int64_t groups;
  const uint16_t* steps;  // scales of the first group
  float* sums;            // [rows][16] between passes
  bool first, last;
};

// Asks for the lines that a block's sums go to: they are far apart.
inline void fetch_outputs(const NibbleRows& all, int64_t row, int64_t panel) {
  const float* out = all.out + row * all.out_stride + panel * kPanel;
  for (int64_t r = all.height(row); r > 0; --r, out += all.out_stride) __builtin_prefetch(out, 1, 3);
}

inline void store_block_row(const NibbleRows& all, int64_t row, int64_t panel, F y) {
  const int64_t column = panel * kPanel, left = all.columns - column;
  const int n = left < kPanel ? static_cast<int>(left) : kPanel;
  if (all.x_scales != nullptr) y = y * Vec::set1(all.x_scales[row]);
  if (all.bias != nullptr) y = y + Vec::load_n(all.bias + column, n);
  Vec::store_n(all.out + row * all.out_stride + column, y, n);
}

// R: rows, at least those of the block (what is beside them is computed for nothing).
template <class Wide, int R, int GROUP, bool UNPACKED>
__attribute__((noinline)) void nibble_block(const NibbleTile& t, const NibbleRows& all,
                                            int64_t row, int64_t panel, Fetch& fetch) {
  constexpr int64_t inputs = GROUP < Wide::kInputs ? GROUP : Wide::kInputs;  // of a tile
  constexpr int64_t group_bytes = GROUP * kPanel * Wide::kSize;
  alignas(64) char ring[kGroupsInFlight][kTileSums * 4];
  alignas(64) char wide[UNPACKED ? 1 : kGroupsInFlight][UNPACKED ? 64 : group_bytes];
  const Wide nibbles;
  F acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = t.first ? Vec::set1(0.0f) : Vec::load(t.sums + r * kPanel);
  const int64_t groups = t.groups, step_bytes = t.step_bytes;
  const char* x = t.x;
  Fetch ahead = fetch;
  auto prepare = [&](int64_t g) __attribute__((always_inline)) {
    if constexpr (!UNPACKED) {
      if (g < groups) nibbles.unpack(t.w + g * GROUP * kPanel / 2, wide[g % kGroupsInFlight], GROUP);
    }
  };
  auto multiply = [&](int64_t g) __attribute__((always_inline)) {
    const char* w = UNPACKED ? t.wide + g * group_bytes : wide[g % kGroupsInFlight];
    _tile_zero(0);
#pragma GCC unroll 4
    for (int64_t k = 0; k < GROUP; k += inputs) {
      const int64_t at = g * GROUP + k;
      _tile_loadd(4, x + at / Wide::kInputs * step_bytes + at % Wide::kInputs * Wide::kSize, kLine);
      _tile_loadd(6, w + k * kPanel * Wide::kSize, kLine);
      Wide::multiply();
      _tile_zero(4);  // see gemm_amx.h
      _tile_zero(6);
    }
    _tile_stored(0, ring[g % kGroupsInFlight], kLine);
  };
  auto add = [&](int64_t g) __attribute__((always_inline)) {
    const char* from = ring[g % kGroupsInFlight];
    const F step = Vec::load_as<BF16>(t.steps + g * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r] = Vec::fma(step, Wide::sums(from + r * kLine), acc[r]);
  };
  if (t.last) fetch_outputs(all, row, panel);
  for (int64_t g = 0; g < kGroupLag; ++g) prepare(g);
  for (int64_t g = 0; g < groups; ++g) {
    ahead.step();
    prepare(g + kGroupLag);
    asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
    multiply(g);
    if (g >= kGroupLag) add(g - kGroupLag);
  }
  for (int64_t g = groups < kGroupLag ? 0 : groups - kGroupLag; g < groups; ++g) add(g);
  fetch = ahead;
  const int64_t valid = all.height(row);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (!t.last) {
      Vec::store(t.sums + r * kPanel, acc[r]);
    } else if (r < valid) {
      store_block_row(all, row + r, panel, acc[r]);
    }
  }
}

template <class Wide, int GROUP, bool UNPACKED>
inline void nibble_block_rows(const NibbleTile& t, const NibbleRows& all, int64_t row,
                              int64_t panel, Fetch& fetch) {
  const int64_t rows = all.height(row);
  if (rows == 1) return nibble_block<Wide, 1, GROUP, UNPACKED>(t, all, row, panel, fetch);
  if (rows <= 4) return nibble_block<Wide, 4, GROUP, UNPACKED>(t, all, row, panel, fetch);
  if (rows <= 8) return nibble_block<Wide, 8, GROUP, UNPACKED>(t, all, row, panel, fetch);
  nibble_block<Wide, 16, GROUP, UNPACKED>(t, all, row, panel, fetch);
}

// One block of rows: panel after panel is unpacked on the way.
template <class Wide, int GROUP>
void nibbles_few_rows(const NibbleRows& all, int64_t panels) {
  constexpr int64_t inputs = GROUP < Wide::kInputs ? GROUP : Wide::kInputs;
  TileSetting setting;
  setting.set(all.rows, 0, inputs * Wide::kSize);
  const int64_t groups = all.inputs / GROUP;
  Fetch fetch(all.ahead, panels * groups);
  for (int64_t p = 0; p < panels; ++p) {
    const NibbleTile t{all.x,  all.step_bytes(0), all.w + p * all.panel_stride,
                       nullptr, groups,          all.steps + p * all.steps_stride,
                       nullptr, true,            true};
    nibble_block_rows<Wide, GROUP, false>(t, all, 0, p, fetch);
  }
}

// Some panels and inputs are unpacked into the first cache for all rows.
template <class Wide, int GROUP>
void nibbles_many_rows(const NibbleRows& all, int64_t panels) {
  constexpr int64_t inputs = GROUP < Wide::kInputs ? GROUP : Wide::kInputs;
  constexpr int64_t longest = kStripBytes / (kStripPanels * kPanel * Wide::kSize);
  TileSetting setting;
  const int64_t blocks = (all.rows + kRowBlock - 1) / kRowBlock;
  const int64_t passes = (all.inputs + longest - 1) / longest;
  const int64_t piece = round_up((all.inputs + passes - 1) / passes, 128);
  const int64_t wide_stride = piece * kPanel * Wide::kSize;  // bytes
  auto* sums = static_cast<float*>(
      scratch(kScratchItem, static_cast<size_t>(blocks * kStripPanels * kTileSums * 4 +
                                                kStripPanels * wide_stride)));
  auto* wide = reinterpret_cast<char*>(sums + blocks * kStripPanels * kTileSums);
  const Wide nibbles;
  Fetch fetch(all.ahead, panels * blocks * (all.inputs / GROUP));
  for (int64_t strip = 0; strip < panels; strip += kStripPanels) {
    const int64_t strip_panels = panels - strip < kStripPanels ? panels - strip : kStripPanels;
    for (int64_t k = 0; k < all.inputs; k += piece) {
      const int64_t now = all.inputs - k < piece ? all.inputs - k : piece;
      for (int64_t p = 0; p < strip_panels; ++p)
        nibbles.unpack(all.w + (strip + p) * all.panel_stride + k * kPanel / 2,
                       wide + p * wide_stride, now);
      NibbleTile t{};
      t.groups = now / GROUP;
      t.first = k == 0;
      t.last = k + now == all.inputs;
      for (int64_t row = 0; row < all.rows; row += kRowBlock) {
        t.step_bytes = all.step_bytes(row);
        t.x = all.x + row * all.row_bytes + k / Wide::kInputs * t.step_bytes;
        setting.set(all.height(row), 0, inputs * Wide::kSize);
        for (int64_t p = 0; p < strip_panels; ++p) {
          t.wide = wide + p * wide_stride;
          t.steps = all.steps + (strip + p) * all.steps_stride + k / GROUP * kPanel;
          t.sums = sums + (row / kRowBlock * kStripPanels + p) * kTileSums;
          nibble_block_rows<Wide, GROUP, true>(t, all, row, strip + p, fetch);
        }
      }
    }
  }
}

template <class Wide, int GROUP>
void nibbles_of_group(const NibbleRows& all, int64_t panels) {
  if (all.rows <= kRowBlock) return nibbles_few_rows<Wide, GROUP>(all, panels);
  nibbles_many_rows<Wide, GROUP>(all, panels);
}

template <class Wide>
void nibbles_on_tiles(const NibbleRows& all, int64_t group, int64_t panels) {
  if (group == 32) return nibbles_of_group<Wide, 32>(all, panels);
  if (group == 64) return nibbles_of_group<Wide, 64>(all, panels);
  nibbles_of_group<Wide, 128>(all, panels);
}

}  // namespace
}  // namespace diptych::cpu
