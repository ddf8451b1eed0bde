// The kernels for "amx"; CMakeLists.txt gives this file its own machine flags.
#include "vec_avx512.h"

#include "level.h"  // last: it uses Vec

DIPTYCH_LEVEL_TABLE(kAmx, "amx")
