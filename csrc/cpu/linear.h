// Packing of weights, and linear layers over them.
#pragma once

#include "gemm.h"
#include "narrow.h"
#include "pool.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kGroupPanels = 4;  // panels of one work item
constexpr int64_t kRowsPerItem =
    96;  // rows of one work item, where columns alone give too few items
constexpr int64_t kInlineProducts = 1 << 15;  // smaller problems are not worth waking a thread for
constexpr int64_t kFewRows = 32;              // narrow weights: widened piece by piece up to here
constexpr int64_t kPieceInputs = 128;         // four panels of them stay in the first cache

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Inputs of a packed panel.
inline int64_t padded_inputs(const LinearArgs& a) {
  if (a.width == Width::kInt8) return round_up(a.num_in, kNarrowInputs);
  if (a.width == Width::kInt4)
    return round_up(a.num_in, a.group > kNarrowInputs ? a.group : kNarrowInputs);
  return a.dtype == DType::kBF16 ? round_up(a.num_in, kPairInputs) : a.num_in;
}

template <class E>
void pack_panel(const PackArgs& a, int64_t panel) {
  constexpr int64_t unit = Operand<E>::kActsPerStep;  // inputs that lie side by side
  const int64_t padded = unit == 1 ? a.num_in : round_up(a.num_in, kPairInputs);
  auto* out = static_cast<typename E::Raw*>(a.packed) + panel * padded * kPanel;
  const auto* weight = static_cast<const typename E::Raw*>(a.weight);
  for (int64_t c = 0; c < kPanel; ++c) {
    const int64_t n = panel * kPanel + c;
    const auto* row = weight + n * a.num_in;
    for (int64_t k = 0; k < padded; ++k) {
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
  int64_t x_stride, groups, rows_per_item;

  static void item(void* context, int64_t index) {
    const auto& job = *static_cast<const LinearJob*>(context);
    const LinearArgs& a = job.a;
    const int64_t first_panel = index % job.groups * kGroupPanels,
                  row = index / job.groups * job.rows_per_item;
    const int64_t all_panels = (a.num_out + kPanel - 1) / kPanel;
    const int64_t panels_left = all_panels - first_panel, rows_left = a.rows - row;
    const int64_t panels = panels_left < kGroupPanels ? panels_left : kGroupPanels,
                  rows = rows_left < job.rows_per_item ? rows_left : job.rows_per_item;
    const int64_t column = first_panel * kPanel, padded = padded_inputs(a);
    TileArgs<E> tile_args;
    tile_args.x = job.x + row * job.x_stride;
    tile_args.x_stride = job.x_stride;
    tile_args.out = a.out + row * a.num_out + column;
    tile_args.out_stride = a.num_out;
    tile_args.columns = a.num_out - column;
    if (a.width != Width::kModel) {
      if constexpr (Operand<E>::kRawPerStep == 2 * kPanel)
        narrow(job, tile_args, row, rows, first_panel, panels, padded);
      return;
    }
    tile_args.panel_stride = padded * kPanel;
    tile_args.w = static_cast<const typename E::Raw*>(a.w) + first_panel * tile_args.panel_stride;
    tile_args.steps = kTiles ? padded / 2 : Operand<E>::steps(a.num_in);
    if constexpr (Operand<E>::kRawPerStep == kPanel) tile_args.steps = a.num_in;
    tile_args.bias = a.bias == nullptr ? nullptr : a.bias + column;
    gemm<E>(tile_args, rows, panels);
  }

  // Few rows: a piece of K is widened into the first cache and used at once. Many rows: all of K is
  // widened once for all of them.
  static void narrow(const LinearJob& job, TileArgs<E> tile_args, int64_t row, int64_t rows,
                     int64_t first_panel, int64_t panels, int64_t padded) {
    const int64_t piece = rows <= kFewRows && padded > kPieceInputs ? kPieceInputs : padded;
    auto* wide = static_cast<uint16_t*>(
        scratch(kScratchItem, static_cast<size_t>(kGroupPanels * piece * kPanel) * 2));
    const typename Operand<E>::Act* x = tile_args.x;
    tile_args.w = wide;
    tile_args.panel_stride = piece * kPanel;
    tile_args.bias = nullptr;
    for (int64_t k = 0; k < padded; k += piece) {
      const int64_t inputs = padded - k < piece ? padded - k : piece;
      for (int64_t p = 0; p < panels; ++p)
        widen(job.a, padded, first_panel + p, k, inputs, wide + p * piece * kPanel);
      tile_args.x = x + k / 2 * Operand<E>::kActsPerStep;
      tile_args.steps = inputs / 2;
      tile_args.accumulate = k > 0;
      gemm<E>(tile_args, rows, panels);
    }
    const int64_t left = tile_args.columns, columns = panels * kPanel;
    finish_narrow(job.a, row, rows, first_panel * kPanel, left < columns ? left : columns);
  }
};

template <class E>
void linear_with(const LinearArgs& a, const typename Operand<E>::Act* x, int64_t x_stride) {
  const int64_t groups = ((a.num_out + kPanel - 1) / kPanel + kGroupPanels - 1) / kGroupPanels;
  const int64_t rows_per_item = groups >= 4 * num_threads() || a.rows < 1 ? a.rows : kRowsPerItem;
  LinearJob<E> job{a, x, x_stride, groups, rows_per_item};
  if (a.rows == 0) return;
  const int64_t items = groups * ((a.rows + rows_per_item - 1) / rows_per_item);
  if (a.rows * a.num_out * a.num_in < kInlineProducts) {
    for (int64_t i = 0; i < items; ++i) LinearJob<E>::item(&job, i);
  } else {
    run_items(items, LinearJob<E>::item, &job);
  }
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
    if constexpr (kPairs) {
      auto* out = static_cast<uint16_t*>(job.out) + row * job.stride;
      convert_row<BF16>(out, x, k);
      for (int64_t i = k; i < job.stride; ++i) out[i] = 0;
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
  if (a.rows * a.num_in < kInlineProducts) {
    for (int64_t row = 0; row < a.rows; ++row) RoundJob::item(&job, row);
  } else {
    run_items(a.rows, RoundJob::item, &job);
  }
  if constexpr (kPairs) {
    linear_with<BF16Pairs>(a, static_cast<const uint32_t*>(rounded), stride / 2);
  } else {
    linear_with<BF16>(a, static_cast<const float*>(rounded), stride);
  }
}

void linear(const LinearArgs& a) {
  if (a.width != Width::kModel || a.dtype == DType::kBF16) return linear_bf16(a);
  if (a.dtype == DType::kF32) return linear_with<F32>(a, a.x, a.num_in);
  linear_with<F16>(a, a.x, a.num_in);
}

}  // namespace
}  // namespace diptych::cpu
