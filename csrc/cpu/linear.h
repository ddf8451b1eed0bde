// Packing of weights, and linear layers over them.
#pragma once

#include <string.h>

#include "cut.h"
#include "gemm.h"
#include "integers.h"
#include "pool.h"
#include "rows.h"
#if defined(__AMX_BF16__)
#include "linear_tiles.h"
#include "narrow_tiles.h"
#elif defined(__AVX512BF16__)
#include "narrow_pairs.h"
#endif

namespace diptych::cpu {
namespace {

// `inputs` (a multiple of 32) inputs of a full panel of bf16, in squares of 16 pairs by 16 outputs
// that stay in the first cache.
inline void pack_pairs(uint16_t* out, const uint16_t* rows, int64_t stride, int64_t inputs) {
  for (int64_t k = 0; k < inputs; k += 2 * kPanel, out += 2 * kPanel * kPanel) {
    for (int64_t c = 0; c < kPanel; ++c) {
      uint32_t pairs[kPanel];
      memcpy(pairs, rows + c * stride + k, sizeof pairs);
      for (int64_t i = 0; i < kPanel; ++i) memcpy(out + 2 * (i * kPanel + c), pairs + i, 4);
    }
  }
}

template <class E>
void pack_panel(const PackArgs& a, int64_t panel) {
  constexpr int64_t unit = Operand<E>::kActsPerStep;  // inputs that lie side by side
  const int64_t padded = unit == 1 ? a.num_in : round_up(a.num_in, kPairInputs);
  auto* out = static_cast<typename E::Raw*>(a.packed) + panel * padded * kPanel;
  const auto* weight = static_cast<const typename E::Raw*>(a.weight);
  int64_t done = 0;  // inputs
  if constexpr (unit == 2) {
    if ((panel + 1) * kPanel <= a.num_out) {
      done = a.num_in / (2 * kPanel) * (2 * kPanel);
      pack_pairs(reinterpret_cast<uint16_t*>(out),
                 reinterpret_cast<const uint16_t*>(weight) + panel * kPanel * a.num_in, a.num_in,
                 done);
    }
  }
  for (int64_t c = 0; c < kPanel; ++c) {
    const int64_t n = panel * kPanel + c;
    const auto* row = weight + n * a.num_in;
    for (int64_t k = done; k < padded; ++k) {
      const bool inside = n < a.num_out && k < a.num_in;
      out[(k / unit) * unit * kPanel + c * unit + k % unit] = inside ? row[k] : typename E::Raw(0);
    }
  }
}

void pack(const PackArgs& args) {
  auto item = [](void* context, int64_t panel) {
    const auto& a = *static_cast<const PackArgs*>(context);
    if (a.dtype == DType::kF32) pack_panel<F32>(a, panel);
    if (a.dtype == DType::kBF16) pack_panel<BF16>(a, panel);
    if (a.dtype == DType::kF16) pack_panel<F16>(a, panel);
  };
  run_items((args.num_out + kPanel - 1) / kPanel, item, const_cast<PackArgs*>(&args));
}

template <class E>
struct LinearJob {
  const LinearArgs& a;
  const typename Operand<E>::Act* x;
  int64_t x_stride;
  Cut cut;

  static constexpr bool kBf16 = Operand<E>::kRawPerStep == 2 * kPanel;

  void part(const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) const {
    TileArgs<E> t;
    t.x = x + place.row * x_stride;
    t.x_stride = x_stride;
    t.out = sums.at;
    t.out_stride = sums.stride;
    t.columns = sums.columns;
    t.ahead = ahead;
    const int64_t inputs = kBf16 ? padded_inputs(a) : a.num_in;
    t.panel_stride = inputs * kPanel;
    t.w = static_cast<const typename E::Raw*>(a.w) + panel * t.panel_stride;
    t.steps = Operand<E>::steps(inputs);
    t.bias = a.bias == nullptr ? nullptr : a.bias + panel * kPanel;
    gemm<E>(t, place.rows, place.panels);
  }
};

template <class E>
void linear_with(const LinearArgs& a, const typename Operand<E>::Act* x, int64_t x_stride) {
  using Act = typename Operand<E>::Act;
  const int64_t panels = panels_to_cut(a);
  const int64_t most = rows_for_all(panels / kGroupPanels, rows_that_fit(x_stride * sizeof(Act)));
  LinearJob<E> job{a, x, x_stride,
                   {panels, a.rows, kGroupPanels, most, Vec::kRows}};
  run_unless_small(job.cut.items, run_parts<LinearJob<E>>, &job, a.rows * a.num_out * a.num_in);
}

#ifdef __AMX_BF16__
void linear_bf16(const LinearArgs& a) {
  if (a.width == Width::kInt4) return nibbles_by_pairs(a);
  linear_tiles(a);
}
#else
inline bool adds_up(const LinearWeights&) { return false; }

// Whether `to` may have rows of bf16 that lie as those of x do.
inline bool takes_rounded_rows(const LinearWeights& to) {
  const bool pairs = to.width == Width::kModel ? to.dtype == DType::kBF16
                                               : to.width == Width::kInt8 && to.act_bits == 16;
  return kPairs && pairs && padded_inputs(to) == to.num_in;
}
inline bool takes_rounded(const LinearWeights& to, const LinearWeights&, int64_t) {
  return takes_rounded_rows(to);
}

// bf16: every row of x rounded once, as pairs or as the floats that the level multiplies.
struct RoundJob {
  const LinearArgs& a;
  void* out;
  int64_t stride;  // values, even

