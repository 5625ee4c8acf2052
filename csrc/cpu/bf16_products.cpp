// The CPU entry point of bf16_products.h.
#include "../bf16_products.h"

#include <cstring>

#include "parallel.h"
#include "variant.h"

#if defined(PYUNLEARN_AVX512_BF16)
#include <cpuid.h>
#endif

namespace pyunlearn {

#if defined(PYUNLEARN_AVX512_BF16)
namespace avx512bf16 {
extern const int64_t panel;                                                      // columns that one call computes
void columns_of(const Bf16Product&, int64_t first_column, int64_t end_column);  // at most a panel
}  // namespace avx512bf16

namespace {

bool find() {
  if (std::strcmp(cpu_kernels().name, "avx512")) return false;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || edx >> 22 & 1) return false;  // AMX-BF16
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 5 & 1;               // AVX512-BF16
}

}  // namespace

bool bf16_products_serve() {
  static const bool found = find();
  return found;
}

const char* bf16_product_cpu(const Bf16Product& p, int threads) {
  if (!bf16_products_serve()) return "this machine has no AVX512-BF16";
  if (p.rows < 0 || p.columns < 0 || p.width < 0) return "rows, columns and width must not be negative";
  if (!p.rows || !p.columns) return nullptr;
  if (!p.a || !p.b || !p.out) return "a, b and out must not be null";
  const int64_t panels = (p.columns + avx512bf16::panel - 1) / avx512bf16::panel;
  parallel_rows(panels, p.rows * p.width, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * avx512bf16::panel, beyond = first + avx512bf16::panel;
      avx512bf16::columns_of(p, first, beyond < p.columns ? beyond : p.columns);
    }
  });
  return nullptr;
}
#else
bool bf16_products_serve() { return false; }
const char* bf16_product_cpu(const Bf16Product&, int) { return "this build has no AVX512-BF16"; }
#endif

}  // namespace pyunlearn
