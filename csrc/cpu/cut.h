// How a linear layer is cut into work items: groups of neighbouring panels times blocks of rows. Any
// cut gives the same bits, see gemm.h.
#pragma once

#include "ahead.h"
#include "rows.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kGroupPanels = 4;       // panels of one work item with few rows
constexpr int64_t kRowsPerItem = 96;      // where columns alone give too few items
constexpr int64_t kRowsPerItemMax = 512;
constexpr int64_t kRowsPerItemMin = 48;   // fewer are not worth reading weights once more
constexpr int64_t kRowBytesPerItem = 640 << 10;  // of x, in the second cache
constexpr int64_t kInlineProducts = 1 << 15;  // smaller problems are not worth waking a thread for
constexpr int64_t kRowValuesPerItem = 1 << 12;  // that are made or rounded
constexpr int64_t kBlocksThatBalance = 8;  // so many blocks of rows share out any groups evenly

struct Place {
  int64_t panel, panels, row, rows;
};

struct Cut {
  int64_t panels, rows;  // of the whole layer
  int64_t group_panels, full_groups, rest_panels, groups, rows_per_item, items;

  // At most `most_rows` rows per item, of which `unit` are computed at once.
  Cut(int64_t all_panels, int64_t all_rows, int64_t panels_per_group, int64_t most_rows, int64_t unit)
      : panels(all_panels), rows(all_rows), group_panels(panels_per_group) {
    int64_t blocks = (rows + most_rows - 1) / most_rows;
    rows_per_item = round_up((rows + blocks - 1) / blocks, unit);
    blocks = (rows + rows_per_item - 1) / rows_per_item;
    // What is left of whole rounds of all threads is shared out by smaller groups.
    const int64_t threads = num_threads(), round = group_panels * threads;
    full_groups = blocks < kBlocksThatBalance ? panels / round * threads : panels / group_panels;
    const int64_t left = panels - full_groups * group_panels;
    rest_panels = blocks < kBlocksThatBalance ? (left + threads - 1) / threads : left;
    groups = full_groups + (left == 0 ? 0 : (left + rest_panels - 1) / rest_panels);
    items = groups * blocks;
  }

  Place place(int64_t index) const {
    const int64_t group = index % groups, rest = group - full_groups;
    Place p;
    p.panel = (rest < 0 ? group : full_groups) * group_panels + (rest < 0 ? 0 : rest * rest_panels);
    p.panels = rest < 0 ? group_panels : rest_panels;
    if (p.panels > panels - p.panel) p.panels = panels - p.panel;
    p.row = index / groups * rows_per_item;
    p.rows = rows - p.row < rows_per_item ? rows - p.row : rows_per_item;
    return p;
  }
};

// Rows of an item where each has `row_bytes` bytes of x.
inline int64_t rows_that_fit(int64_t row_bytes) {
  const int64_t rows = kRowBytesPerItem / row_bytes;
  return rows < kRowsPerItemMin ? kRowsPerItemMin : rows < kRowsPerItemMax ? rows : kRowsPerItemMax;
}

// Panels that are cut: with a SiLU those of the gates, each of which brings its own of the others.
inline int64_t panels_to_cut(const LinearArgs& a) { return panels_of(a) / (a.silu ? 2 : 1); }

// Whether a thread has its next item's weights fetched: not where hardware's own order of reading is
// best. Small panels of narrow weights are too short for it.
inline bool fetches_ahead(const LinearArgs& a) {
  return a.rows >= kAheadRowsMin || a.width != Width::kModel;
}

// What the thread that has item `index` is likely to read next: items are taken in order by all
// threads, groups of columns first.
inline Ahead next_item(const LinearArgs& a, const Cut& cut, int64_t index) {
  if (!fetches_ahead(a)) return {};
  const int64_t next = index + num_threads();
  if (next < cut.items) {
    const Place place = cut.place(next);
    if (place.panel == cut.place(index).panel) return {};
    return panels_ahead(a, place.panel, place.panels);
  }
  if (a.next == nullptr) return {};
  return panels_ahead(*a.next, (next - cut.items) * cut.group_panels, cut.group_panels);
}

