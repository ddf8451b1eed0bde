// The thread pool of pool.h.
//
// A job is open while items are left to hand out. Workers enter an open job, take items off a
// shared counter and leave; the caller does the same, closes the job and waits for those who
// entered. A worker that the system has not scheduled yet never entered, so nobody waits for it: on
// a busy machine a job costs at most what it costs alone.
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <new>

namespace diptych::cpu {
namespace {

constexpr int64_t kSpinNs = 20'000;  // longer than the gap between two kernels of one step
constexpr uint64_t kOpen = 1ull << 31;
constexpr uint64_t kEntered = kOpen - 1;
constexpr uint64_t kOneEpoch = 1ull << 32;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000ll + t.tv_nsec;
}

long futex(std::atomic<uint32_t>* word, int op, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op | FUTEX_PRIVATE_FLAG, value,
                 nullptr, nullptr, 0);
}

struct Pool {
  // (epoch << 32) | open bit | number of workers inside
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<int64_t> next_item{0};
  alignas(64) std::atomic<uint32_t> wake{0};
  std::atomic<int> sleepers{0};
  std::atomic<bool> busy{false};
  // Written by the caller before it opens a job, read by workers that entered it.
  ItemFn fn = nullptr;
  void* context = nullptr;
  int64_t num_items = 0;
  std::atomic<int> max_entered{0};
  int num_workers = 0;

  void take_items() {
    for (int64_t i = next_item.fetch_add(1); i < num_items; i = next_item.fetch_add(1))
      fn(context, i);
  }

  bool enter() {
    uint64_t s = state.load();
    while ((s & kOpen) && static_cast<int>(s & kEntered) < max_entered.load()) {
      if (state.compare_exchange_weak(s, s + 1)) return true;
    }
    return false;
  }

  void work() {
    for (;;) {
      const uint32_t seen = wake.load();
      if (enter()) {
        take_items();
        state.fetch_sub(1);
      }
      const int64_t deadline = now_ns() + kSpinNs;
      while (wake.load() == seen && now_ns() < deadline) {
        for (int i = 0; i < 8; ++i) pause_cpu();
      }
      if (wake.load() != seen) continue;
      sleepers.fetch_add(1);
      futex(&wake, FUTEX_WAIT, seen);
      sleepers.fetch_sub(1);
    }
  }

  void grow(int wanted) {
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    auto main = [](void* self) -> void* {
      static_cast<Pool*>(self)->work();
      return nullptr;
    };
    // Workers take no signals: those belong to the threads that wait for them.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    // A thread that cannot be created only costs speed.
    while (num_workers < wanted && pthread_create(&thread, &attr, main, this) == 0) ++num_workers;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attr);
  }

  void run(int64_t items, ItemFn job, void* job_context, int threads) {
    if (num_workers < threads - 1) grow(threads - 1);
    fn = job;
    context = job_context;
    num_items = items;
    next_item.store(0);
    max_entered.store(threads - 1);
    state.fetch_add(kOneEpoch | kOpen);
    wake.fetch_add(1);
    const int helpers = static_cast<int>(items - 1 < threads - 1 ? items - 1 : threads - 1);
    if (sleepers.load() > 0) futex(&wake, FUTEX_WAKE, static_cast<uint32_t>(helpers));
    take_items();
    state.fetch_and(~kOpen);
    const int64_t deadline = now_ns() + kSpinNs;
    while (state.load() & kEntered) {
      pause_cpu();
      if (now_ns() > deadline) sched_yield();  // a worker lost its core: give it this one
    }
  }
};

std::atomic<int> g_num_threads{1};
std::atomic<Pool*> g_pool{nullptr};

void forget_pool() {
  g_pool.store(nullptr);
}  // its threads do not exist in the child; its few bytes stay

Pool* pool() {
  Pool* existing = g_pool.load();
  if (existing != nullptr) return existing;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* created = new Pool();
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

void set_num_threads(int num_threads) { g_num_threads.store(num_threads < 1 ? 1 : num_threads); }

int num_threads() { return g_num_threads.load(); }

void run_items(int64_t num_items, ItemFn fn, void* context) {
  const int threads = g_num_threads.load();
  if (threads > 1 && num_items > 1) {
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
  static thread_local Scratch slots[3];
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
