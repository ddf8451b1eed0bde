// The kernels for "avx512_bf16"; CMakeLists.txt gives this file its own machine flags.
#include "level.h"
#include "vec_avx512.h"

DIPTYCH_LEVEL_TABLE(kAvx512Bf16, "avx512_bf16")
