// bf16 KV on AMX tiles: up to 16 rows of a head at a time against a tile of 64 keys.
//
// Keys lie in the pool as tiles are multiplied. So do values, but the products take 32 keys at once and
// 16 lie side by side: a tile's values are copied into the first cache, once for all rows of a block.
// The softmax is that of attention_pairs.h: weights of bf16, relative to a reference that is raised
// only where they become too large. Scores start at minus the reference.
// Invariants: a row takes part in the same products whatever rows lie beside it, and what a row does not
// see of a tile has weight 0. Its value is multiplied by that 0, so values that are not finite and
// that some rows do not see take another way, row by row.
#pragma once

#include "attention_pairs.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kGroupRows = 16;
constexpr int64_t kDimUnit = 32;  // heads of other sizes are left to attention_pairs.h

// The rows of one head are cut into groups of the same height; the last may need rows of padding.
struct RowGroups {
  int64_t count, height;

  explicit RowGroups(int64_t rows)
      : count((rows + kGroupRows - 1) / kGroupRows), height((rows + count - 1) / count) {}
  int64_t padded() const { return count * height; }
};

// One group of rows and one tile.
struct TileGroup {
  const char *panels[kTilePanels], *values[kTilePanels];  // where 16 keys begin; null: nobody sees any
  const uint16_t* q;                // [height, dim]
  float *acc, *sums, *starts, *limits;
  const int64_t *low, *high;        // [height]: the keys that a row sees
  int64_t base;
  Range seen;                       // of the tile, by any row of the block
  bool full, whole;                 // the group, or all rows, see all of it
};

class AttentionTiles {
 public:
  static constexpr bool fits(int64_t dim) { return kTiles && Vec::kBf16Dot && dim % kDimUnit == 0; }
  // Floats of its memory.
  static int64_t memory(int64_t dim) {
    return kGroupRows * (kTile * 3 / 2 + dim) + kTile / 2 * dim;
  }

  // rows: of one head.
  AttentionTiles(int64_t rows, int64_t dim, float* memory);
  ~AttentionTiles();
  // The rows of one head against the tile at `base`.
  void add(const Workspace& w, int64_t rows, int64_t base);

 private:
  void score(const TileGroup& g);
  void soften(const TileGroup& g);
  void weigh(float* acc, const char* const* values);
  void weigh_exactly(const TileGroup& g);
  bool copy_values(const TileGroup& g);

  RowGroups groups_;
  int64_t dim_;
  float* scores_;      // [kGroupRows, kTile]
  uint32_t* weights_;  // [kGroupRows, kTile / 2] pairs
  float* spare_;       // [kGroupRows, dim]
  char* copy_;         // values [kTile / 2, dim] pairs
  const char* values_[2] = {};  // where 32 keys begin
};

#ifdef __AMX_BF16__
constexpr float kWeightsMost = 256.0f;  // 2^kSlack: where four weights of a row are more, its reference
                                        // is raised
constexpr uint32_t kOnes = 0x3f803f80;  // a pair of bf16
constexpr int64_t kPairsOfTile = kTile / 2, kPiecePairs = kPanel / 2;
constexpr int64_t kChunkColumns = 4 * kPanel;  // of accumulators in tiles at a time

// Stores before it are there for the tile loads after it: to the compiler these read no memory.
inline void publish() { asm volatile("" ::: "memory"); }

// Tiles 0..3 accumulate, 4 has rows of queries or weights, 5 and 6 keys or values.
struct GroupConfig : TileShapes {
  explicit GroupConfig(int64_t height) {
    for (int i = 0; i < 7; ++i) {
      row_bytes[i] = 64;
      rows[i] = static_cast<uint8_t>(i < 5 ? height : kGroupRows);
    }
  }
};

AttentionTiles::AttentionTiles(int64_t rows, int64_t dim, float* memory) : groups_(rows), dim_(dim) {
  scores_ = memory;
  weights_ = reinterpret_cast<uint32_t*>(scores_ + kGroupRows * kTile);
  spare_ = scores_ + kGroupRows * (kTile * 3 / 2);
  copy_ = reinterpret_cast<char*>(spare_ + kGroupRows * dim);
  const GroupConfig config(groups_.height);
  config.load();
}

