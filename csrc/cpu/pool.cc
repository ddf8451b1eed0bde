// The thread pool of pool.h.
//
// A job is open while items are left to hand out. Workers enter an open job, take items off a
// shared counter and leave; the caller does the same, closes the job and waits for those who
// entered. A worker that the system has not scheduled yet never entered, so nobody waits for it: on
// a busy machine a job costs at most what it costs alone. With a share of the host's cores (cores.h)
// workers look at the table before each item, and leave a core that is not theirs any more; the
// caller goes on, so a job always ends.
#include "pool.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <new>
#include <vector>

#include "cores.h"
#include "wait.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kSpinNs = 20'000;  // longer than the gap between two kernels of one step
constexpr uint64_t kOpen = 1ull << 31;
constexpr uint64_t kEntered = kOpen - 1;
constexpr uint64_t kOneEpoch = 1ull << 32;

long futex(std::atomic<uint32_t>* word, int op, uint32_t value, uint32_t bits) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op | FUTEX_PRIVATE_FLAG, value,
                 nullptr, nullptr, bits);
}

// The cores that this worker may ever use, and the table by which it knows which are its own now.
struct Share {
  const volatile uint8_t* table;  // [slots], shared memory
  int slots, slot, prefill_share, num_cores;
  int cores[kCoresMax];  // numbers of the system

  CoreSpan span(int limit) const {
    return seated_span(table, slots, slot, num_cores, prefill_share, limit);
  }
  void sit(pthread_t thread, int core) const {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cores[core], &set);
    // Where a core went away meanwhile the thread stays where the system puts it.
    pthread_setaffinity_np(thread, sizeof set, &set);
  }
};

struct Pool {
  // (epoch << 32) | open bit | number of workers inside
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<int64_t> next_item{0};
  alignas(64) std::atomic<uint32_t> wake{0};
  std::atomic<bool> busy{false};
  // Written by the caller before it opens a job, read by workers that entered it.
  ItemFn fn = nullptr;
  void* context = nullptr;
  int64_t num_items = 0;
  std::atomic<int> max_entered{0};
  std::atomic<int> limit{1};            // threads of the newest job, the caller's included
  const Share* const share;             // null: workers are anywhere, worker i is the i-th helper
  int num_workers = 0;                  // with a share: worker i sits on core i, for good
  std::atomic<bool> ending{false};
  std::vector<pthread_t> threads;       // of the workers, in their order
  std::atomic<uint8_t> asleep[kCoresMax] = {};
  std::atomic<int64_t> items_done[kCoresMax] = {};  // with a share: on each of its cores
  std::atomic<int> seat{-1};  // with a share: the core of the caller

  explicit Pool(const Share* its_share) : share(its_share) {}

  // Whether worker `index` may take another item: a core whose owner woke up is given back.
  bool allowed(int index) const {
    if (share == nullptr) return true;
    return index != seat.load(std::memory_order_relaxed) &&
           share->span(limit.load(std::memory_order_relaxed)).has(index);
  }

  void take_items() {
    for (int64_t i = next_item.fetch_add(1); i < num_items; i = next_item.fetch_add(1))
      fn(context, i);
  }

  void take_items_while_allowed(int index) {
    int64_t done = 0;
    while (allowed(index)) {
      const int64_t i = next_item.fetch_add(1);
      if (i >= num_items) break;
      fn(context, i);
      ++done;
    }
    items_done[index].fetch_add(done, std::memory_order_relaxed);
  }

  bool enter() {
    uint64_t s = state.load();
    while ((s & kOpen) && static_cast<int>(s & kEntered) < max_entered.load()) {
      if (state.compare_exchange_weak(s, s + 1)) return true;
    }
    return false;
  }

  void work(int index) {
    while (!ending.load()) {
      const uint32_t seen = wake.load();
      if (allowed(index) && enter()) {
        share == nullptr ? take_items() : take_items_while_allowed(index);
        state.fetch_sub(1);
      }
      const int64_t deadline = now_ns() + kSpinNs;
      while (wake.load() == seen && allowed(index) && now_ns() < deadline) {
        for (int i = 0; i < 8; ++i) pause_cpu();
      }
      if (wake.load() != seen && allowed(index)) continue;
      asleep[index].store(1);
      if (ending.load()) break;
      futex(&wake, FUTEX_WAIT_BITSET, seen, 1u << (index % 32));
      asleep[index].store(0);
    }
  }

