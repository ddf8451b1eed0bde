// The kernels for "plain"; CMakeLists.txt gives this file its own machine flags.
#include "level.h"
#include "vec_plain.h"

DIPTYCH_LEVEL_TABLE(kPlain, "plain")
