// Causal attention of one row block over the paged pool, the same code for prefill and decode rows.
//
// Keys are taken in tiles of kTile tokens that start at multiples of kTile from the sequence's
// first token; kSplit tokens at a time form one online softmax, and the splits of a row are merged
// in order. What a row sees inside a tile is a range; keys outside it never enter its arithmetic,
// not even with weight zero. Hence a row's bits depend on its position, its query and its keys and
// values only: not on the rows beside it, on threads, or on where the blocks lie.
#pragma once

#include <math.h>

#include "gemm.h"
#include "pool.h"
#include "rows.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kRowsPerBlock =
    48;  // rows (token x head of the group) that share one pass over the keys
constexpr int kTilePanels = kTile / kPanel;

// Some rows of one sequence that read the same KV head, and the splits of the keys that they see.
struct RowBlock {
  int32_t seq, kv_head, first_token, num_tokens;
  int64_t split_begin, split_end;
  int64_t partial;  // where its parts start, in floats
};

// The running softmax of some rows: acc / sum is the result over the keys seen so far.
struct Softmax {
  float *acc, *largest, *sum;  // [rows, dim], [rows], [rows]
};

struct Workspace {
  float *q, *keys, *scores;  // [rows, dim] scaled, [panels][dim][16], [rows, kTile]
  Softmax split, total;
  int64_t *low, *high;  // [rows]: the keys that a row sees, [low, high)
  const char* k_rows[kTile];
  const char* v_rows[kTile];
  const char* zeros;  // one row of zeros
};

Workspace make_workspace(int64_t rows, int64_t dim) {
  const int64_t padded = (rows * dim + 15) / 16 * 16, row_pad = (rows + 15) / 16 * 16,
                zeros = (dim + 31) / 16 * 16;
  const int64_t floats = 3 * padded + dim * kTile + rows * kTile + 4 * row_pad + zeros;
  auto* p = static_cast<float*>(
      scratch(kScratchItem, static_cast<size_t>(floats) * 4 + static_cast<size_t>(row_pad) * 16));
  auto take = [&p](int64_t n) {
    float* taken = p;
    p += n;
    return taken;
  };
  Workspace w;
  w.q = take(padded);
  w.split.acc = take(padded);
  w.total.acc = take(padded);
  w.keys = take(dim * kTile);
  w.scores = take(rows * kTile);
  w.split.largest = take(row_pad);
  w.split.sum = take(row_pad);
  w.total.largest = take(row_pad);
  w.total.sum = take(row_pad);
  float* zero_row = take(zeros);
  memset(zero_row, 0, static_cast<size_t>(zeros) * 4);
  w.zeros = reinterpret_cast<const char*>(zero_row);
  w.low = reinterpret_cast<int64_t*>(p);
  w.high = w.low + row_pad;
  return w;
}

void reset(const Softmax& s, int64_t rows, int64_t dim) {
  memset(s.acc, 0, static_cast<size_t>(rows * dim) * 4);
  for (int64_t r = 0; r < rows; ++r) {
    s.largest[r] = -INFINITY;
    s.sum[r] = 0.0f;
  }
}

void scale_row(float* row, float factor, int64_t dim) {
  const F f = Vec::set1(factor);
  each_vec(dim, [&](int64_t i, int n) { Vec::store_n(row + i, Vec::load_n(row + i, n) * f, n); });
}

// total (+) part, one row. A row that has seen no key has sum 0; any other has at least 1 (or NaN).
void merge_row(const Softmax& total, int64_t r, const float* acc, float largest, float sum,
               int64_t dim) {
  if (sum == 0.0f) return;
  float* out = total.acc + r * dim;
  if (total.sum[r] == 0.0f) {
    memcpy(out, acc, static_cast<size_t>(dim) * 4);
    total.largest[r] = largest;
    total.sum[r] = sum;
    return;
  }
  const float top = largest > total.largest[r] ? largest : total.largest[r];
  const float a = exp_one(total.largest[r] - top), b = exp_one(largest - top);
  const F va = Vec::set1(a), vb = Vec::set1(b);
  each_vec(dim, [&](int64_t i, int n) {
    Vec::store_n(out + i, Vec::fma(Vec::load_n(acc + i, n), vb, Vec::load_n(out + i, n) * va), n);
  });
  total.sum[r] = total.sum[r] * a + sum * b;
  total.largest[r] = top;
}

