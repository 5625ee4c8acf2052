// The CPU entry point of bf16_products.h.
#include "../bf16_products.h"

#include <cstdlib>
#include <cstring>

#include "variant.h"

#if defined(PYUNLEARN_AVX512_BF16)
#include <cpuid.h>
#endif
#if defined(PYUNLEARN_AMX_BF16) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define PYUNLEARN_AMX
#endif

namespace pyunlearn {

namespace amx {
void product(const Bf16Product&, int threads);
void gradient(const Bf16Gradient&, int threads);
}  // namespace amx
namespace avx512bf16 { void product(const Bf16Product&, int threads); }

namespace {

struct Kernel {
  const char* name = nullptr;
  void (*product)(const Bf16Product&, int threads) = nullptr;
  void (*gradient)(const Bf16Gradient&, int threads) = nullptr;
};

#if defined(PYUNLEARN_AMX)
bool may_use_tiles() {  // the system has to be asked, once for all threads of the process
  constexpr int kAskForPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
}
#endif

Kernel find() {
#if defined(PYUNLEARN_AVX512_BF16)
  if (std::strcmp(cpu_kernels().name, "avx512")) return {};
  unsigned eax, ebx, ecx, edx;
  // AVX512-BF16, which the kernel with AMX rounds with
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax >> 5 & 1)) return {};
#if defined(PYUNLEARN_AMX)
  const char* wanted = std::getenv("PYUNLEARN_CPU");
  // AMX-BF16, AMX-TILE
  const bool tiles = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx >> 22 & 1 && edx >> 24 & 1;
  if (tiles && !(wanted && *wanted) && may_use_tiles()) return {"amx_bf16", amx::product, amx::gradient};
#endif
  return {"avx512_bf16", avx512bf16::product};
#else
  return {};
#endif
}

const Kernel& kernel() {
  static const Kernel found = find();
  return found;
}

}  // namespace

const char* bf16_products() { return kernel().name; }

const char* bf16_product_cpu(const Bf16Product& p, int threads) {
  if (!kernel().name) return "this machine, or this build, has neither AVX512-BF16 nor AMX";
  if (p.rows < 0 || p.columns < 0 || p.width < 0) return "rows, columns and width must not be negative";
  if (!p.rows || !p.columns) return nullptr;
  if (!p.a || !p.b || !p.out) return "a, b and out must not be null";
  kernel().product(p, threads);
  return nullptr;
}

const char* bf16_gradient_cpu(const Bf16Gradient& p, int threads) {
  if (!kernel().gradient) return "this machine, or this build, has no AMX";
  if (p.rows < 0 || p.columns < 0 || p.depth < 0) return "rows, columns and depth must not be negative";
  if (p.rounds && p.adds) return "sums are added to float32 numbers only";
  if (!p.rows || !p.columns) return nullptr;
  if ((p.depth && (!p.a || !p.b)) || !p.out) return "a, b and out must not be null";
  kernel().gradient(p, threads);
  return nullptr;
}

}  // namespace pyunlearn
