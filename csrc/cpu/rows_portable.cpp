// The baseline of the target: SSE2 on x86-64, NEON on aarch64.
#define PYUNLEARN_VARIANT portable
#define PYUNLEARN_VARIANT_NAME "portable"
#define PYUNLEARN_VECTOR_BYTES 16
#include "variant.h"
