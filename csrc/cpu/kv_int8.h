// KV in 8 bits: how a token's keys and values are rounded, and how attention gets them back.
//
// Each token's row of each KV head has one fp32 scale of its own, so what is stored never depends on
// another token. A piece of 16 tokens is laid out as bf16's, a byte per value, and ends with its 16
// scales, which go to the scores and to the weights. Levels without byte products (attention_bytes.h)
// widen a tile into bf16, exactly, and multiply it as such.
#pragma once

#include <math.h>
#include <string.h>

#include "rounding.h"

namespace diptych::cpu {
namespace {

struct I8 {
  using Raw = int8_t;
};

// Bytes of one token's row of one head in the pool, its scale included.
template <class E>
constexpr int64_t row_bytes(int64_t dim) {
  return dim * static_cast<int64_t>(sizeof(typename E::Raw)) + (sizeof(typename E::Raw) == 1 ? 4 : 0);
}

// One token of one head; `piece`: of its 16 tokens, in which it is number `place`.
inline void round_token(char* piece, const float* x, int64_t dim, int64_t place, bool keys) {
  const float largest = largest_of(x, dim);
  const bool finite = isfinite(largest), nothing = !finite || largest < kNothing;
  const float scale = !finite ? NAN : nothing ? 0.0f : largest / kLimit8;
  const float inverse = nothing ? 0.0f : kLimit8 / largest;
  int32_t whole[kChunk];
  for (int64_t d = 0; d < dim; d += kChunk) {
    const int64_t n = dim - d < kChunk ? dim - d : kChunk;
    for (int64_t i = 0; i < n; ++i) whole[i] = nothing ? 0 : nearest(x[d + i] * inverse);
    if (keys) {
      char* out = piece + d * kPanel + place * 2;
      for (int64_t i = 0; i < n; ++i) out[i / 2 * 2 * kPanel + i % 2] = static_cast<char>(whole[i]);
    } else {
      char* out = piece + place / 2 * 2 * dim + d * 2 + place % 2;
      for (int64_t i = 0; i < n; ++i) out[i * 2] = static_cast<char>(whole[i]);
    }
  }
  memcpy(piece + kPanel * dim + place * 4, &scale, sizeof scale);
}

inline void round_tokens(const CacheView& cache, const float* x, int32_t slot, bool keys) {
  const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
  const int64_t row = row_bytes<I8>(cache.dim);
  char* piece = cache.data + block * cache.block_stride + offset / kPanel * kPanel * row;
  for (int64_t h = 0; h < cache.heads; ++h)
    round_token(piece + h * cache.block_size * row, x + h * cache.dim, cache.dim, offset % kPanel,
                keys);
}

// 16 tokens of one head: `values` becomes bf16, in the same order, `scales` their 16 scales.
inline void widen_piece(uint16_t* values, float* scales, const char* piece, int64_t dim) {
  const auto* bytes = reinterpret_cast<const int8_t*>(piece);
  for (int64_t i = 0; i < kPanel * dim; i += 32) Vec::widen_bytes(values + i, bytes + i);
  memcpy(scales, piece + kPanel * dim, kPanel * sizeof *scales);
}

}  // namespace
}  // namespace diptych::cpu
