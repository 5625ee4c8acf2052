// What one instruction set offers: every row kernel of the contracts in csrc/*.h, on a range of rows. A variant's
// translation unit defines PYUNLEARN_VARIANT (its namespace) and PYUNLEARN_VECTOR_BYTES and includes this file;
// elsewhere only the interface is declared.
#pragma once
#include "../kl_divergence.h"
#include "../log_likelihood.h"
#include "../token_statistics.h"

namespace pyunlearn {

// A kernel for float32 statistics, and one for float64.
template <class Kernel> struct ForReal { Kernel single, twice; };
// Rows [begin, end). bias: in real, zeros if there is none, padded to whole vectors; null if z = x.
template <class Arguments>
using RowKernel = ForReal<void (*)(const Arguments&, const void* bias, int64_t begin, int64_t end)>;
template <class Arguments>
using PairKernel =
    ForReal<void (*)(const Arguments&, const void* bias, const void* reference_bias, int64_t begin, int64_t end)>;

struct CpuVariant {
  const char* name;
  RowKernel<StatisticsArguments> log_likelihood_statistics;
  RowKernel<GradientArguments> log_likelihood_gradient;
  RowKernel<TokenStatisticsArguments> token_statistics;
  PairKernel<KlStatisticsArguments> kl_statistics;
  PairKernel<KlGradientArguments> kl_gradient;
  void (*widen)(Dtype, const void* from, int64_t count, float* to);  // not from float64
};
const CpuVariant& cpu_kernels();  // the best that this machine runs, or what PYUNLEARN_CPU asks for

namespace portable { extern const CpuVariant variant; }
namespace avx2 { extern const CpuVariant variant; }
namespace avx512 { extern const CpuVariant variant; }

}  // namespace pyunlearn

#ifdef PYUNLEARN_VARIANT
#include "kl_divergence_rows.h"
#include "log_likelihood_rows.h"
#include "token_statistics_rows.h"

namespace pyunlearn {
namespace PYUNLEARN_VARIANT {

const CpuVariant variant = {
    PYUNLEARN_VARIANT_NAME,
    {log_likelihood_statistics<float>, log_likelihood_statistics<double>},
    {log_likelihood_gradient<float>, log_likelihood_gradient<double>},
    {token_statistics<float>, token_statistics<double>},
    {kl_statistics<float>, kl_statistics<double>},
    {kl_gradient<float>, kl_gradient<double>},
    widen,
};

}  // namespace PYUNLEARN_VARIANT
}  // namespace pyunlearn
#endif