void write_row(const AttentionArgs& a, const RowBlock& block, int64_t r, const float* acc,
               float sum) {
  const int64_t dim = a.k_cache.dim, group = a.q_heads / a.k_cache.heads;
  const int64_t t = a.qo_indptr[block.seq] + block.first_token + r / group,
                head = block.kv_head * group + r % group;
  float* out = a.out + (t * a.q_heads + head) * dim;
  const F inverse = Vec::set1(1.0f / sum);
  each_vec(dim,
           [&](int64_t i, int n) { Vec::store_n(out + i, Vec::load_n(acc + i, n) * inverse, n); });
}

// Addresses of the K and V rows of tokens [begin, end) of the tile that starts at `base`; zeros
// elsewhere.
template <class E>
void locate(const AttentionArgs& a, const RowBlock& block, int64_t base, int64_t begin, int64_t end,
            Workspace& w) {
  const int64_t size = a.k_cache.block_size, dim = a.k_cache.dim;
  const int32_t* table = a.kv_indices + a.kv_indptr[block.seq];
  const int64_t item = sizeof(typename E::Raw), row_bytes = dim * item;
  for (int64_t j = 0; j < begin - base; ++j) w.k_rows[j] = w.v_rows[j] = w.zeros;
  for (int64_t j = end - base; j < kTile; ++j) w.k_rows[j] = w.v_rows[j] = w.zeros;
  for (int64_t token = begin; token < end;) {  // one block at a time
    const int64_t index = token / size, offset = token - index * size;
    const int64_t left = end - token < size - offset ? end - token : size - offset;
    const int64_t inside = (block.kv_head * size + offset) * row_bytes, physical = table[index];
    const char* k = a.k_cache.data + physical * a.k_cache.block_stride * item + inside;
    const char* v = a.v_cache.data + physical * a.v_cache.block_stride * item + inside;
    for (int64_t i = 0; i < left; ++i) {
      w.k_rows[token - base + i] = k + i * row_bytes;
      w.v_rows[token - base + i] = v + i * row_bytes;
    }
    token += left;
  }
}

template <class E>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<BF16> = true;

// W keys, n <= W dimensions from d on, into their panel.
template <class E>
inline void transpose_some(const Workspace& w, int j, int64_t d, int n, float* out) {
  constexpr int W = Vec::W;
  F r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const auto* row = reinterpret_cast<const typename E::Raw*>(w.k_rows[j + i]) + d;
    r[i] = n == W ? Vec::load_as<E>(row) : Vec::load_as_n<E>(row, n);
  }
  Vec::transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i < n) Vec::store(out + (d + i) * kPanel, r[i]);
  }
}

// W keys, 2 W dimensions of bf16 from d on: pairs are transposed before they are widened.
inline void transpose_pairs(const Workspace& w, int j, int64_t d, float* out) {
  constexpr int W = Vec::W;
  F r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    r[i] = Vec::load(reinterpret_cast<const float*>(w.k_rows[j + i] + d * sizeof(BF16::Raw)));
  }
  Vec::transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    F first, second;
    Vec::split_pairs(r[i], first, second);
    Vec::store(out + (d + 2 * i) * kPanel, first);
    Vec::store(out + (d + 2 * i + 1) * kPanel, second);
  }
}

