// Causal attention over the paged pool: cuts a call into row blocks, and few long rows into splits.
//
// Either cut computes each row through the same splits, merged in the same order
// (attention_rows.h).
#pragma once

#include <string.h>

#include <utility>

#include "attention_rows.h"

namespace diptych::cpu {
namespace {

struct Part {
  int32_t block;
  int64_t split;
};

struct AttentionJob {
  const AttentionArgs& a;
  const RowBlock* blocks;
  const Part* parts;
  float* partials;  // per block: [splits] of [rows, dim] accumulators, [rows] maxima, [rows] sums
  int64_t num_items;  // blocks, or parts of them
};

inline Softmax part_of(const AttentionJob& job, const RowBlock& block, int64_t split, int64_t rows,
                       int64_t dim) {
  float* acc = job.partials + block.partial + (split - block.split_begin) * rows * (dim + 2);
  return {acc, acc + rows * dim, acc + rows * (dim + 1)};
}

// Items are taken in order by all threads.
inline Upcoming block_after(const AttentionJob& job, int64_t index) {
  const int64_t next = index + num_threads();
  if (next >= job.num_items) return {nullptr, 0};
  return {job.blocks + next, job.blocks[next].split_begin * kSplit};
}

inline Upcoming part_after(const AttentionJob& job, int64_t index) {
  const int64_t next = index + num_threads();
  if (next >= job.num_items) return {nullptr, 0};
  return {job.blocks + job.parts[next].block, job.parts[next].split * kSplit};
}

template <class E>
void run_block(void* context, int64_t index) {
  const auto& job = *static_cast<const AttentionJob*>(context);
  const AttentionArgs& a = job.a;
  const RowBlock& block = job.blocks[index];
  const int64_t rows = block_rows(a, block), dim = a.k_cache.dim;
  const Upcoming upcoming = block_after(job, index);
  Workspace w = open_block<E>(a, block, rows);
  run_split<E>(a, block, rows, block.split_begin, upcoming, w);
  std::swap(w.total, w.split);
  for (int64_t split = block.split_begin + 1; split < block.split_end; ++split) {
    run_split<E>(a, block, rows, split, upcoming, w);
    merge_rows(w.total, w.split, rows, dim);
  }
  write_rows_of(a, block, w.total);
}

template <class E>
void run_part(void* context, int64_t index) {
  const auto& job = *static_cast<const AttentionJob*>(context);
  const AttentionArgs& a = job.a;
  const Part& part = job.parts[index];
  const RowBlock& block = job.blocks[part.block];
  const int64_t rows = block_rows(a, block), dim = a.k_cache.dim;
  Workspace w = open_block<E>(a, block, rows);
  run_split<E>(a, block, rows, part.split, part_after(job, index), w);
  const Softmax out = part_of(job, block, part.split, rows, dim);
  memcpy(out.acc, w.split.acc, static_cast<size_t>(rows * dim) * 4);
  memcpy(out.largest, w.split.largest, static_cast<size_t>(rows) * 4);
  memcpy(out.sum, w.split.sum, static_cast<size_t>(rows) * 4);
}

void merge_block(void* context, int64_t index) {
  const auto& job = *static_cast<const AttentionJob*>(context);
  const AttentionArgs& a = job.a;
  const RowBlock& block = job.blocks[index];
  const int64_t rows = block_rows(a, block), dim = a.k_cache.dim;
  const Workspace w = make_workspace<F32>(rows, dim);
  reset(w.total, rows, dim);
  for (int64_t split = block.split_begin; split < block.split_end; ++split)
    merge_rows(w.total, part_of(job, block, split, rows, dim), rows, dim);
  write_rows_of(a, block, w.total);
}

struct Plan {
  RowBlock* blocks;
  int64_t num_blocks, num_parts, num_partials;
};

// Blocks of the same heads follow each other, so that these heads' keys and values stay in the second
// cache. The longest come first, so that the last ones to finish are short.
template <class E>
Plan make_plan(const AttentionArgs& a) {
  const int64_t heads = a.k_cache.heads, group = a.q_heads / heads;
  const int64_t tokens_per_block = group < kRowsPerBlock<E> ? kRowsPerBlock<E> / group : 1;
  int64_t parts = 0;
  for (int64_t s = 0; s < a.num_seqs; ++s)
    parts += (a.qo_indptr[s + 1] - a.qo_indptr[s] + tokens_per_block - 1) / tokens_per_block;
  const int64_t count = parts * heads;
  // Few rows take several heads at once, whose keys are neighbours, where that leaves enough blocks.
  int64_t heads_at_once = count / (4 * num_threads());
  heads_at_once = heads_at_once < 1 ? 1 : heads_at_once > heads ? heads : heads_at_once;
  Plan plan{
      static_cast<RowBlock*>(scratch(kScratchPlan, static_cast<size_t>(count) * sizeof(RowBlock))),
      0, 0, 0};
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t tokens = a.qo_indptr[s + 1] - a.qo_indptr[s];
    const int64_t rows = (tokens < tokens_per_block ? tokens : tokens_per_block) * group;
    // On tiles padding belongs to no head, so rows that need it are those of one.
    const int64_t most = on_tiles<E>(a.k_cache.dim) && rows > kGroupRows ? 0 : kRowsPerBlock<E>;
    const int64_t step = rows * heads_at_once <= most ? heads_at_once : 1;
    for (int64_t h = 0; h < heads; h += step) {
      for (int64_t end = tokens; end > 0;) {
        const int64_t first = (end - 1) / tokens_per_block * tokens_per_block;
        const int64_t first_key_end = a.kv_len[s] - tokens + first + 1,
                      last_key_end = a.kv_len[s] - tokens + end;
        RowBlock& block = plan.blocks[plan.num_blocks++];
        block.seq = static_cast<int32_t>(s);
        block.first_head = static_cast<int32_t>(h);
        block.num_heads = static_cast<int32_t>(heads - h < step ? heads - h : step);
        block.first_token = static_cast<int32_t>(first);
        block.num_tokens = static_cast<int32_t>(end - first);
        block.split_begin =
            a.window > 0 && first_key_end > a.window ? (first_key_end - a.window) / kSplit : 0;
        block.split_end = (last_key_end + kSplit - 1) / kSplit;
        block.partial = plan.num_partials;
        const int64_t splits = block.split_end - block.split_begin;
        plan.num_parts += splits;
        plan.num_partials += splits * block_rows(a, block) * (a.k_cache.dim + 2);
        end = first;
      }
    }
  }
  return plan;
}

template <class E>
void attention_as(const AttentionArgs& a) {
  const Plan plan = make_plan<E>(a);
  AttentionJob job{a, plan.blocks, nullptr, nullptr, plan.num_blocks};
  const int threads = num_threads();
  if (threads == 1 || plan.num_blocks >= 2 * threads || plan.num_parts == plan.num_blocks) {
    run_items(plan.num_blocks, run_block<E>, &job);
    return;
  }
  // Few long rows: their splits are computed side by side and merged in the same order as above.
  const size_t partial_bytes = (static_cast<size_t>(plan.num_partials) * 4 + 63) / 64 * 64;
  char* memory = static_cast<char*>(
      scratch(kScratchCall, partial_bytes + static_cast<size_t>(plan.num_parts) * sizeof(Part)));
  job.partials = reinterpret_cast<float*>(memory);
  Part* parts = reinterpret_cast<Part*>(memory + partial_bytes);
  int64_t n = 0;
  for (int64_t b = 0; b < plan.num_blocks; ++b) {
    const RowBlock& block = plan.blocks[b];
    for (int64_t s = block.split_begin; s < block.split_end; ++s)
      parts[n++] = {static_cast<int32_t>(b), s};
  }
  job.parts = parts;
  job.num_items = n;
  run_items(n, run_part<E>, &job);
  run_items(plan.num_blocks, merge_block, &job);
}

void attention(const AttentionArgs& a) {
  if (a.k_cache.dtype == DType::kF32) return attention_as<F32>(a);
  if (a.k_cache.dtype == DType::kBF16) return attention_as<BF16>(a);
  if (a.k_cache.dtype == DType::kI8) return attention_as<I8>(a);
  attention_as<F16>(a);
}

}  // namespace
}  // namespace diptych::cpu
