#if defined(__x86_64__)
#define PYUNLEARN_VARIANT avx2
#define PYUNLEARN_VARIANT_NAME "avx2"
#define PYUNLEARN_VECTOR_BYTES 32
#include "variant.h"
#endif