// Keys of the tile as fp32 panels: keys[panel][d][16].
template <class E>
void transpose_keys(const Workspace& w, int64_t dim) {
  constexpr int W = Vec::W;
  for (int j = 0; j < kTile; j += W) {
    float* out = w.keys + (j / kPanel) * dim * kPanel + j % kPanel;
    int64_t d = 0;
    if constexpr (kIsBf16<E>) {
      for (; d + 2 * W <= dim; d += 2 * W) transpose_pairs(w, j, d, out);
    }
    for (; d + W <= dim; d += W) transpose_some<E>(w, j, d, W, out);
    if (d < dim) transpose_some<E>(w, j, d, static_cast<int>(dim - d), out);
  }
}

// One row's scores become weights, in place; its running maximum, sum and accumulator follow. [low,
// high) is inside the tile.
void softmax_row(float* s, int64_t low, int64_t high, const Softmax& state, int64_t r,
                 int64_t dim) {
  for (int64_t j = 0; j < low; ++j) s[j] = -INFINITY;
  for (int64_t j = high; j < kTile; ++j) s[j] = -INFINITY;
  F top = Vec::load(s);
  for (int j = Vec::W; j < kTile; j += Vec::W) top = Vec::max(Vec::load(s + j), top);
  const float tile_top = Vec::largest(top), before = state.largest[r];
  const float largest = tile_top > before ? tile_top : before;
  const F shift = Vec::set1(largest);
  F sum = Vec::set1(0.0f);
  for (int j = 0; j < kTile; j += Vec::W) {
    const F weight = exp_vec(Vec::load(s + j) - shift);
    Vec::store(s + j, weight);
    sum = sum + weight;
  }
  const float alpha = exp_one(before - largest);
  state.sum[r] = state.sum[r] * alpha + Vec::sum(sum);
  state.largest[r] = largest;
  if (alpha != 1.0f) scale_row(state.acc + r * dim, alpha, dim);
}

// acc[r] += sum over j in [begin, end), in order, of weight[r][j] * value[j], for R rows and V
// vectors of columns from d on.
template <class E, int R, int V>
void add_values(const Workspace& w, int64_t row, int64_t begin, int64_t end, int64_t d,
                int64_t dim) {
  F acc[R][V];
  float* out = w.split.acc + row * dim + d;
  const float* weights = w.scores + row * kTile;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = Vec::load(out + r * dim + v * Vec::W);
  }
  for (int64_t j = begin; j < end; ++j) {
    const auto* value = reinterpret_cast<const typename E::Raw*>(w.v_rows[j]) + d;
    F x[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) x[v] = Vec::load_as<E>(value + v * Vec::W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F weight = Vec::set1(weights[r * kTile + j]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::fma(weight, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) Vec::store(out + r * dim + v * Vec::W, acc[r][v]);
  }
}

template <class E, int R>
void add_all_columns(const Workspace& w, int64_t row, int64_t begin, int64_t end, int64_t dim) {
  constexpr int V = Vec::W == 16 ? 4 : 2;
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + V * Vec::W <= dim; d += V * Vec::W) add_values<E, R, V>(w, row, begin, end, d, dim);
  for (; d + Vec::W <= dim; d += Vec::W) add_values<E, R, 1>(w, row, begin, end, d, dim);
  if (d == dim) return;
  const int n = static_cast<int>(dim - d);
  for (int64_t r = row; r < row + R; ++r) {
    float* out = w.split.acc + r * dim + d;
    F acc = Vec::load_n(out, n);
    for (int64_t j = begin; j < end; ++j) {
      const auto* value = reinterpret_cast<const typename E::Raw*>(w.v_rows[j]) + d;
      acc = Vec::fma(Vec::set1(w.scores[r * kTile + j]), Vec::load_as_n<E>(value, n), acc);
    }
    Vec::store_n(out, acc, n);
  }
}

struct Range {
  int64_t low, high;
};

inline Range row_range(const Workspace& w, int64_t r, int64_t base) {  // inside the tile
  const int64_t low = w.low[r] > base ? w.low[r] - base : 0;
  const int64_t high = w.high[r] - base < kTile ? w.high[r] - base : kTile;
  return low < high ? Range{low, high} : Range{0, 0};
}

