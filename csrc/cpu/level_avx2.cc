// The kernels for "avx2"; CMakeLists.txt gives this file its own machine flags.
#include "vec_avx2.h"

#include "level.h"  // last: it uses Vec

DIPTYCH_LEVEL_TABLE(kAvx2, "avx2")