  void grow(int wanted) {
    struct Start {
      Pool* pool;
      int index;
    };
    auto main = [](void* start) -> void* {
      const Start s = *static_cast<Start*>(start);
      delete static_cast<Start*>(start);
      if (s.pool->share != nullptr) s.pool->share->sit(pthread_self(), s.index);
      pthread_setname_np(pthread_self(), "dt-compute");
      s.pool->work(s.index);
      return nullptr;
    };
    // Workers take no signals: those belong to the threads that wait for them.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (num_workers < wanted) {
      pthread_t thread;
      auto* start = new Start{this, num_workers};
      if (pthread_create(&thread, nullptr, main, start) != 0) {
        delete start;  // a thread that cannot be created only costs speed
        break;
      }
      threads.push_back(thread);
      ++num_workers;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Ends the workers; a fork after this copies a process of one thread.
  void shrink() {
    ending.store(true);
    wake.fetch_add(1);
    futex(&wake, FUTEX_WAKE_BITSET, INT_MAX, ~0u);
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
    threads.clear();
    num_workers = 0;
    for (auto& flag : asleep) flag.store(0);
    ending.store(false);
  }

  // Wakes sleeping workers of [begin, end), without `except`, as many as there is work for.
  void rouse(int begin, int end, int except, int64_t most) {
    uint32_t bits = 0;
    for (int i = begin; i < end && i < num_workers && most > 0; ++i) {
      if (i == except) continue;
      --most;
      if (asleep[i].load()) bits |= 1u << (i % 32);
    }
    if (bits != 0) futex(&wake, FUTEX_WAKE_BITSET, INT_MAX, bits);
  }

  void run(int64_t items, ItemFn job, void* job_context, int threads) {
    int begin = 0, end = threads - 1, except = -1;
    if (share != nullptr) {
      const CoreSpan span = share->span(threads);
      static thread_local const Share* sits_in = nullptr;
      static thread_local int sits_on = -1;
      if (sits_in != share || sits_on != span.seat) {
        sits_in = share;
        share->sit(pthread_self(), sits_on = span.seat);
      }
      seat.store(span.seat, std::memory_order_relaxed);
      limit.store(threads, std::memory_order_relaxed);
      if (num_workers < share->num_cores) grow(share->num_cores);
      begin = span.begin, end = span.end, except = span.seat;
    } else if (num_workers < threads - 1) {
      grow(threads - 1);
    }
    const int helpers = end - begin - (except >= begin && except < end ? 1 : 0);
    fn = job;
    context = job_context;
    num_items = items;
    next_item.store(0);
    if (helpers <= 0) return take_own_items();
    max_entered.store(helpers);
    state.fetch_add(kOneEpoch | kOpen);
    wake.fetch_add(1);
    rouse(begin, end, except, items - 1);
    take_own_items();
    state.fetch_and(~kOpen);
    const int64_t deadline = now_ns() + kSpinNs;
    while (state.load() & kEntered) {
      pause_cpu();
      if (now_ns() > deadline) sched_yield();  // a worker lost its core: give it this one
    }
  }

  void take_own_items() {
    if (share == nullptr) return take_items();
    int64_t done = 0;
    for (int64_t i = next_item.fetch_add(1); i < num_items; i = next_item.fetch_add(1), ++done)
      fn(context, i);
    items_done[seat.load(std::memory_order_relaxed)].fetch_add(done, std::memory_order_relaxed);
  }
};

std::atomic<int> g_num_threads{1};
std::atomic<const Share*> g_share{nullptr};
std::atomic<Pool*> g_pool{nullptr};

void forget_pool() {
  g_pool.store(nullptr);
}  // its threads do not exist in the child; its few bytes stay

Pool* pool() {
  Pool* existing = g_pool.load();
  if (existing != nullptr) return existing;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* created = new Pool(g_share.load());
  if (g_pool.compare_exchange_strong(existing, created)) return created;
  delete created;
  return existing;
}

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { free(data); }
};

}  // namespace

void set_num_threads(int num_threads) {
  g_num_threads.store(num_threads < 1 ? 1 : num_threads);
  Pool* existing = g_pool.load();
  if (num_threads > 1 || existing == nullptr || existing->busy.exchange(true)) return;
  existing->shrink();
  existing->busy.store(false);
}

int num_threads() { return g_num_threads.load(); }

void share_cores(const uint8_t* table, int slots, int slot, const int32_t* cores, int num_cores,
                 int prefill_share) {
  auto* share = new Share{table, slots, slot, prefill_share, num_cores, {}};
  for (int i = 0; i < num_cores; ++i) share->cores[i] = cores[i];
  g_share.store(share);
  g_pool.store(nullptr);  // threads of an earlier pool, if any, sleep for good
}

void items_of_cores(int64_t* items, int num_cores) {
  Pool* existing = pool();
  for (int i = 0; i < num_cores; ++i) items[i] = existing->items_done[i].load();
}

void run_items(int64_t num_items, ItemFn fn, void* context) {
  const int threads = g_num_threads.load();
  if (num_items > 1 && (threads > 1 || g_share.load() != nullptr)) {
    Pool* shared = pool();
    if (!shared->busy.exchange(true)) {
      shared->run(num_items, fn, context, threads);
      shared->busy.store(false);
      return;
    }
  }
  for (int64_t i = 0; i < num_items; ++i) fn(context, i);
}

void* scratch(int slot, size_t bytes) {
  static thread_local Scratch slots[kScratchSlots];
  Scratch& s = slots[slot];
  if (s.size < bytes) {
    free(s.data);
    s.size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    s.data = aligned_alloc(64, s.size);
    if (s.data == nullptr) {
      s.size = 0;
      throw std::bad_alloc();
    }
  }
  return s.data;
}

}  // namespace diptych::cpu
