// Causal attention of one row block over the paged pool, the same code for prefill and decode rows.
//
// Keys are taken in tiles of kTile tokens that start at multiples of kTile from the sequence's
// first token; kSplit tokens at a time form one online softmax, and the splits of a row are merged
// in order. What a row sees inside a tile is a range; keys outside it never enter its arithmetic,
// not even with weight zero. Hence a row's bits depend on its position, its query and its keys and
// values only: not on the rows beside it, on threads, or on where the blocks lie.
#pragma once

#include <math.h>

#include "attention_bytes.h"
#include "attention_pairs.h"
#include "attention_softmax.h"
#include "attention_tile.h"
#include "attention_tiles.h"
#include "pool.h"

namespace diptych::cpu {
namespace {

// Rows (token x head of the group) that share one pass over the keys.
template <class E>
constexpr int64_t kRowsPerBlock = kTiles && Format<E>::kDot ? 96 : 48;

template <class E>
inline bool on_tiles(int64_t dim) {
  return Format<E>::kDot && AttentionTiles::fits(dim);
}

// Some tokens' rows of one sequence, of some KV heads, and the splits of the keys that they see.
struct RowBlock {
  int32_t seq, first_head, num_heads, first_token, num_tokens;
  int64_t split_begin, split_end;
  int64_t partial;  // where its parts start, in floats
};

inline int64_t block_rows(const AttentionArgs& a, const RowBlock& block) {
  return block.num_heads * block.num_tokens * (a.q_heads / a.k_cache.heads);
}

// fn(row, token of the block, query head) for all rows: by KV head, then by token, then by head of the
// group.
template <class Fn>
inline void each_row(const AttentionArgs& a, const RowBlock& block, Fn fn) {
  const int64_t group = a.q_heads / a.k_cache.heads;
  int64_t r = 0;
  for (int64_t h = 0; h < block.num_heads; ++h) {
    for (int64_t t = 0; t < block.num_tokens; ++t) {
      for (int64_t g = 0; g < group; ++g) fn(r++, t, (block.first_head + h) * group + g);
    }
  }
}

template <class E>
Workspace make_workspace(int64_t rows, int64_t dim) {
  auto padded = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t each = padded(rows), acc = each * dim;
  const int64_t columns = whole_vectors(dim), wide = Format<E>::kScaled ? kTile * columns : 0;
  const int64_t query = Format<E>::kBytes ? padded(rows * columns) : acc;
  const int64_t lanes = Format<E>::kDot ? each * Vec::W : 0;
  const int64_t start_lanes = on_tiles<E>(dim) ? Vec::W : 1;
  const int64_t tile_memory = on_tiles<E>(dim) ? AttentionTiles::memory(dim) : 0;
  const int64_t floats = query + 2 * acc + Vec::kRows * kTile * 3 / 2 + (8 + start_lanes) * each +
                         lanes + wide + 2 * kTile + 32 + tile_memory;
  auto* p = static_cast<float*>(
      scratch(kScratchItem, static_cast<size_t>(floats) * 4 + static_cast<size_t>(each) * 16));
  auto take = [&p](int64_t n) {
    float* taken = p;
    p += n;
    return taken;
  };
  Workspace w;
  w.q = take(query);
  w.q_stride = dim;
  w.split.acc = take(acc);
  w.total.acc = take(acc);
  w.scores = take(Vec::kRows * kTile);
  w.weights = reinterpret_cast<uint32_t*>(take(Vec::kRows * kTile / 2));
  w.wide = reinterpret_cast<uint16_t*>(take(wide));
  w.k_scales = take(kTile);
  w.v_scales = take(kTile);
  w.key_bytes = reinterpret_cast<char*>(w.wide);
  w.value_bytes = w.key_bytes + kTile * columns;
  w.q_steps = take(each);
  w.q_sums = reinterpret_cast<int32_t*>(take(2 * each));
  w.steps = take(16);
  w.alpha = take(16);
  w.split.largest = take(each);
  w.split.sum = take(each);
  w.total.largest = take(each);
  w.total.sum = take(each);
  w.sums = take(lanes);
  w.start_lanes = start_lanes;
  w.starts = take(each * start_lanes);
  w.tile_memory = take(tile_memory);
  w.limits = take(each);
  w.low = reinterpret_cast<int64_t*>(p);
  w.high = w.low + each;
  return w;
}

void write_rows_of(const AttentionArgs& a, const RowBlock& block, const Softmax& total) {
  const int64_t dim = a.k_cache.dim;
  float* first = a.out + (a.qo_indptr[block.seq] + block.first_token) * a.q_heads * dim;
  each_row(a, block, [&](int64_t r, int64_t token, int64_t head) {
    const float* acc = total.acc + r * dim;
    float* out = first + (token * a.q_heads + head) * dim;
    const F inverse = Vec::set1(1.0f / total.sum[r]);
    if constexpr (Vec::kBf16Dot) {
      auto* pairs = reinterpret_cast<uint16_t*>(a.out) + (out - a.out);
      if (a.rounded) return Pairs::round_scaled(pairs, acc, inverse, dim);
    }
    each_vec(dim,
             [&](int64_t i, int n) { Vec::store_n(out + i, Vec::load_n(acc + i, n) * inverse, n); });
  });
}

// Where a thread's next work item begins to read, as far as is known.
struct Upcoming {
  const RowBlock* block;  // null: nothing follows
  int64_t token;
};

// Of the block's first head and the tile at `base`, with keys up to `end`; beyond them the first piece.
template <class E>
inline Pieces pieces_of(const AttentionArgs& a, const RowBlock& block, int64_t base, int64_t end) {
  constexpr int64_t item = sizeof(typename E::Raw);
  const int64_t size = a.k_cache.block_size, row = row_bytes<E>(a.k_cache.dim);
  const int32_t* table = a.kv_indices + a.kv_indptr[block.seq];
  Pieces pieces;
  for (int64_t p = 0; p < kTilePanels; ++p) {
    const int64_t token = base + p * kPanel < end ? base + p * kPanel : base, index = token / size;
    const int64_t inside = (block.first_head * size + token - index * size) * row;
    pieces.keys[p] = a.k_cache.data + table[index] * a.k_cache.block_stride * item + inside;
    pieces.values[p] = a.v_cache.data + table[index] * a.v_cache.block_stride * item + inside;
  }
  return pieces;
}

// What follows the tile at `base` of the block's last head: the first one's next tile, or the next work
// item, or nothing.
template <class E>
inline Pieces pieces_after(const AttentionArgs& a, const RowBlock& block, int64_t base, int64_t end,
                           const Upcoming& upcoming) {
  if (base + kTile < end || upcoming.block == nullptr)
    return pieces_of<E>(a, block, base + kTile < end ? base + kTile : base, end);
  const RowBlock& next = *upcoming.block;
  return pieces_of<E>(a, next, upcoming.token, a.kv_len[next.seq]);
}

// Where keys [begin, end) of one head's tile that starts at `base` lie; int8: once they are widened.
template <class E>
void locate(const Pieces& here, int64_t base, int64_t begin, int64_t end, int64_t dim,
            Workspace& w) {
  constexpr int64_t unit = Format<E>::kUnit;
  for (int64_t p = 0; p < kTilePanels; ++p) {
    const int64_t token = base + p * kPanel;
    w.place->panels[p] = nullptr;
    if (token >= end || token + kPanel <= begin) continue;
    const char *k = here.keys[p], *v = here.values[p];
    if constexpr (Format<E>::kBytes) {
      order_piece(w.key_bytes + p * kPanel * ((dim + 3) / 4 * 4),
                  w.value_bytes + p * kPanel * whole_vectors(dim), k, v, dim);
      memcpy(w.k_scales + p * kPanel, k + kPanel * dim, kPanel * 4);
      memcpy(w.v_scales + p * kPanel, v + kPanel * dim, kPanel * 4);
    } else if constexpr (Format<E>::kScaled) {
      uint16_t *wide_k = w.wide + p * kPanel * dim, *wide_v = wide_k + kTile * dim;
      widen_piece(wide_k, w.k_scales + p * kPanel, k, dim);
      widen_piece(wide_v, w.v_scales + p * kPanel, v, dim);
      k = reinterpret_cast<const char*>(wide_k);
      v = reinterpret_cast<const char*>(wide_v);
    }
    w.place->panels[p] = k;
    for (int64_t i = 0; i < kPanel / unit; ++i)
      w.place->values[p * kPanel / unit + i] = v + i * unit * dim * sizeof(typename Format<E>::Tile::Raw);
  }
}

// The part of a workspace that belongs to the rows from `row` on; scores and weights are shared.
template <class E>
Workspace rows_from(const Workspace& all, int64_t row, int64_t dim) {
  Workspace w = all;
  const int64_t row_of_q = Format<E>::kBytes ? 2 * whole_vectors(dim)
                                             : dim * (Format<E>::kDot ? 2 : 4);
  w.q = static_cast<char*>(all.q) + row * row_of_q;
  w.q_steps = all.q_steps + row;
  w.q_sums = all.q_sums + 2 * row;
  w.split = {all.split.acc + row * dim, all.split.largest + row, all.split.sum + row};
  w.sums = all.sums + row * Vec::W;
  w.starts = all.starts + row * all.start_lanes;
  w.limits = all.limits + row;
  w.low = all.low + row;
  w.high = all.high + row;
  return w;
}

// All rows of one head against one tile, a few at a time.
template <class E>
void add_rows(const Workspace& w, const Pieces& here, int64_t rows, int64_t base, int64_t dim) {
  using Tile = typename Format<E>::Tile;
  bool complete = true;
  for (const char* panel : w.place->panels) complete &= panel != nullptr;
  for (int64_t r = 0; r < rows; r += Vec::kRows) {
    const int64_t some = rows - r < Vec::kRows ? rows - r : Vec::kRows;
    Workspace few = rows_from<E>(w, r, dim);
    if (r + some < rows) few.ahead = &here;
    if constexpr (Format<E>::kBytes) {
      each_byte_rows(some, [&](int64_t i, int64_t n) { score_bytes(few, i, n, dim); });
    } else {
      score_rows<Tile>(few, some, complete, dim);
    }
    // Both ends of a row's range grow with the row.
    const bool full = few.low[some - 1] <= base && few.high[0] >= base + kTile;
    softmax_rows<E>(few, some, full, base, dim);
    if constexpr (Format<E>::kBytes) {
      each_byte_rows(some, [&](int64_t i, int64_t n) { weigh_bytes(few, i, n, base, dim); });
    } else if (full) {
      weigh_shared<Tile, true>(few, some, {0, kTile}, dim);
    } else {
      weigh_values<Tile>(few, some, base, dim);
    }
  }
}

// The heads of a block lie side by side in memory, so they take turns at each tile.
template <class E>
void add_tile(const AttentionArgs& a, const RowBlock& block, int64_t base, const Workspace& all,
              const Upcoming& upcoming, AttentionTiles* tiles) {
  const int64_t dim = a.k_cache.dim, rows = block.num_tokens * (a.q_heads / a.k_cache.heads);
  const int64_t low = all.low[0], high = all.high[rows - 1];  // both grow with the row
  const int64_t begin = low < base ? base : low, end = high > base + kTile ? base + kTile : high;
  if (begin >= end) return;
  Pieces here = pieces_of<E>(a, block, base, high);
  for (int64_t h = 0; h < block.num_heads; ++h) {
    const Pieces after = h + 1 < block.num_heads
                             ? here.moved(a.k_cache.block_size * row_bytes<E>(dim))
                             : pieces_after<E>(a, block, base, high, upcoming);
    TilePlace place;
    Workspace w = rows_from<E>(all, h * rows, dim);
    w.place = &place;
    w.ahead = &after;
    locate<E>(here, base, begin, end, dim, w);
    if constexpr (Format<E>::kDot && kTiles) {
      tiles != nullptr ? tiles->add(w, rows, base) : Pairs::add_tile(w, here, rows, base, dim);
    } else if constexpr (Format<E>::kDot) {
      Pairs::add_tile(w, here, rows, base, dim);
    } else {
      add_rows<E>(w, here, rows, base, dim);
    }
    here = after;
  }
}

// Rows that nobody asked for, which ask for nothing and see what the last row does.
inline void pad_rows(const Workspace& w, int64_t rows, int64_t padded, int64_t dim) {
  memset(static_cast<uint16_t*>(w.q) + rows * dim, 0, static_cast<size_t>((padded - rows) * dim) * 2);
  for (int64_t r = rows; r < padded; ++r) {
    w.low[r] = w.low[rows - 1];
    w.high[r] = w.high[rows - 1];
  }
}

template <class E>
Workspace open_block(const AttentionArgs& a, const RowBlock& block, int64_t rows) {
  const int64_t dim = a.k_cache.dim;
  Workspace w = make_workspace<E>(rows, dim);
  const int64_t num_tokens = a.qo_indptr[block.seq + 1] - a.qo_indptr[block.seq];
  const int64_t first_position = a.kv_len[block.seq] - num_tokens + block.first_token;
  const F scale = Vec::set1(a.scale * 1.44269504088896341f);  // powers of two from here on
  if (Format<E>::kDot) w.q_stride = dim / 2;
  if (Format<E>::kBytes) w.q_stride = whole_vectors(dim);
  const float* first =
      a.q + static_cast<int64_t>(a.qo_indptr[block.seq] + block.first_token) * a.q_stride;
  each_row(a, block, [&](int64_t r, int64_t token, int64_t head) {
    const int64_t position = first_position + token;
    const float* q = first + token * a.q_stride + head * dim;
    if constexpr (Format<E>::kDot) {
      Pairs::round_scaled(static_cast<uint16_t*>(w.q) + r * dim, q, scale, dim);
    } else {
      float* scaled = w.split.acc + r * dim;  // free until the first split
      if (!Format<E>::kBytes) scaled = static_cast<float*>(w.q) + r * dim;
      each_vec(dim, [&](int64_t i, int n) {
        Vec::store_n(scaled + i, Vec::load_n(q + i, n) * scale, n);
      });
      if constexpr (Format<E>::kBytes) {
        auto* bytes = static_cast<int8_t*>(w.q) + r * 2 * w.q_stride;
        w.q_steps[r] = round_query(bytes, w.q_stride, w.q_sums + 2 * r, scaled, dim);
      }
    }
    w.high[r] = position + 1;
    w.low[r] = a.window > 0 && position + 1 > a.window ? position + 1 - a.window : 0;
  });
  if (on_tiles<E>(dim)) {
    const RowGroups groups(rows / block.num_heads);
    pad_rows(w, rows, groups.padded() * block.num_heads, dim);
  }
  return w;
}

template <class E>
void run_split(const AttentionArgs& a, const RowBlock& block, int64_t rows, int64_t split,
               const Upcoming& upcoming, Workspace& w) {
  const int64_t dim = a.k_cache.dim, first = split * kSplit, end = first + kSplit;
  reset(w.split, rows, dim);
  auto run = [&](AttentionTiles* tiles) {
    for (int64_t base = first; base < end; base += kTile)
      add_tile<E>(a, block, base, w, upcoming, tiles);
  };
  if constexpr (Format<E>::kDot) Pairs::reset(w, round_up(rows, kGroupRows));
  if constexpr (Format<E>::kDot && kTiles) {
    if (AttentionTiles::fits(dim)) {
      AttentionTiles tiles(rows / block.num_heads, dim, w.tile_memory);
      run(&tiles);
    } else {
      run(nullptr);
    }
  } else {
    run(nullptr);
  }
  if constexpr (Format<E>::kDot) Pairs::finish(w, rows);
}

}  // namespace
}  // namespace diptych::cpu
