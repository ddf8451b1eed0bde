// The kernels for "avx512"; CMakeLists.txt gives this file its own machine flags.
#include "level.h"
#include "vec_avx512.h"

DIPTYCH_LEVEL_TABLE(kAvx512, "avx512")
