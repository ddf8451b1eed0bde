// How the workers of one host share its cores: a pure function of who is busy.
//
// Every worker has one byte of a shared table, which only it writes (and its supervisor, once it is
// dead). A busy worker has a span of neighbouring cores to itself; idle workers have none, so their
// cores go to the busy ones. Prefill side and decode side share by a fixed percentage, the workers
// of a side evenly. Where workers are more than cores, some are guests: they have an empty span and
// sit on a core of another worker of their side. Readers may see the table at different moments;
// then two threads meet on a core for one work item, which costs time and nothing else.
#pragma once

#include <stdint.h>

namespace diptych::cpu {

constexpr uint8_t kCoreBusy = 1;     // the worker has work
constexpr uint8_t kCorePrefill = 2;  // it is of the prefill side

struct CoreSpan {
  int begin, end;  // cores [begin, end) are the worker's alone; empty for a guest
  int seat;        // where its first thread sits
  bool has(int core) const { return core >= begin && core < end; }
};

// The span of worker `slot`, busy or about to be. prefill_share: percent of the cores that the
// prefill side has while both sides are busy; each side has at least one core where there are two.
inline CoreSpan core_span(const volatile uint8_t* table, int slots, int slot, int cores,
                          int prefill_share, bool all_busy = false) {
  const int side = table[slot] & kCorePrefill;
  int count[2] = {0, 0}, rank = 0;
  for (int s = 0; s < slots; ++s) {
    const uint8_t state = table[s];
    if (s != slot && !all_busy && !(state & kCoreBusy)) continue;
    const int its_side = s == slot ? side : state & kCorePrefill;
    if (s < slot && its_side == side) ++rank;
    ++count[its_side ? 1 : 0];
  }
  int low = 0, high = cores;
  if (count[0] > 0 && count[1] > 0) {
    int cut = (cores * prefill_share + 50) / 100;
    if (cut > cores - 1) cut = cores - 1;
    if (cut < 1) cut = 1;
    (side ? high : low) = cut;
    if (low > cores - 1) low = cores - 1;  // of a single core there is no other side
    if (low == high) high = low + 1;
  }
  const int size = high - low, peers = count[side ? 1 : 0];
  const int begin = low + rank * size / peers, end = low + (rank + 1) * size / peers;
  return {begin, end, begin};
}

// The same with the seat that the worker keeps, where it can, whoever else is busy: threads that
// stay find their caches warm. At most `limit` cores, those nearest to the seat.
inline CoreSpan seated_span(const volatile uint8_t* table, int slots, int slot, int cores,
                            int prefill_share, int limit) {
  CoreSpan span = core_span(table, slots, slot, cores, prefill_share);
  const int home = core_span(table, slots, slot, cores, prefill_share, true).begin;
  if (span.has(home)) span.seat = home;
  if (span.end - span.begin > limit) {
    const int last = span.end - limit;
    span.begin = span.seat < last ? span.seat : last;
    span.end = span.begin + limit;
  }
  return span;
}

}  // namespace diptych::cpu
