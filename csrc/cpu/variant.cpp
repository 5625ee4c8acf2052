// Which instruction set runs.
#include "variant.h"

#include <cstdlib>
#include <cstring>

namespace pyunlearn {
namespace {

const CpuVariant& choose_variant() {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("PYUNLEARN_CPU");  // for tests; a variant that this machine lacks is not taken
  const bool no_avx512 = wanted && (!std::strcmp(wanted, "avx2") || !std::strcmp(wanted, "portable"));
  const bool no_avx2 = wanted && !std::strcmp(wanted, "portable");
  if (has_avx512 && !no_avx512) return avx512::variant;
  if (has_avx2 && !no_avx2) return avx2::variant;
#endif
  return portable::variant;
}

}  // namespace

const CpuVariant& cpu_kernels() {
  static const CpuVariant& chosen = choose_variant();
  return chosen;
}

const char* cpu_variant() { return cpu_kernels().name; }

}  // namespace pyunlearn