AttentionTiles::~AttentionTiles() { _tile_release(); }

// 2^x below 2^127 to 13 bits, and exactly 1 for 0; 0 far below.
inline __attribute__((always_inline)) F power_of_two(F x) {
  const F r = _mm512_reduce_ps(x, 9);  // x - floor(x)
  F p = Vec::fma(Vec::set1(7.826797e-2f), r, Vec::set1(2.2630768e-1f));
  p = Vec::fma(p, r, Vec::set1(6.9542435e-1f));
  return _mm512_scalef_ps(Vec::fma(p, r, Vec::set1(1.0f)), x);
}

// The reference of a row becomes its largest score in the tile.
__attribute__((noinline)) void raise(const TileGroup& g, int64_t r, float* s, uint64_t seen,
                                     int64_t dim) {
  const bool fresh = g.limits[r] < 0.0f;
  F top = Vec::set1(-INFINITY);
#pragma GCC unroll 4
  for (int64_t j = 0; j < kTile; j += Vec::W)
    top = Vec::max(Vec::select(static_cast<unsigned>(seen >> j) & 0xffff, Vec::load(s + j), top), top);
  const F shift = Vec::set1(Vec::largest(top));
  for (int64_t j = 0; j < kTile; j += Vec::W) Vec::store(s + j, Vec::load(s + j) - shift);
  float *start = g.starts + r * Vec::W, *sums = g.sums + r * Vec::W, *acc = g.acc + r * dim;
  Vec::store(start, Vec::load(start) - shift);
  g.limits[r] = kWeightsMost;
  if (fresh) return;
  const F factor = exp2_vec(Vec::set1(0.0f) - shift);
  Vec::store(sums, Vec::load(sums) * factor);
  for (int64_t d = 0; d < dim; d += Vec::W) Vec::store(acc + d, Vec::load(acc + d) * factor);
}

// Row r's scores become weights; what is summed up is what multiplies values. FULL: it sees all of the tile; else `seen` says what.
template <bool FULL>
inline __attribute__((always_inline)) void soften_row(const TileGroup& g, int64_t r, float* s,
                                                      uint32_t* weights, uint64_t seen,
                                                      int64_t dim) {
  if (__builtin_expect(g.limits[r] < 0.0f, 0)) raise(g, r, s, seen, dim);
  F first, second, sum;
  for (;;) {
    F w[kTilePanels];
#pragma GCC unroll 4
    for (int p = 0; p < kTilePanels; ++p) {
      w[p] = power_of_two(Vec::load(s + p * kPanel));
      if constexpr (!FULL)
        w[p] = Vec::select(static_cast<unsigned>(seen >> (p * kPanel)) & 0xffff, w[p], Vec::set1(0.0f));
    }
    first = Vec::round_pairs(w[0], w[1]);
    second = Vec::round_pairs(w[2], w[3]);
    sum = Vec::dot_pairs(Vec::dot_pairs(Vec::set1(0.0f), kOnes, first), kOnes, second);
    if (__builtin_expect(Vec::mask_above(sum, Vec::set1(kWeightsMost)) == 0, 1)) break;
    raise(g, r, s, seen, dim);
  }
  float* sums = g.sums + r * Vec::W;
  Vec::store(sums, Vec::load(sums) + sum);
  Vec::store(reinterpret_cast<float*>(weights), first);
  Vec::store(reinterpret_cast<float*>(weights + kPanel), second);
}

inline uint64_t seen_keys(const TileGroup& g, int64_t r) {
  const int64_t low = g.low[r] - g.base, high = g.high[r] - g.base;
  if (high <= 0 || low >= kTile || low >= high) return 0;
  return keys_of({low < 0 ? 0 : low, high < kTile ? high : kTile});
}

