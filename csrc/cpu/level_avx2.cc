// The kernels for "avx2"; CMakeLists.txt gives this file its own machine flags.
#include "level.h"
#include "vec_avx2.h"

DIPTYCH_LEVEL_TABLE(kAvx2, "avx2")
