// See ranks.h. A process that dies never arrives: whoever starts the ranks sees to it that the
// others die with it.
#include "ranks.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <new>

#include "pool.h"
#include "wait.h"

namespace diptych::cpu {
namespace {

constexpr int64_t kSumItem = 8192;   // floats of one work item
constexpr int64_t kSpinNs = 50'000;  // longer than ranks of one step usually differ
constexpr int64_t kPatientNs = 3'000;  // of them without giving the core away
constexpr int kPausesPerLook = 16;

struct SumJob {
  float* out;
  const float* parts;
  int64_t num_parts, size;
};

void sum_item(void* context, int64_t item) {
  const SumJob& job = *static_cast<const SumJob*>(context);
  const int64_t begin = item * kSumItem;
  const int64_t end = begin + kSumItem < job.size ? begin + kSumItem : job.size;
  float* __restrict out = job.out;
  const float* __restrict first = job.parts;
  if (job.num_parts == 1) {
    for (int64_t i = begin; i < end; ++i) out[i] = first[i];
    return;
  }
  const float* __restrict second = job.parts + job.size;
  for (int64_t i = begin; i < end; ++i) out[i] = first[i] + second[i];
  for (int64_t part = 2; part < job.num_parts; ++part) {
    const float* __restrict next = job.parts + part * job.size;
    for (int64_t i = begin; i < end; ++i) out[i] += next[i];
  }
}

struct Meeting {
  alignas(64) std::atomic<uint32_t> arrived;
  alignas(64) std::atomic<uint32_t> round;
  alignas(64) std::atomic<uint32_t> sleepers;
};
static_assert(sizeof(Meeting) == kMeetingWords * sizeof(int32_t));
static_assert(std::atomic<uint32_t>::is_always_lock_free);

// Not private: the word is shared by processes.
void futex(std::atomic<uint32_t>* word, int op, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, nullptr, nullptr, 0);
}

}  // namespace

void sum_parts(float* out, const float* parts, int64_t num_parts, int64_t size) {
  SumJob job{out, parts, num_parts, size};
  run_items((size + kSumItem - 1) / kSumItem, sum_item, &job);
}

void meet(int32_t* words, int64_t num_ranks) {
  Meeting& meeting = *reinterpret_cast<Meeting*>(words);
  const uint32_t round = meeting.round.load();
  if (meeting.arrived.fetch_add(1) + 1 == static_cast<uint32_t>(num_ranks)) {
    meeting.arrived.store(0);  // nobody arrives again before the round is over
    meeting.round.store(round + 1);
    if (meeting.sleepers.load() > 0) futex(&meeting.round, FUTEX_WAKE, INT_MAX);
    return;
  }
  const int64_t start = now_ns(), patient = start + kPatientNs, deadline = start + kSpinNs;
  while (meeting.round.load() == round) {
    const int64_t now = now_ns();
    if (now < deadline) {
      for (int i = 0; i < kPausesPerLook; ++i) pause_cpu();
      if (now > patient) sched_yield();  // the others may sit on this very core
      continue;
    }
    meeting.sleepers.fetch_add(1);  // seen by the last one, or the round is over by now
    while (meeting.round.load() == round) futex(&meeting.round, FUTEX_WAIT, round);
    meeting.sleepers.fetch_sub(1);
  }
}

}  // namespace diptych::cpu