// Weights of all rows of the group.
void AttentionTiles::soften(const TileGroup& g) {
  const int64_t height = groups_.height, dim = dim_;
  float* s = scores_;
  uint32_t* weights = weights_;
  for (int64_t r = 0; r < height; ++r, s += kTile, weights += kPairsOfTile) {
    const uint64_t seen = g.full ? ~uint64_t{0} : seen_keys(g, r);
    if (g.full) {
      soften_row<true>(g, r, s, weights, seen, dim);
    } else if (seen != 0) {
      soften_row<false>(g, r, s, weights, seen, dim);
    } else {
      memset(weights, 0, kPairsOfTile * 4);
    }
  }
}

// 32 dimensions of a group's queries and of the keys.
inline __attribute__((always_inline)) void add_scores(const TileGroup& g, int64_t d, int64_t dim) {
  const int64_t at = d * kPanel * 2;
  _tile_loadd(4, g.q + d, dim * 2);
  _tile_loadd(5, g.panels[0] + at, 64);
  _tile_loadd(6, g.panels[1] + at, 64);
  _tile_dpbf16ps(0, 4, 5);
  _tile_dpbf16ps(1, 4, 6);
  _tile_loadd(5, g.panels[2] + at, 64);
  _tile_loadd(6, g.panels[3] + at, 64);
  _tile_dpbf16ps(2, 4, 5);
  _tile_dpbf16ps(3, 4, 6);
}

// 32 keys' weights times the values of 64 columns, or of 32.
inline __attribute__((always_inline)) void add_values(const uint32_t* weights, const char* values,
                                                      int64_t row_bytes, bool narrow) {
  _tile_loadd(4, weights, kTile * 2);
  _tile_loadd(5, values, row_bytes);
  _tile_loadd(6, values + 64, row_bytes);
  _tile_dpbf16ps(0, 4, 5);
  _tile_dpbf16ps(1, 4, 6);
  if (narrow) return;
  _tile_loadd(5, values + 128, row_bytes);
  _tile_loadd(6, values + 192, row_bytes);
  _tile_dpbf16ps(2, 4, 5);
  _tile_dpbf16ps(3, 4, 6);
}

inline __attribute__((always_inline)) void open_columns(const float* acc, int64_t stride, bool narrow) {
  _tile_loadd(0, acc, stride);
  _tile_loadd(1, acc + 16, stride);
  if (narrow) return;
  _tile_loadd(2, acc + 32, stride);
  _tile_loadd(3, acc + 48, stride);
}

inline __attribute__((always_inline)) void close_columns(float* acc, int64_t stride, bool narrow) {
  _tile_stored(0, acc, stride);
  _tile_stored(1, acc + 16, stride);
  if (narrow) return;
  _tile_stored(2, acc + 32, stride);
  _tile_stored(3, acc + 48, stride);
}

void AttentionTiles::score(const TileGroup& g) {
  publish();
  _tile_loadd(0, g.starts, 64);
  _tile_loadd(1, g.starts, 64);
  _tile_loadd(2, g.starts, 64);
  _tile_loadd(3, g.starts, 64);
  for (int64_t d = 0; d < dim_; d += kDimUnit) add_scores(g, d, dim_);
  _tile_stored(0, scores_, kTile * 4);
  _tile_stored(1, scores_ + kPanel, kTile * 4);
  _tile_stored(2, scores_ + 2 * kPanel, kTile * 4);
  _tile_stored(3, scores_ + 3 * kPanel, kTile * 4);
}

// acc += weights times values, which begin at values[0] and, the second 32 keys, at values[1].
inline void AttentionTiles::weigh(float* acc, const char* const* values) {
  const int64_t stride = dim_ * 4;
  for (int64_t d = 0; d < dim_; d += kChunkColumns) {
    const bool narrow = dim_ - d < kChunkColumns;
    publish();
    open_columns(acc + d, stride, narrow);
    add_values(weights_, values[0] + d * 4, stride, narrow);
    add_values(weights_ + kPanel, values[1] + d * 4, stride, narrow);
    close_columns(acc + d, stride, narrow);
  }
}

