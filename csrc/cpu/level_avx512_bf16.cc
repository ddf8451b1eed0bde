// The kernels for "avx512_bf16"; CMakeLists.txt gives this file its own machine flags.
#include "vec_avx512.h"

#include "level.h"  // last: it uses Vec

DIPTYCH_LEVEL_TABLE(kAvx512Bf16, "avx512_bf16")
