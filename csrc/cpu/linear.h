// Packing of weights, and linear layers over them.
#pragma once

#include <string.h>

#include "cut.h"
#include "gemm.h"
#include "integers.h"
#include "pool.h"
#include "rows.h"
#if defined(__AMX_BF16__)
#include "narrow.h"
#elif defined(__AVX512BF16__)
#include "narrow_pairs.h"
#endif

namespace diptych::cpu {
namespace {

constexpr int64_t kGroupPanelsMax = 16;  // on tiles, with many rows
constexpr int64_t kInlineProducts = 1 << 15;  // smaller problems are not worth waking a thread for
constexpr int64_t kRowValuesPerItem = 1 << 12;  // that are made or rounded
constexpr int64_t kFewRows = 32;              // of an item
constexpr int64_t kPieceFewRows = 128;  // inputs of narrow weights widened at once: first cache
// Inputs of one pass over an item with many rows: on tiles, 32 rows of a pass stay in the first
// cache and the whole pass in the second.
constexpr int64_t kPieceManyRows = 512;

inline void run_unless_small(int64_t items, ItemFn fn, void* context, int64_t work) {
  if (work >= kInlineProducts) return run_items(items, fn, context);
  for (int64_t i = 0; i < items; ++i) fn(context, i);
}

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

  static void item(void* context, int64_t index) {
    const auto& job = *static_cast<const LinearJob*>(context);
    each_part(job.a, job.cut, index,
              [&](const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) {
                job.part(place, panel, sums, ahead);
              });
  }

  void part(const Place& place, int64_t panel, const Sums& sums, Ahead ahead) const {
    TileArgs<E> t;
    t.x = x + place.row * x_stride;
    t.x_stride = x_stride;
    t.out = sums.at;
    t.out_stride = sums.stride;
    t.columns = sums.columns;
    t.ahead = ahead;
    if constexpr (kBf16) {
      passes(t, place.rows, panel, place.panels);
    } else {
      t.panel_stride = a.num_in * kPanel;
      t.w = static_cast<const typename E::Raw*>(a.w) + panel * t.panel_stride;
      t.steps = a.num_in;
      t.bias = a.bias == nullptr ? nullptr : a.bias + panel * kPanel;
      gemm<E>(t, place.rows, place.panels);
    }
  }

