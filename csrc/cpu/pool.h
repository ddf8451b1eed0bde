// The process's one pool of worker threads, and per-thread scratch memory.
//
// Workers are created on first need, spin for a few microseconds after a job and then sleep in the
// kernel. A forked child starts without workers and creates its own. Which thread runs which item
// is never visible in a result.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace diptych::cpu {

using ItemFn = void (*)(void* context, int64_t item);

// Threads that one job may use, the caller included. 1 ends the workers, so that a fork is safe.
void set_num_threads(int num_threads);
int num_threads();

// From now on this process is worker `slot` of a host whose workers share `cores` (numbers of the
// system) by `table` (cores.h), shared memory that stays mapped. Its threads are pinned: the caller
// of `run_items` to its seat, one helper to each core, which works only while the core is the
// worker's. Called before the first job.
constexpr int kCoresMax = 256;
void share_cores(const uint8_t* table, int slots, int slot, const int32_t* cores, int num_cores,
                 int prefill_share);

// Items of shared jobs that ran on each of the cores so far.
void items_of_cores(int64_t* items, int num_cores);

// Runs fn(context, i) for every i in [0, num_items), on the caller and on idle workers; returns
// when all are done. Runs inline when there is nothing to share or when another thread of this
// process has the pool.
void run_items(int64_t num_items, ItemFn fn, void* context);

// Memory of the calling thread, at least `bytes`, 64-byte aligned, kept until the thread asks this
// slot again. Uninitialised.
constexpr int kScratchCall = 0;  // of one call: lives while its items run
constexpr int kScratchItem = 1;  // of one item
constexpr int kScratchPlan = 2;  // of one call: its list of work items
constexpr int kScratchSums = 3;  // of one item: sums that something is made of
constexpr int kScratchSlots = 4;
void* scratch(int slot, size_t bytes);

}  // namespace diptych::cpu
