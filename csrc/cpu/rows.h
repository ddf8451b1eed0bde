// Everything that works row by row: embedding, norms, RoPE, SiLU, KV writes, logits.
#pragma once

#include <math.h>
#include <string.h>

#include "gemm.h"
#include "kv_int8.h"
#include "pool.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kInlineValues = 1 << 14;  // smaller problems are not worth waking a thread for
constexpr int64_t kRowsMany = 8 * kPanel;   // tokens that share lines of the pool stay together

// Runs row(args, r) for all rows, several rows per work item.
template <class Args, void (*row)(const Args&, int64_t)>
void run_rows(const Args& args, int64_t rows, int64_t values_per_row) {
  struct Job {
    const Args& args;
    int64_t rows, rows_per_item;
  };
  auto item = [](void* context, int64_t index) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t first = index * job.rows_per_item;
    const int64_t end = first + job.rows_per_item < job.rows ? first + job.rows_per_item : job.rows;
    for (int64_t r = first; r < end; ++r) row(job.args, r);
  };
  int64_t per_item = kInlineValues / (values_per_row > 0 ? values_per_row : 1) + 1;
  if (rows >= kRowsMany) per_item = round_up(per_item, kPanel);
  Job job{args, rows, per_item};
  run_items((rows + per_item - 1) / per_item, item, &job);
}

template <class Fn>
inline void each_vec(int64_t n, Fn fn) {  // fn(offset, lanes)
  int64_t i = 0;
  for (; i + Vec::W <= n; i += Vec::W) fn(i, Vec::W);
  if (i < n) fn(i, static_cast<int>(n - i));
}

