// What a level can do at most on this machine: loops of nothing but loads, or nothing but
// multiply-adds. Benchmarks set the kernels' numbers against these, measured in the same run.
#pragma once

#include "gemm.h"
#include "pool.h"

namespace diptych::cpu {
namespace {

// Independent sums: more than latency times ports, and not more than registers.
constexpr int kProbeChains = Vec::W == 16 ? 20 : 12;

void probe_tiles(int64_t rounds) {
#ifdef __AMX_BF16__
  const TileConfig config(kTileRows, kTileRows);
  config.load();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
#else
  (void)rounds;
#endif
}

struct ProbeJob {
  const ProbeArgs& a;
  int64_t items;
};

void probe_item(void* context, int64_t index) {
  const auto& job = *static_cast<const ProbeJob*>(context);
  F acc[kProbeChains];
  for (F& chain : acc) chain = Vec::set1(0.0f);
  if (job.a.data != nullptr) {
    constexpr int kStreams = 8;
    const int64_t share = job.a.size / job.items;
    const float* x = job.a.data + index * share;
    for (int64_t i = 0; i + kStreams * Vec::W <= share; i += kStreams * Vec::W) {
#pragma GCC unroll 16
      for (int s = 0; s < kStreams; ++s) acc[s] = acc[s] + Vec::load(x + i + s * Vec::W);
    }
  } else if (kTiles && job.a.pairs) {
    probe_tiles(job.a.size);
  } else {
    const uint32_t pairs[Vec::W] = {};
    const F x = Vec::set1(job.a.factor);
    for (int64_t i = 0; i < job.a.size; ++i) {
#pragma GCC unroll 32
      for (int c = 0; c < kProbeChains; ++c) {
        if constexpr (Vec::kBf16Dot) {
          acc[c] = job.a.pairs ? Vec::dot_pairs(acc[c], 0, pairs) : Vec::fma(x, x, acc[c]);
        } else {
          acc[c] = Vec::fma(x, x, acc[c]);
        }
      }
    }
  }
  float sum = 0.0f;
  for (const F& chain : acc) sum += Vec::sum(chain);
  job.a.sums[index] = sum;  // so that nothing above is for nothing
}

int64_t probe_operations(bool pairs) {
  if (kTiles && pairs) return 2 * 4 * 16 * 16 * 32;
  return 2 * kProbeChains * Vec::W * (pairs && Vec::kBf16Dot ? 2 : 1);
}

void probe(const ProbeArgs& a) {
  ProbeJob job{a, a.items};
  run_items(a.items, probe_item, &job);
}

}  // namespace
}  // namespace diptych::cpu