  static void item(void* context, int64_t row) {
    const auto& job = *static_cast<const RoundJob*>(context);
    const int64_t k = job.a.num_in;
    const float* x = row_of(job.a, row);
    if constexpr (kPairs) {
      auto* out = static_cast<uint16_t*>(job.out) + row * job.stride;
      int64_t whole = 0;
      if constexpr (Vec::kBf16Dot) {
        for (; whole + Vec::W <= k; whole += Vec::W)
          Vec::store_bf16(out + whole, Vec::load(x + whole));
      }
      convert_row<BF16>(out + whole, x + whole, k - whole);
      for (int64_t i = k; i < job.stride; ++i) out[i] = 0;
#ifdef __AVX512BF16__
      if (job.a.width == Width::kInt4) Nibbles::order(out, job.stride);
#endif
    } else {
      auto* out = static_cast<float*>(job.out) + row * job.stride;
      round_to_bf16(out, x, k);
      for (int64_t i = k; i < job.stride; ++i) out[i] = 0.0f;
    }
  }
};

void linear_bf16(const LinearArgs& a) {
  const int64_t stride = padded_inputs(a);
  const void* rounded = a.x;
  if (!a.rounded_x) {
    void* memory = scratch(kScratchCall, static_cast<size_t>(a.rows * stride) * (kPairs ? 2 : 4));
    RoundJob job{a, memory, stride};
    round_rows(a, RoundJob::item, &job, true);
    rounded = memory;
  }
#ifdef __AVX512BF16__
  if (a.width != Width::kModel) {
    const auto* pairs = static_cast<const uint32_t*>(rounded);
    NarrowJob narrow{a, pairs, stride / 2,
                     {panels_to_cut(a), a.rows, kGroupPanels, rows_that_fit(stride * 2), Vec::kRows}};
    run_unless_small(narrow.cut.items, run_parts<NarrowJob>, &narrow, a.rows * a.num_out * a.num_in);
    return;
  }
#endif
  if constexpr (kPairs) {
    linear_with<BF16Pairs>(a, static_cast<const uint32_t*>(rounded), stride / 2);
  } else {
    linear_with<BF16>(a, static_cast<const float*>(rounded), stride);
  }
}
#endif

void linear_integers(const LinearArgs& a) {
#ifdef DIPTYCH_WORDS
  const bool words = a.width == Width::kInt8 || a.act_bits == 16;
#else
  constexpr bool words = false;
#endif
  const int64_t limbs = words ? 1 : a.act_bits / 8, stride = padded_inputs(a);
  const int64_t group = a.width == Width::kInt4 ? a.group
                        : words && a.act_bits == 16 && stride > kWordInputs ? kWordInputs : stride;
  const int64_t groups = (stride + group - 1) / group;
  const int64_t byte_rows = a.rows * limbs;
#ifdef __AMX_BF16__
  const bool tiles = integers_want_tiles(a);
#else
  constexpr bool tiles = false;
#endif
  const int64_t item = words ? 2 : 1, value_bytes = byte_rows * stride * item,
                sum_bytes = round_up(byte_rows * groups * 4, 64);
  auto* memory = static_cast<char*>(
      scratch(kScratchCall, static_cast<size_t>(value_bytes + sum_bytes + a.rows * 4)));
  const IntegerRows q{reinterpret_cast<int8_t*>(memory),
                      reinterpret_cast<int32_t*>(memory + value_bytes),
                      reinterpret_cast<float*>(memory + value_bytes + sum_bytes),
                      stride,
                      limbs,
                      groups,
                      group,
                      a.width == Width::kInt4 ? kZero4 : kZero8,
                      byte_rows,
                      tiles,
                      item};
  IntegerRowsJob rounding{a, q};
  round_rows(a, IntegerRowsJob::item, &rounding);
#ifdef __AMX_BF16__
  if (tiles) return integers_on_tiles(a, q);
#endif
  const int64_t panels = panels_to_cut(a);
  const int64_t most = rows_for_all(panels / kGroupPanels, rows_that_fit(item * limbs * stride));
  IntegerJob job{a, q, {panels, a.rows, kGroupPanels, most, Vec::kRows / limbs}};
  run_unless_small(job.cut.items, run_parts<IntegerJob>, &job, a.rows * a.num_out * a.num_in);
}

void linear(const LinearArgs& a) {
  if (a.rows == 0) return;
  // Where pairs of bf16 are as fast as bytes, rows of 16 bits are bf16; on tiles bytes are faster, but
  // not in the groups of int4.
  const bool pairs = kPairs && a.act_bits == 16 && !(kTiles && a.width == Width::kInt8);
  const bool integers = a.width != Width::kModel && !pairs;
  if (integers) return linear_integers(a);
  if (a.width != Width::kModel || a.dtype == DType::kBF16) return linear_bf16(a);
  if (a.maker.make != nullptr) round_rows(a, nullptr, nullptr);  // only made: read as it is
  if (a.dtype == DType::kF32) return linear_with<F32>(a, a.x, a.num_in);
  linear_with<F16>(a, a.x, a.num_in);
}

}  // namespace
}  // namespace diptych::cpu