// e^x for each lane; 0 below -86.5, about 1 ulp otherwise; NaN stays NaN.
inline F exp_vec(F x) {
  const F limit = Vec::set1(-86.5f),
          magic = Vec::set1(12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
  const F clamped = Vec::min(Vec::set1(88.0f), Vec::max(limit, x));
  const F biased = Vec::fma(clamped, Vec::set1(1.44269504088896341f), magic);
  const F n = biased - magic;
  F r = Vec::fma(n, Vec::set1(-0.693359375f), clamped);
  r = Vec::fma(n, Vec::set1(2.12194440e-4f), r);
  F p = Vec::set1(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set1(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set1(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set1(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set1(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set1(5.0000001201e-1f));
  p = Vec::fma(p, r * r, r) + Vec::set1(1.0f);
  return Vec::zero_below(x, limit, Vec::mul_pow2(p, biased));
}

// 2^x for each lane of x <= 0; 0 below -125, about 1 ulp otherwise; NaN stays NaN.
inline F exp2_vec(F x) {
  const F limit = Vec::set1(-125.0f), magic = Vec::set1(12582912.0f);
  const F clamped = Vec::max(limit, x);
  const F biased = clamped + magic;
  const F r = (clamped - (biased - magic)) * Vec::set1(0.693147180559945f);
  F p = Vec::set1(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set1(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set1(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set1(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set1(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set1(5.0000001201e-1f));
  p = Vec::fma(p, r * r, r) + Vec::set1(1.0f);
  return Vec::zero_below(x, limit, Vec::mul_pow2(p, biased));
}

inline float exp_one(float x) {
  float lanes[Vec::W];
  Vec::store(lanes, exp_vec(Vec::set1(x)));
  return lanes[0];
}

template <class E>
void embedding_row(const EmbeddingArgs& a, int64_t t) {
  const auto* in = static_cast<const typename E::Raw*>(a.table) + a.ids[t] * a.dim;
  float* out = a.out + t * a.dim;
  each_vec(a.dim,
           [&](int64_t i, int n) { Vec::store_n(out + i, Vec::load_as_n<E>(in + i, n), n); });
}

// A column of packed weights: slow per value, but a token asks for one.
template <class E>
void embedding_column(const EmbeddingArgs& a, int64_t t) {
  constexpr int64_t unit = Operand<E>::kActsPerStep;  // inputs that lie side by side
  const int64_t padded = unit == 1 ? a.dim : round_up(a.dim, kPairInputs);
  const int64_t panel = a.ids[t] / kPanel, column = a.ids[t] % kPanel;
  const auto* in =
      static_cast<const typename E::Raw*>(a.table) + panel * padded * kPanel + column * unit;
  float* out = a.out + t * a.dim;
  for (int64_t k = 0; k < a.dim; ++k) out[k] = E::to_float(in[k / unit * unit * kPanel + k % unit]);
}

void embedding(const EmbeddingArgs& a) {
  if (a.packed) {
    if (a.dtype == DType::kF32) run_rows<EmbeddingArgs, embedding_column<F32>>(a, a.rows, a.dim);
    if (a.dtype == DType::kBF16) run_rows<EmbeddingArgs, embedding_column<BF16>>(a, a.rows, a.dim);
    if (a.dtype == DType::kF16) run_rows<EmbeddingArgs, embedding_column<F16>>(a, a.rows, a.dim);
    return;
  }
  if (a.dtype == DType::kF32) run_rows<EmbeddingArgs, embedding_row<F32>>(a, a.rows, a.dim);
  if (a.dtype == DType::kBF16) run_rows<EmbeddingArgs, embedding_row<BF16>>(a, a.rows, a.dim);
  if (a.dtype == DType::kF16) run_rows<EmbeddingArgs, embedding_row<F16>>(a, a.rows, a.dim);
}

void norm_row_to(const NormArgs& a, int64_t t, float* out) {
  const float* x = a.x + t * a.dim;
  if (a.residual != nullptr) {
    float* residual = a.residual + t * a.dim;
    each_vec(a.dim, [&](int64_t i, int n) {
      Vec::store_n(residual + i, Vec::load_n(residual + i, n) + Vec::load_n(x + i, n), n);
    });
    x = residual;
  }
  F squares = Vec::set1(0.0f);
  each_vec(a.dim, [&](int64_t i, int n) {
    const F v = Vec::load_n(x + i, n);
    squares = Vec::fma(v, v, squares);
  });
  const F inverse = Vec::set1(1.0f / sqrtf(Vec::sum(squares) / static_cast<float>(a.dim) + a.eps));
  each_vec(a.dim, [&](int64_t i, int n) {
    Vec::store_n(out + i, Vec::load_n(x + i, n) * inverse * Vec::load_n(a.weight + i, n), n);
  });
}

void norm_row(const NormArgs& a, int64_t t) { norm_row_to(a, t, a.out + t * a.dim); }

void norm(const NormArgs& a) { run_rows<NormArgs, norm_row>(a, a.rows, a.dim); }

void rope_head(float* x, const float* cos, const float* sin, int64_t half) {
  each_vec(half, [&](int64_t i, int n) {
    const F low = Vec::load_n(x + i, n), high = Vec::load_n(x + half + i, n);
    const F c = Vec::load_n(cos + i, n), s = Vec::load_n(sin + i, n);
    Vec::store_n(x + i, low * c - high * s, n);
    Vec::store_n(x + half + i, high * c + low * s, n);
  });
}

void rope_row(const RopeArgs& a, int64_t t) {
  const int64_t half = a.dim / 2;
  const float *cos = a.cos_sin + a.positions[t] * a.dim, *sin = cos + half;
  for (int64_t h = 0; h < a.q_heads; ++h)
    rope_head(a.q + t * a.q_stride + h * a.dim, cos, sin, half);
  for (int64_t h = 0; h < a.k_heads; ++h)
    rope_head(a.k + t * a.k_stride + h * a.dim, cos, sin, half);
}

void rope(const RopeArgs& a) {
  run_rows<RopeArgs, rope_row>(a, a.rows, (a.q_heads + a.k_heads) * a.dim);
}

inline F silu_of(F gate, F up) {
  return gate / (Vec::set1(1.0f) + exp_vec(Vec::set1(0.0f) - gate)) * up;
}

// out = silu(gate) * up, of n values.
inline void silu_values(float* out, const float* gate, const float* up, int64_t n) {
  each_vec(n, [&](int64_t i, int lanes) {
    Vec::store_n(out + i, silu_of(Vec::load_n(gate + i, lanes), Vec::load_n(up + i, lanes)), lanes);
  });
}

// The same as bf16, n a multiple of kPanel; on levels where somebody takes it (takes_rounded).
inline void silu_rounded(uint16_t* out, const float* gate, const float* up, int64_t n) {
  if constexpr (Vec::kBf16Dot) {
    for (int64_t i = 0; i < n; i += Vec::W)
      Vec::store_bf16(out + i, silu_of(Vec::load(gate + i), Vec::load(up + i)));
  }
}

void silu_row_to(const SiluArgs& a, int64_t t, float* out) {
  const float* gate = a.gate_up + t * 2 * a.dim;
  silu_values(out, gate, gate + a.dim, a.dim);
}

void silu_row(const SiluArgs& a, int64_t t) { silu_row_to(a, t, a.out + t * a.dim); }

void silu_mul(const SiluArgs& a) { run_rows<SiluArgs, silu_row>(a, a.rows, 4 * a.dim); }

// One token into a head's piece of the pool, see CacheView. Single values are stored, so two threads
// may write the tokens of one pair.
template <class E>
void write_rows(const CacheView& cache, const float* x, int32_t slot, bool keys) {
  constexpr int64_t unit = Operand<E>::kActsPerStep, chunk = 64;
  const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
  const int64_t start = keys ? offset / kPanel * kPanel * cache.dim + offset % kPanel * unit
                             : offset / unit * unit * cache.dim + offset % unit;
  auto* out = reinterpret_cast<typename E::Raw*>(cache.data) + block * cache.block_stride + start;
  typename E::Raw values[chunk];
  for (int64_t h = 0; h < cache.heads; ++h, out += cache.block_size * cache.dim, x += cache.dim) {
    for (int64_t d = 0; d < cache.dim; d += chunk) {
      const int64_t n = cache.dim - d < chunk ? cache.dim - d : chunk;
      convert_row<E>(values, x + d, n);
      if (!keys) {
        for (int64_t i = 0; i < n; ++i) out[(d + i) * unit] = values[i];
      } else {
        for (int64_t i = 0; i < n; i += unit)
          memcpy(out + (d + i) * kPanel, values + i, sizeof values[0] * unit);
      }
    }
  }
}

template <class E>
void write_kv_row(const WriteKvArgs& a, int64_t t) {
  if (a.slots[t] < 0) return;
  write_rows<E>(a.k_cache, a.k + t * a.k_stride, a.slots[t], true);
  write_rows<E>(a.v_cache, a.v + t * a.v_stride, a.slots[t], false);
}

void write_kv_row_int8(const WriteKvArgs& a, int64_t t) {
  if (a.slots[t] < 0) return;
  round_tokens(a.k_cache, a.k + t * a.k_stride, a.slots[t], true);
  round_tokens(a.v_cache, a.v + t * a.v_stride, a.slots[t], false);
}

void write_kv(const WriteKvArgs& a) {
  const int64_t values = 2 * a.k_cache.heads * a.k_cache.dim;
  if (a.k_cache.dtype == DType::kF32) run_rows<WriteKvArgs, write_kv_row<F32>>(a, a.rows, values);
  if (a.k_cache.dtype == DType::kBF16) run_rows<WriteKvArgs, write_kv_row<BF16>>(a, a.rows, values);
  if (a.k_cache.dtype == DType::kF16) run_rows<WriteKvArgs, write_kv_row<F16>>(a, a.rows, values);
  if (a.k_cache.dtype == DType::kI8) run_rows<WriteKvArgs, write_kv_row_int8>(a, a.rows, values);
}

}  // namespace
}  // namespace diptych::cpu
