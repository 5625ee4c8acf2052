#if defined(__x86_64__)
#define PYUNLEARN_VARIANT avx512
#define PYUNLEARN_VARIANT_NAME "avx512"
#define PYUNLEARN_VECTOR_BYTES 64
#include "variant.h"
#endif
