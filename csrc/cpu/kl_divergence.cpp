// The CPU entry points of kl_divergence.h.
#include "../kl_divergence.h"

#include "entry.h"

namespace pyunlearn {
namespace {

const char* refuse(const LogitPair& pair, const MatrixOut& out) {
  if (const char* why = pyunlearn::refuse(pair.model, out)) return why;
  if (const char* why = pyunlearn::refuse(pair.reference)) return why;
  if (pair.model.rows != pair.reference.rows || pair.model.columns != pair.reference.columns ||
      pair.model.dtype != pair.reference.dtype)
    return "both blocks of logits must have the same rows, columns and dtype";
  return nullptr;
}

template <class Arguments> void run_pairs(const PairKernel<Arguments>& kernel, const Arguments& a, int threads) {
  const LogitBlock& b = a.pair.model;
  const Bias bias(b), reference_bias(a.pair.reference);
  const auto rows = b.dtype == Dtype::float64 ? kernel.twice : kernel.single;
  parallel_rows(b.rows, 2 * b.columns, threads,
                [&](int64_t begin, int64_t end) { rows(a, bias.data(), reference_bias.data(), begin, end); });
}

}  // namespace

const char* kl_statistics_cpu(const KlStatisticsArguments& a, int threads) {
  if (const char* why = refuse(a.pair, {})) return why;
  if (!a.pair.model.rows) return nullptr;
  if (!a.maximum || !a.sum || !a.reference_maximum || !a.reference_sum || !a.cross)
    return "the running statistics must not be null";
  run_pairs(cpu_kernels().kl_statistics, a, threads);
  return nullptr;
}

const char* kl_gradient_cpu(const KlGradientArguments& a, int threads) {
  if (const char* why = refuse(a.pair, a.out)) return why;
  if (!a.pair.model.rows) return nullptr;
  if (!a.maximum || !a.sum || !a.reference_maximum || !a.reference_sum || !a.coefficients || !a.out.data)
    return "the statistics, coefficients and out must not be null";
  run_pairs(cpu_kernels().kl_gradient, a, threads);
  return nullptr;
}

}  // namespace pyunlearn
