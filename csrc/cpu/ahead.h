// Weights asked for ahead of their turn: while a thread computes one work item it has the next one's
// brought into its second cache, so that memory is read all the time and not only by the first rows.
// Hardware follows a stream of weights too, but stops at the end of a page and of an item. What the
// next item is, cut.h says.
#pragma once

#include "kernels.h"
#include "pool.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kAheadBytesMax = 384 << 10;  // of an item; with the current one's below 1 MiB
constexpr int64_t kTilesThatFetch = 6;
// With fewer rows nothing but memory is waited for, and hardware's own order of reading is best (but
// see fetches_ahead).
constexpr int64_t kAheadRowsMin = 13;
// It does not look far enough ahead for a core that multiplies every line with several rows: that asks
// for what lies a little further on in the panel.
constexpr int64_t kNearRowsMin = 3;
constexpr int64_t kNearBytes = 2048;

// Memory that is going to be read.
struct Ahead {
  const char* data = nullptr;
  int64_t lines = 0;

  // The share of one of an item's tiles of rows: the last ones fetch, so that it is not all thrown
  // out again by many rows.
  Ahead of_tile(int64_t index, int64_t tiles) const {
    const int64_t count = tiles < kTilesThatFetch ? tiles : kTilesThatFetch;
    index -= tiles - count;
    if (index < 0) return {};
    const int64_t begin = lines * index / count;
    return {data + begin * kLine, lines * (index + 1) / count - begin};
  }

  // For a loop that always asks: what is in the first cache already costs nothing.
  Ahead or_there(const void* near) const {
    return lines > 0 ? *this : Ahead{static_cast<const char*>(near), 0};
  }
};

// Spreads the lines of `ahead` evenly over `steps` calls of step(), each of which asks for one of either
// half: a step is as long with a line that has been asked for as with a new one.
class Prefetch {
 public:
  Prefetch(const Ahead& ahead, int64_t steps)
      : first_(ahead.data), second_(ahead.data + ahead.lines / 2 * kLine),
        stride_((ahead.lines * kLine / 2 + steps - 1) / steps) {}

  inline __attribute__((always_inline)) void step() {
    __builtin_prefetch(first_, 0, 2);
    __builtin_prefetch(second_, 0, 2);
    first_ += stride_, second_ += stride_;
  }

 private:
  const char *first_, *second_;
  int64_t stride_;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Inputs of a packed panel.
inline int64_t padded_inputs(const LinearWeights& w) {
  if (w.width == Width::kInt8) return round_up(w.num_in, kNarrowInputs);
  if (w.width == Width::kInt4)
    return round_up(w.num_in, w.group > kNarrowInputs ? w.group : kNarrowInputs);
  return w.dtype == DType::kBF16 ? round_up(w.num_in, kPairInputs) : w.num_in;
}

inline int64_t panel_bytes(const LinearWeights& w) {
  const int64_t values = padded_inputs(w) * kPanel;
  if (w.width == Width::kInt4) return values / 2;
  if (w.width == Width::kInt8) return values;
  return values * (w.dtype == DType::kF32 ? 4 : 2);
}

inline int64_t panels_of(const LinearWeights& w) { return (w.num_out + kPanel - 1) / kPanel; }

inline Ahead panels_ahead(const LinearWeights& w, int64_t first, int64_t count) {
  const int64_t left = panels_of(w) - first;
  if (left <= 0) return {};
  const int64_t bytes = panel_bytes(w) * (left < count ? left : count);
  if (bytes > kAheadBytesMax) return {};
  return {static_cast<const char*>(w.w) + first * panel_bytes(w), bytes / kLine};
}

}  // namespace
}  // namespace diptych::cpu