template <class E, int R = Vec::kRows>
void add_shared(const Workspace& w, int64_t row, int64_t count, Range range, int64_t dim) {
  if constexpr (R > 1) {
    if (count < R) return add_shared<E, R - 1>(w, row, count, range, dim);
  }
  add_all_columns<E, R>(w, row, range.low, range.high, dim);
}

// Rows whose ranges differ a little share the part that all of them see; each row still adds its
// keys in order.
template <class E>
void weigh_values(const Workspace& w, int64_t rows, int64_t base, int64_t dim) {
  for (int64_t r = 0; r < rows; r += Vec::kRows) {
    const int64_t end = r + Vec::kRows < rows ? r + Vec::kRows : rows;
    Range common{0, kTile};
    for (int64_t i = r; i < end; ++i) {
      const Range range = row_range(w, i, base);
      if (range.low > common.low) common.low = range.low;
      if (range.high < common.high) common.high = range.high;
    }
    const bool shared = common.low < common.high;
    for (int64_t i = r; i < end; ++i) {
      const Range range = row_range(w, i, base);
      add_all_columns<E, 1>(w, i, range.low, shared ? common.low : range.high, dim);
    }
    if (!shared) continue;
    add_shared<E>(w, r, end - r, common, dim);
    for (int64_t i = r; i < end; ++i) {
      add_all_columns<E, 1>(w, i, common.high, row_range(w, i, base).high, dim);
    }
  }
}

template <class E>
void add_tile(const AttentionArgs& a, const RowBlock& block, int64_t rows, int64_t base,
              Workspace& w) {
  const int64_t dim = a.k_cache.dim;
  int64_t begin = w.low[0], end = w.high[rows - 1];  // both grow with the row
  if (begin < base) begin = base;
  if (end > base + kTile) end = base + kTile;
  if (begin >= end) return;
  locate<E>(a, block, base, begin, end, w);
  transpose_keys<E>(w, dim);
  TileArgs<F32> tile_args{w.q, dim, w.keys, dim * kPanel, dim, w.scores, kTile, nullptr, kTile};
  gemm<F32>(tile_args, rows, kTilePanels);
  for (int64_t r = 0; r < rows; ++r) {
    const Range range = row_range(w, r, base);
    if (range.low < range.high)
      softmax_row(w.scores + r * kTile, range.low, range.high, w.split, r, dim);
  }
  weigh_values<E>(w, rows, base, dim);
}

Workspace open_block(const AttentionArgs& a, const RowBlock& block, int64_t rows) {
  const int64_t dim = a.k_cache.dim, group = a.q_heads / a.k_cache.heads;
  Workspace w = make_workspace(rows, dim);
  const int64_t num_tokens = a.qo_indptr[block.seq + 1] - a.qo_indptr[block.seq];
  const int64_t first_position = a.kv_len[block.seq] - num_tokens + block.first_token;
  const F scale = Vec::set1(a.scale);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = r / group, position = first_position + token;
    const int64_t t = a.qo_indptr[block.seq] + block.first_token + token;
    const float* q = a.q + t * a.q_stride + (block.kv_head * group + r % group) * dim;
    each_vec(dim, [&](int64_t i, int n) {
      Vec::store_n(w.q + r * dim + i, Vec::load_n(q + i, n) * scale, n);
    });
    w.high[r] = position + 1;
    w.low[r] = a.window > 0 && position + 1 > a.window ? position + 1 - a.window : 0;
  }
  return w;
}

template <class E>
void run_split(const AttentionArgs& a, const RowBlock& block, int64_t rows, int64_t split,
               Workspace& w) {
  reset(w.split, rows, a.k_cache.dim);
  for (int64_t base = split * kSplit; base < (split + 1) * kSplit; base += kTile)
    add_tile<E>(a, block, rows, base, w);
}

}  // namespace
}  // namespace diptych::cpu
