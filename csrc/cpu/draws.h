// Draws of tokens from rows of logits, where they are beyond doubt.
//
// A row's weights are exponentials in doubles, summed by spans at fixed places. The sampler's own
// computation (engine/sampling.py) has other last bits; so a token counts only where the number falls
// farther from its edges than all rounding of both could move them, and else the row is left to the
// sampler. Invariant: a token found here is the one that the sampler would find.
#pragma once

#include "logits.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kDrawSpan = 64;  // logits that are summed together
constexpr double kDoubt = 2e-11;   // of the whole weight, far more than the rounding of any sum here
constexpr double kLowest = -708.0;  // e to this is still a normal double, and nothing beside kDoubt

struct DrawJob {
  const DrawArgs& a;
  int64_t chunks, spans;  // of a row
  float* largest;         // [rows, chunks], NaN where one is
  double* sums;           // [rows, spans]

  const float* row(int64_t r) const { return a.logits + a.index[r] * a.vocab; }
  float best(int64_t r) const {
    float best = -INFINITY;
    for (int64_t c = 0; c < chunks; ++c) {
      const float x = largest[r * chunks + c];
      if (!(x <= best)) best = x;
      if (x != x) return x;
    }
    return best;
  }
};

inline int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }

// e^x for x <= 0, to a few units in the last place; not below e^kLowest.
inline double exp_below(double x) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer in the low bits
  x = x < kLowest ? kLowest : x;
  const double biased = x * 1.44269504088896340736 + magic, n = biased - magic;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 479001600;
  p = p * r + 1.0 / 39916800, p = p * r + 1.0 / 3628800, p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320, p = p * r + 1.0 / 5040, p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120, p = p * r + 1.0 / 24, p = p * r + 1.0 / 6;
  p = p * r + 0.5, p = p * r + 1.0, p = p * r + 1.0;
  int64_t power, bits;
  memcpy(&power, &biased, 8), memcpy(&bits, &p, 8);
  bits += power << 52;  // what magic adds falls off the top
  memcpy(&p, &bits, 8);
  return p;
}

// Of kDrawSpan logits; beyond `size` there are none.
inline void weigh(double* weights, const float* x, int64_t size, double best, double inverse) {
  if (size == kDrawSpan) {
    for (int64_t i = 0; i < kDrawSpan; ++i)
      weights[i] = exp_below((static_cast<double>(x[i]) - best) * inverse);
    return;
  }
  for (int64_t i = 0; i < size; ++i)
    weights[i] = exp_below((static_cast<double>(x[i]) - best) * inverse);
  for (int64_t i = size; i < kDrawSpan; ++i) weights[i] = 0.0;
}

void largest_of_chunk(void* context, int64_t item) {
  const auto& job = *static_cast<const DrawJob*>(context);
  const int64_t row = item / job.chunks, start = item % job.chunks * kVocabChunk;
  const float* x = job.row(row) + start;
  F largest = Vec::set1(-INFINITY);
  unsigned nan = 0;
  each_vec(less(kVocabChunk, job.a.vocab - start), [&](int64_t i, int n) {
    const F v = load_or_lowest(x + i, n);
    nan |= Vec::mask_nan(v);
    largest = Vec::max(largest, v);
  });
  job.largest[item] = nan != 0 ? NAN : Vec::largest(largest);
}

void weigh_chunk(void* context, int64_t item) {
  const auto& job = *static_cast<const DrawJob*>(context);
  const int64_t row = item / job.chunks, first = item % job.chunks * (kVocabChunk / kDrawSpan);
  const double best = job.best(row), inverse = job.a.inverses[row];
  if (!isfinite(best)) return;
  const int64_t end = less(first + kVocabChunk / kDrawSpan, job.spans);
  for (int64_t s = first; s < end; ++s) {
    double w[kDrawSpan], lanes[8] = {};
    const int64_t start = s * kDrawSpan;
    weigh(w, job.row(row) + start, less(kDrawSpan, job.a.vocab - start), best, inverse);
    for (int64_t i = 0; i < kDrawSpan; i += 8)
      for (int64_t l = 0; l < 8; ++l) lanes[l] += w[i + l];
    job.sums[row * job.spans + s] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
                                    ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  }
}

int32_t token_of_row(const DrawJob& job, int64_t row) {
  const double best = job.best(row);
  if (!isfinite(best)) return -1;
  const double* sums = job.sums + row * job.spans;
  double whole = 0.0;
  for (int64_t s = 0; s < job.spans; ++s) whole += sums[s];
  const double target = job.a.numbers[row] * whole, doubt = kDoubt * whole;
  double before = 0.0;
  int64_t span = 0;
  while (span + 1 < job.spans && before + sums[span] <= target) before += sums[span++];
  double w[kDrawSpan];
  const int64_t start = span * kDrawSpan, size = less(kDrawSpan, job.a.vocab - start);
  weigh(w, job.row(row) + start, size, best, job.a.inverses[row]);
  for (int64_t i = 0; i < size; ++i) {
    const double sum = before + w[i];
    if (sum > target) {
      const bool sure = (start + i == 0 || before + doubt < target) && sum - doubt > target;
      return sure ? static_cast<int32_t>(start + i) : -1;
    }
    before = sum;
  }
  return -1;
}

void draw_rows(const DrawArgs& a) {
  const int64_t chunks = (a.vocab + kVocabChunk - 1) / kVocabChunk;
  const int64_t spans = (a.vocab + kDrawSpan - 1) / kDrawSpan, items = a.rows * chunks;
  auto* memory = static_cast<char*>(
      scratch(kScratchCall, static_cast<size_t>(a.rows * spans * 8 + items * 4)));
  DrawJob job{a, chunks, spans, reinterpret_cast<float*>(memory + a.rows * spans * 8),
              reinterpret_cast<double*>(memory)};
  if (a.rows * a.vocab < kInlineValues / 2) {
    for (int64_t i = 0; i < items; ++i) largest_of_chunk(&job, i);
    for (int64_t i = 0; i < items; ++i) weigh_chunk(&job, i);
  } else {
    run_items(items, largest_of_chunk, &job);
    run_items(items, weigh_chunk, &job);
  }
  for (int64_t row = 0; row < a.rows; ++row) a.tokens[row] = token_of_row(job, row);
}

}  // namespace
}  // namespace diptych::cpu
