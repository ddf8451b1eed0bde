// One whole decoder layer in one call: what Python would otherwise ask for in a dozen.
//
// Owns no memory. The steps between matrix products are done row by row where a row is next read:
// norms and SiLU just before a row is rounded, norms of heads, RoPE and the write into the pool in
// one pass. Invariant: each value goes through the same operations in the same order as by single
// calls of the kernels, so the bits are theirs.
#pragma once

#include "attention.h"
#include "linear.h"
#include "rows.h"

namespace diptych::cpu {
namespace {

template <class Args, void (*row)(const Args&, int64_t, float*)>
RowMaker maker_of(const Args& args, int64_t values) {
  auto make = [](const void* args, int64_t t, float* to) {
    row(*static_cast<const Args*>(args), t, to);
  };
  return {make, &args, values};
}

void norm_heads(float* heads, int64_t count, const float* weight, const DecoderShape& shape) {
  const NormArgs args{heads, nullptr, heads, weight, count, shape.dim, shape.eps};
  for (int64_t h = 0; h < count; ++h) norm_row(args, h);
}

struct PlaceArgs {
  const LayerArgs& layer;
  WriteKvArgs kv;
};

// Queries and keys of one token made ready, its keys and values written into the pool.
template <void (*write)(const WriteKvArgs&, int64_t)>
void place_row(const PlaceArgs& a, int64_t t) {
  const DecoderShape& shape = a.layer.shape;
  const LayerWeights& w = a.layer.weights;
  const int64_t dim = shape.dim, half = dim / 2;
  float *q = a.layer.step.qkv + t * w.qkv.num_out, *k = q + shape.q_heads * dim;
  if (w.q_norm != nullptr) {
    norm_heads(q, shape.q_heads, w.q_norm, shape);
    norm_heads(k, shape.kv_heads, w.k_norm, shape);
  }
  const float *cos = shape.cos_sin + a.layer.step.positions[t] * dim, *sin = cos + half;
  for (int64_t h = 0; h < shape.q_heads + shape.kv_heads; ++h)  // keys lie behind queries
    rope_head(q + h * dim, cos, sin, half);
  write(a.kv, t);
}

void place(const LayerArgs& a) {
  const LayerWeights& w = a.weights;
  const int64_t rows = a.step.rows, values = w.qkv.num_out;
  const float* k = a.step.qkv + a.shape.q_heads * a.shape.dim;
  const float* v = k + a.shape.kv_heads * a.shape.dim;
  const PlaceArgs args{a, {w.k_cache, w.v_cache, k, v, values, values, a.step.slots, rows}};
  const DType dtype = w.k_cache.dtype;
  if (dtype == DType::kF32)
    run_rows<PlaceArgs, place_row<write_kv_row<F32>>>(args, rows, values);
  if (dtype == DType::kBF16)
    run_rows<PlaceArgs, place_row<write_kv_row<BF16>>>(args, rows, values);
  if (dtype == DType::kF16)
    run_rows<PlaceArgs, place_row<write_kv_row<F16>>>(args, rows, values);
  if (dtype == DType::kI8)
    run_rows<PlaceArgs, place_row<write_kv_row_int8>>(args, rows, values);
}

struct AddArgs {
  float* to;       // [rows, dim]
  const float* x;  // [rows, dim]
  int64_t dim;
};

void add_row(const AddArgs& a, int64_t t) {
  const int64_t dim = a.dim;
  float* to = a.to + t * dim;
  const float* x = a.x + t * dim;
  each_vec(dim, [&](int64_t i, int n) {
    Vec::store_n(to + i, Vec::load_n(to + i, n) + Vec::load_n(x + i, n), n);
  });
}

// The needed rows, `width` floats each, to the front: no row is lost, each moves to a smaller place.
void gather(const LastRows& needed, float* x, int64_t width, int64_t stride) {
  for (int64_t i = 0; i < needed.step.rows; ++i)
    memmove(x + i * stride, x + needed.rows[i] * stride, static_cast<size_t>(width) * 4);
}

void scatter(const LastRows& needed, float* x, int64_t width) {
  for (int64_t i = needed.step.rows - 1; i >= 0; --i)
    memmove(x + needed.rows[i] * width, x + i * width, static_cast<size_t>(width) * 4);
}

// Into `hidden`, or where the layer can do that, added to `residual`.
void mix(LinearArgs args, const StepArgs& s) {
  args.add = adds_up(args);
  if (args.add) args.out = s.residual;
  linear(args);
}

// Of all that was computed; `hidden` is yet to be added to it if `mixed` has left it there.
NormArgs norm_of(const StepArgs& s, const float* weight, const DecoderShape& shape,
                 const LinearWeights* mixed) {
  const bool pending = mixed != nullptr && !adds_up(*mixed);
  return {s.hidden, pending ? s.residual : nullptr, pending ? s.hidden : s.residual,
          weight,   s.rows,                         shape.hidden, shape.eps};
}

// The layer from the step's queries on.
void attend_and_mix(const LayerArgs& a, const StepArgs& s) {
  const LayerWeights& w = a.weights;
  const DecoderShape& shape = a.shape;
  const int64_t rows = s.rows;
  const bool rounded_heads = takes_rounded_rows(w.o);
  attention({s.attention, s.qkv, w.qkv.num_out, w.k_cache, w.v_cache, s.qo_indptr, s.kv_indptr,
             s.kv_indices, s.kv_len, s.num_seqs, shape.q_heads, shape.scale, w.window,
             rounded_heads});
  mix({w.o, s.hidden, s.attention, rows, {}, &w.gate_up, false, rounded_heads}, s);
  const NormArgs between = norm_of(s, w.mlp_norm, shape, &w.o);
  const RowMaker norm = maker_of<NormArgs, norm_row_to>(between, 2 * shape.hidden);
  if (w.gate_up.num_out % (2 * kPanel) == 0) {
    const bool rounded = takes_rounded(w.down, w.gate_up, rows);
    linear({w.gate_up, s.inner, s.hidden, rows, norm, &w.down, true, false, rounded});
    mix({w.down, s.hidden, s.inner, rows, {}, a.next, false, rounded}, s);
  } else {
    linear({w.gate_up, s.gate_up, s.hidden, rows, norm, &w.down});
    const SiluArgs silu{s.inner, s.gate_up, rows, shape.inner};
    mix({w.down, s.hidden, s.inner, rows,
         maker_of<SiluArgs, silu_row_to>(silu, 4 * shape.inner), a.next}, s);
  }
  if (!a.last || adds_up(w.down)) return;
  const AddArgs add{s.residual, s.hidden, shape.hidden};
  run_rows<AddArgs, add_row>(add, rows, shape.hidden);
}

void layer(const LayerArgs& a) {
  const LayerWeights& w = a.weights;
  const DecoderShape& shape = a.shape;
  const StepArgs& s = a.step;
  const int64_t rows = s.rows;
  const NormArgs before =
      norm_of(s, w.attn_norm, shape, a.previous == nullptr ? nullptr : &a.previous->down);
  linear({w.qkv, s.qkv, s.hidden, rows, maker_of<NormArgs, norm_row_to>(before, 2 * shape.hidden),
          &w.o});
  place(a);
  if (a.needed == nullptr) return attend_and_mix(a, s);
  if (a.needed->step.rows == 0) return;
  gather(*a.needed, s.qkv, shape.q_heads * shape.dim, w.qkv.num_out);
  gather(*a.needed, s.residual, shape.hidden, shape.hidden);
  attend_and_mix(a, a.needed->step);
  scatter(*a.needed, s.residual, shape.hidden);
}

}  // namespace
}  // namespace diptych::cpu