  // Over K in pieces that suit the caches; the sums go on where the last piece left them, so the
  // pieces are invisible in the result.
  void passes(TileArgs<E> t, int64_t rows, int64_t first_panel, int64_t panels) const {
    const int64_t padded = padded_inputs(a), column = first_panel * kPanel;
    const bool narrow = kTiles && a.width != Width::kModel, few = rows <= kFewRows;
    int64_t piece = padded;
    if (narrow && few) piece = kPieceFewRows;
    if (!few && kTiles) piece = kPieceManyRows;
    // Rows of a wide `out` lie in few sets of the cache, so sums that are to stay there are apart.
    const bool apart = kTiles && !few;
    const int64_t columns = panels * kPanel;
    [[maybe_unused]] const Sums to{t.out, t.out_stride, t.columns < columns ? t.columns : columns};
    const int64_t wide_bytes = narrow ? columns * piece * 2 : 0;
    auto* memory = static_cast<char*>(scratch(
        kScratchItem, static_cast<size_t>(wide_bytes + (apart ? rows * columns * 4 : 0))));
    auto* wide = reinterpret_cast<uint16_t*>(memory);
    t.panel_stride = (narrow ? piece : padded) * kPanel;
    if (apart) {
      t.out = reinterpret_cast<float*>(memory + wide_bytes);
      t.out_stride = t.columns = columns;
    }
    const typename Operand<E>::Act* first_x = t.x;
    for (int64_t k = 0; k < padded; k += piece) {
      const int64_t inputs = padded - k < piece ? padded - k : piece;
#ifdef __AMX_BF16__
      for (int64_t p = 0; narrow && p < panels; ++p)
        widen(a, padded, first_panel + p, k, inputs, wide + p * t.panel_stride);
#endif
      if (narrow) {
        t.w = wide;
      } else {
        t.w = static_cast<const uint16_t*>(a.w) + first_panel * t.panel_stride + k * kPanel;
      }
      if constexpr (kTiles) {
        t.first_step = k / 2;
      } else {
        t.x = first_x + k / 2 * Operand<E>::kActsPerStep;
      }
      t.steps = inputs / 2;
      t.accumulate = k > 0;
      const bool add = !narrow && !apart && a.bias != nullptr && k + piece >= padded;
      t.bias = add ? a.bias + column : nullptr;
      gemm<E>(t, rows, panels);
    }
#ifdef __AMX_BF16__
    if (narrow || apart) finish(a, t.out, t.out_stride, rows, column, to);
#endif
  }
};

// `most` rows of an item, or fewer where there are few groups of columns.
inline int64_t rows_for_all(int64_t groups, int64_t most) {
  return groups < 4 * num_threads() && most > kRowsPerItem ? kRowsPerItem : most;
}

template <class E>
void linear_with(const LinearArgs& a, const typename Operand<E>::Act* x, int64_t x_stride) {
  using Act = typename Operand<E>::Act;
  const int64_t panels = panels_to_cut(a), wanted = 4 * num_threads();
  const bool tiles = kTiles && LinearJob<E>::kBf16;
  int64_t group_panels = kGroupPanels;
  if (tiles && a.rows > kFewRows) {
    group_panels = kGroupPanelsMax;
    while (group_panels > kGroupPanels && panels < wanted * group_panels) group_panels /= 2;
  }
  int64_t most = tiles ? kRowsPerItemMax : rows_that_fit(x_stride * sizeof(Act));
  // Items of narrow weights all widen their columns, so rows are the last thing to be cut.
  if (a.width == Width::kModel) most = rows_for_all(panels / group_panels, most);
  LinearJob<E> job{a, x, x_stride,
                   {panels, a.rows, group_panels, most, tiles ? 2 * kPanel : Vec::kRows}};
  run_unless_small(job.cut.items, LinearJob<E>::item, &job, a.rows * a.num_out * a.num_in);
}

// Makes (where asked) and rounds every row of x, some neighbouring rows per work item.
struct EachRow {
  const LinearArgs& a;
  ItemFn round;
  void* context;
  int64_t rows_per_item;

  static void item(void* context, int64_t index) {
    const auto& job = *static_cast<const EachRow*>(context);
    const LinearArgs& a = job.a;
    const int64_t first = index * job.rows_per_item, left = a.rows - first;
    const int64_t end = first + (left < job.rows_per_item ? left : job.rows_per_item);
    for (int64_t row = first; row < end; ++row) {
      if (a.maker.make != nullptr) a.maker.make(a.maker.args, row);
      if (job.round != nullptr) job.round(job.context, row);
    }
  }
};

inline void round_rows(const LinearArgs& a, ItemFn round, void* context) {
  const int64_t values = (round == nullptr ? 0 : a.num_in) + a.maker.values;
  const int64_t per_item = kRowValuesPerItem / values + 1;
  EachRow job{a, round, context, per_item};
  run_unless_small((a.rows + per_item - 1) / per_item, EachRow::item, &job, a.rows * values);
}

// bf16: every row of x rounded once, as pairs or as the floats that the level multiplies.
struct RoundJob {
  const LinearArgs& a;
  void* out;
  int64_t stride;  // values, even

