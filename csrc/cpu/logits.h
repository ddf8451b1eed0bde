// Greedy choice, its logprob, and log-softmax over rows of logits.
//
// A row is cut into chunks of kVocabChunk at fixed places; each chunk gives (largest, sum of
// exponentials), and the chunks are combined in order. So a row's result depends on the row alone,
// and one row can still use every thread.
#pragma once

#include "rows.h"

namespace diptych::cpu {
namespace {

struct LogitsPart {
  float largest, sum;
  int32_t nan;
};

struct RowSum {
  float largest, log_sum;  // logsumexp = largest + log_sum
  bool valid;              // no NaN, finite maximum
};

struct LogitsJob {
  const LogitsArgs& a;
  int64_t chunks;
  LogitsPart* parts;  // [rows, chunks]
};

inline F load_or_lowest(const float* p, int n) {
  if (n == Vec::W) return Vec::load(p);
  float lanes[Vec::W];
  for (int i = 0; i < Vec::W; ++i) lanes[i] = i < n ? p[i] : -INFINITY;
  return Vec::load(lanes);
}

inline int64_t chunk_size(const LogitsArgs& a, int64_t chunk) {
  const int64_t left = a.vocab - chunk * kVocabChunk;
  return left < kVocabChunk ? left : kVocabChunk;
}

void sum_chunk(void* context, int64_t item) {
  const auto& job = *static_cast<const LogitsJob*>(context);
  const int64_t row = item / job.chunks, chunk = item % job.chunks, size = chunk_size(job.a, chunk);
  const float* x = job.a.logits + row * job.a.vocab + chunk * kVocabChunk;
  F largest = Vec::set1(-INFINITY);
  unsigned nan = 0;
  each_vec(size, [&](int64_t i, int n) {
    const F v = load_or_lowest(x + i, n);
    nan |= Vec::mask_nan(v);
    largest = Vec::max(largest, v);
  });
  LogitsPart& part = job.parts[item];
  part = {Vec::largest(largest), 0.0f, nan != 0};
  if (nan != 0 || !isfinite(part.largest)) return;
  const F top = Vec::set1(part.largest);
  F sum = Vec::set1(0.0f);
  each_vec(size, [&](int64_t i, int n) { sum = sum + exp_vec(load_or_lowest(x + i, n) - top); });
  part.sum = Vec::sum(sum);
}

RowSum sum_row(const LogitsJob& job, int64_t row) {
  const LogitsPart* parts = job.parts + row * job.chunks;
  RowSum result{-INFINITY, 0.0f, true};
  for (int64_t c = 0; c < job.chunks; ++c) {
    if (parts[c].nan) result.valid = false;
    if (parts[c].largest > result.largest) result.largest = parts[c].largest;
  }
  if (!result.valid || !isfinite(result.largest)) return {result.largest, NAN, false};
  double sum = 0.0;
  for (int64_t c = 0; c < job.chunks; ++c) {
    sum += static_cast<double>(parts[c].sum) *
           static_cast<double>(exp_one(parts[c].largest - result.largest));
  }
  result.log_sum = static_cast<float>(log(sum));
  return result;
}

int32_t find_first(const float* x, int64_t size, float value) {
  const F wanted = Vec::set1(value);
  int64_t i = 0;
  for (; i + Vec::W <= size; i += Vec::W) {
    const unsigned mask = Vec::mask_equal(Vec::load(x + i), wanted);
    if (mask != 0) return static_cast<int32_t>(i + __builtin_ctz(mask));
  }
  while (x[i] != value) ++i;
  return static_cast<int32_t>(i);
}

void choose_row(void* context, int64_t row) {
  const auto& job = *static_cast<const LogitsJob*>(context);
  const RowSum sum = sum_row(job, row);
  job.a.ids[row] = -1;
  job.a.logprobs[row] = NAN;
  if (!sum.valid) return;
  int64_t chunk = 0;
  while (job.parts[row * job.chunks + chunk].largest != sum.largest) ++chunk;
  const int64_t start = chunk * kVocabChunk;
  const float* x = job.a.logits + row * job.a.vocab + start;
  job.a.ids[row] =
      static_cast<int32_t>(start) + find_first(x, chunk_size(job.a, chunk), sum.largest);
  job.a.logprobs[row] = 0.0f - sum.log_sum;
}

void log_softmax_chunk(void* context, int64_t item) {
  const auto& job = *static_cast<const LogitsJob*>(context);
  const int64_t row = item / job.chunks, chunk = item % job.chunks;
  const RowSum sum = sum_row(job, row);
  const F top = Vec::set1(sum.valid ? sum.largest : NAN), log_sum = Vec::set1(sum.log_sum);
  const int64_t start = row * job.a.vocab + chunk * kVocabChunk;
  each_vec(chunk_size(job.a, chunk), [&](int64_t i, int n) {
    Vec::store_n(job.a.out + start + i, Vec::load_n(job.a.logits + start + i, n) - top - log_sum,
                 n);
  });
}

void logits(const LogitsArgs& a) {
  const int64_t chunks = (a.vocab + kVocabChunk - 1) / kVocabChunk;
  auto* parts = static_cast<LogitsPart*>(
      scratch(kScratchCall, static_cast<size_t>(a.rows * chunks) * sizeof(LogitsPart)));
  LogitsJob job{a, chunks, parts};
  run_items(a.rows * chunks, sum_chunk, &job);
  if (a.out != nullptr) {
    run_items(a.rows * chunks, log_softmax_chunk, &job);
  } else {
    for (int64_t row = 0; row < a.rows; ++row) choose_row(&job, row);
  }
}

}  // namespace
}  // namespace diptych::cpu