// Where sums of some columns go.
struct Sums {
  float* at;  // of the first row and column
  int64_t stride, columns;  // columns: valid ones from the first on
};

// Runs part(place, panel, sums, ahead) for the rows of item `index` and its columns from `panel` on:
// once, into the layer's output; or with a SiLU for gates and for what they are multiplied with, and
// then the rest.
template <class Part>
void each_part(const LinearArgs& a, const Cut& cut, int64_t index, Part part) {
  const Place place = cut.place(index);
  const int64_t column = place.panel * kPanel;
  const Ahead ahead = next_item(a, cut, index);
  if (!a.silu) {
    part(place, place.panel,
         Sums{a.out + place.row * a.num_out + column, a.num_out, a.num_out - column}, ahead);
    return;
  }
  const int64_t columns = place.panels * kPanel, inner = a.num_out / 2;
  auto* gate = static_cast<float*>(
      scratch(kScratchSums, static_cast<size_t>(2 * place.rows * columns) * sizeof(float)));
  float* up = gate + place.rows * columns;
  const int64_t up_panel = place.panel + cut.panels;
  part(place, place.panel, Sums{gate, columns, columns},
       !fetches_ahead(a) ? Ahead{} : panels_ahead(a, up_panel, place.panels));
  part(place, up_panel, Sums{up, columns, columns}, ahead);
  for (int64_t r = 0; r < place.rows; ++r) {
    const int64_t at = (place.row + r) * inner + column;
    if (a.rounded_out) {
      silu_rounded(reinterpret_cast<uint16_t*>(a.out) + at, gate + r * columns, up + r * columns,
                   columns);
    } else {
      silu_values(a.out + at, gate + r * columns, up + r * columns, columns);
    }
  }
}

// A work item of a job that has `a`, `cut` and part().
template <class Job>
void run_parts(void* context, int64_t index) {
  const auto& job = *static_cast<const Job*>(context);
  each_part(job.a, job.cut, index,
            [&](const Place& place, int64_t panel, const Sums& sums, const Ahead& ahead) {
              job.part(place, panel, sums, ahead);
            });
}

inline void run_unless_small(int64_t items, ItemFn fn, void* context, int64_t work) {
  if (work >= kInlineProducts) return run_items(items, fn, context);
  for (int64_t i = 0; i < items; ++i) fn(context, i);
}

// `most` rows of an item, or fewer where there are few groups of columns.
inline int64_t rows_for_all(int64_t groups, int64_t most) {
  return groups < 4 * num_threads() && most > kRowsPerItem ? kRowsPerItem : most;
}

// One row of x: made, where that is asked, for who reads it now and once.
inline const float* row_of(const LinearArgs& a, int64_t row) {
  if (a.maker.make == nullptr) return a.x + row * a.num_in;
  auto* made = static_cast<float*>(scratch(kScratchSums, static_cast<size_t>(a.num_in) * 4));
  a.maker.make(a.maker.args, row, made);
  return made;
}

// Makes (where asked) and rounds every row of x, some neighbouring rows per work item.
struct EachRow {
  const LinearArgs& a;
  ItemFn round;
  void* context;
  bool makes;
  int64_t rows_per_item;

  static void item(void* context, int64_t index) {
    const auto& job = *static_cast<const EachRow*>(context);
    const LinearArgs& a = job.a;
    const int64_t first = index * job.rows_per_item, left = a.rows - first;
    const int64_t end = first + (left < job.rows_per_item ? left : job.rows_per_item);
    for (int64_t row = first; row < end; ++row) {
      if (job.makes) a.maker.make(a.maker.args, row, const_cast<float*>(a.x) + row * a.num_in);
      if (job.round != nullptr) job.round(job.context, row);
    }
  }
};

// made: `round` makes rows itself.
inline void round_rows(const LinearArgs& a, ItemFn round, void* context, bool made = false) {
  const int64_t values = (round == nullptr ? 0 : a.num_in) + a.maker.values;
  const int64_t per_item = kRowValuesPerItem / values + 1;
  EachRow job{a, round, context, !made && a.maker.make != nullptr, per_item};
  run_unless_small((a.rows + per_item - 1) / per_item, EachRow::item, &job, a.rows * values);
}

}  // namespace
}  // namespace diptych::cpu