  static void item(void* context, int64_t row) {
    const auto& job = *static_cast<const RoundJob*>(context);
    const float* x = job.a.x + row * job.a.num_in;
    const int64_t k = job.a.num_in;
    if constexpr (kTiles) {
      constexpr int64_t height = 16, width = kPairInputs;  // of a tile, see gemm_amx.h
      const int64_t block = row / height * height, left = job.a.rows - block;
      const int64_t rows = left < height ? left : height;
      auto* out = static_cast<uint16_t*>(job.out) + block * job.stride + (row - block) * width;
      int64_t i = 0;
      for (; i + width <= k; i += width) convert_row<BF16>(out + i * rows, x + i, width);
      for (; i < job.stride; i += width) {
        const int64_t inside = k - i < 0 ? 0 : k - i;
        convert_row<BF16>(out + i * rows, x + i, inside);
        for (int64_t j = inside; j < width; ++j) out[i * rows + j] = 0;
      }
    } else if constexpr (kPairs) {
      auto* out = static_cast<uint16_t*>(job.out) + row * job.stride;
      int64_t whole = 0;
      if constexpr (Vec::kBf16Dot) {
        for (; whole + Vec::W <= k; whole += Vec::W)
          Vec::store_bf16(out + whole, Vec::load(x + whole));
      }
      convert_row<BF16>(out + whole, x + whole, k - whole);
      for (int64_t i = k; i < job.stride; ++i) out[i] = 0;
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
      if (job.a.width == Width::kInt4) Nibbles::order(out, job.stride);
#endif
    } else {
      auto* out = static_cast<float*>(job.out) + row * job.stride;
      for (int64_t i = 0; i < k; ++i) out[i] = BF16::to_float(BF16::from_float(x[i]));
      for (int64_t i = k; i < job.stride; ++i) out[i] = 0.0f;
    }
  }
};

void linear_bf16(const LinearArgs& a) {
  const int64_t stride = padded_inputs(a);
  void* rounded = scratch(kScratchCall, static_cast<size_t>(a.rows * stride) * (kPairs ? 2 : 4));
  RoundJob job{a, rounded, stride};
  round_rows(a, RoundJob::item, &job);
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if (a.width != Width::kModel) {
    const auto* pairs = static_cast<const uint32_t*>(rounded);
    NarrowJob narrow{a, pairs, stride / 2,
                     {panels_to_cut(a), a.rows, kGroupPanels, rows_that_fit(stride * 2), Vec::kRows}};
    run_unless_small(narrow.cut.items, NarrowJob::item, &narrow, a.rows * a.num_out * a.num_in);
    return;
  }
#endif
  if constexpr (kPairs) {
    linear_with<BF16Pairs>(a, static_cast<const uint32_t*>(rounded), stride / 2);
  } else {
    linear_with<BF16>(a, static_cast<const float*>(rounded), stride);
  }
}

void linear_integers(const LinearArgs& a) {
  const int64_t limbs = a.act_bits / 8, stride = padded_inputs(a);
  const int64_t group = a.width == Width::kInt4 ? a.group : stride, groups = stride / group;
  const int64_t byte_rows = a.rows * limbs;
  const int64_t value_bytes = byte_rows * stride, sum_bytes = round_up(byte_rows * groups * 4, 64);
  auto* memory = static_cast<char*>(
      scratch(kScratchCall, static_cast<size_t>(value_bytes + sum_bytes + a.rows * 4)));
  const IntegerRows q{reinterpret_cast<int8_t*>(memory),
                      reinterpret_cast<int32_t*>(memory + value_bytes),
                      reinterpret_cast<float*>(memory + value_bytes + sum_bytes),
                      stride,
                      limbs,
                      groups,
                      group,
                      a.width == Width::kInt4 ? kZero4 : kZero8};
  IntegerRowsJob rounding{a, q};
  const int64_t panels = panels_to_cut(a);
  const int64_t most = rows_for_all(panels / kGroupPanels, rows_that_fit(limbs * stride));
  IntegerJob job{a, q, {panels, a.rows, kGroupPanels, most, Vec::kRows / limbs}};
  round_rows(a, IntegerRowsJob::item, &rounding);
  run_unless_small(job.cut.items, IntegerJob::item, &job, a.rows * a.num_out * a.num_in);
}

void linear(const LinearArgs& a) {
  if (a.rows == 0) return;
  const bool integers = a.width != Width::kModel && !(kPairs && a.act_bits == 16);
  if (integers) return linear_integers(a);
  if (a.width != Width::kModel || a.dtype == DType::kBF16) return linear_bf16(a);
  if (a.maker.make != nullptr) round_rows(a, nullptr, nullptr);  // only made: read as it is
  if (a.dtype == DType::kF32) return linear_with<F32>(a, a.x, a.num_in);
  linear_with<F16>(a, a.x, a.num_in);
}

}  // namespace
}  // namespace diptych::cpu
