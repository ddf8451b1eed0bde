// Included last by each level's source, after its Vec: instantiates every kernel and fills the
// level's table.
#pragma once

#include "draws.h"
#include "layer.h"
#include "logits.h"
#include "probe.h"

#define DIPTYCH_LEVEL_TABLE(variable, name)                               \
  namespace diptych::cpu {                                                \
  const KernelTable variable = {                                          \
      name,     pack,     linear,    embedding, norm,  rope,              \
      silu_mul, write_kv, attention, logits,    draw_rows, layer,         \
      probe,    probe_operations};                                        \
  }