// 16 keys' values, those outside of `seen` as zeros; returns whether all of them are finite.
bool copy_piece(char* out, const char* in, int64_t first_key, Range seen, int64_t dim) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 endless = 0;
  for (int64_t pair = 0; pair < kPiecePairs; ++pair, out += dim * 4, in += dim * 4) {
    const int64_t key = first_key + 2 * pair;
    const bool first = key >= seen.low && key < seen.high,
               second = key + 1 >= seen.low && key + 1 < seen.high;
    if (!first && !second) {
      memset(out, 0, static_cast<size_t>(dim) * 4);
      continue;
    }
    const auto mask = static_cast<int>((first ? 0xffffu : 0) | (second ? 0xffff0000u : 0));
    for (int64_t d = 0; d < dim; d += Vec::W) {
      const __m512i x = _mm512_and_si512(_mm512_loadu_si512(in + d * 4), _mm512_set1_epi32(mask));
      endless |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
      _mm512_storeu_si512(out + d * 4, x);
    }
  }
  return endless == 0;
}

// Returns whether no row meets a value that it does not see and that is not finite.
bool AttentionTiles::copy_values(const TileGroup& g) {
  const int64_t piece = kPiecePairs * dim_ * 4;
  bool finite = true;
  for (int half = 0; half < 2; ++half) {
    const char *first = g.values[2 * half], *second = g.values[2 * half + 1];
    char* out = copy_ + half * 2 * piece;
    values_[half] = out;
    if (!g.whole) {
      finite &= copy_piece(out, first, 2 * half * kPanel, g.seen, dim_);
      finite &= copy_piece(out + piece, second, (2 * half + 1) * kPanel, g.seen, dim_);
    } else if (second == first + piece) {
      values_[half] = first;
    } else {
      memcpy(out, first, static_cast<size_t>(piece));
      memcpy(out + piece, second, static_cast<size_t>(piece));
    }
  }
  return finite;
}

// Each row with zeros in place of the values that it does not see.
__attribute__((noinline)) void AttentionTiles::weigh_exactly(const TileGroup& g) {
  const int64_t piece = kPiecePairs * dim_ * 4;
  const char* values[2] = {copy_, copy_ + 2 * piece};
  for (int64_t r = 0; r < groups_.height; ++r) {
    if (seen_keys(g, r) == 0) continue;
    const int64_t low = g.low[r] - g.base, high = g.high[r] - g.base;
    for (int p = 0; p < kTilePanels; ++p)
      copy_piece(copy_ + p * piece, g.values[p], p * kPanel, {low, high}, dim_);
    memcpy(spare_ + r * dim_, g.acc + r * dim_, static_cast<size_t>(dim_) * 4);
    weigh(spare_, values);
    memcpy(g.acc + r * dim_, spare_ + r * dim_, static_cast<size_t>(dim_) * 4);
  }
  copy_values(g);  // for the groups after it
}

void AttentionTiles::add(const Workspace& w, int64_t rows, int64_t base) {
  const char* any = nullptr;  // in place of panels that nobody sees
  for (const char* panel : w.place->panels) any = panel != nullptr ? panel : any;
  const int64_t low = w.low[0] - base, high = w.high[rows - 1] - base;  // both grow with the row
  TileGroup g{};
  g.seen = {low, high};
  g.base = base;
  g.whole = w.low[rows - 1] <= base && w.high[0] >= base + kTile;
  for (int p = 0; p < kTilePanels; ++p) {
    g.panels[p] = w.place->panels[p] != nullptr ? w.place->panels[p] : any;
    g.values[p] = w.place->panels[p] != nullptr ? w.place->values[p * kPiecePairs] : any;
  }
  const bool finite = copy_values(g);
  const int64_t height = groups_.height;
  for (int64_t r = 0; r < groups_.padded(); r += height) {
    g.q = static_cast<const uint16_t*>(w.q) + r * dim_;
    g.acc = w.split.acc + r * dim_;
    g.sums = w.sums + r * Vec::W;
    g.starts = w.starts + r * Vec::W;
    g.limits = w.limits + r;
    g.low = w.low + r;
    g.high = w.high + r;
    g.full = g.low[height - 1] <= base && g.high[0] >= base + kTile;
    score(g);
    soften(g);
    finite || g.full ? weigh(g.acc, values_) : weigh_exactly(g);
  }
}
#endif

}  // namespace
}  // namespace diptych::cpu
