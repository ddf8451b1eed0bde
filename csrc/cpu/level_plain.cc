// The kernels for "plain"; CMakeLists.txt gives this file its own machine flags.
#include "vec_plain.h"

#include "level.h"  // last: it uses Vec

DIPTYCH_LEVEL_TABLE(kPlain, "plain")
