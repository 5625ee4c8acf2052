// The CPU entry points of log_likelihood.h.
#include "../log_likelihood.h"

#include "entry.h"

namespace pyunlearn {

const char* log_likelihood_statistics_cpu(const StatisticsArguments& a, int threads) {
  if (const char* why = refuse(a.block, a.kept)) return why;
  if (!a.maximum || !a.sum || !a.target_logit)
    return a.block.rows ? "maximum, sum and target_logit must not be null" : nullptr;
  if (a.kept.data && !a.block_maximum && a.block.rows)
    return "kept needs block_maximum, without which it cannot be used";
  run(cpu_kernels().log_likelihood_statistics, a, a.block, threads);
  return nullptr;
}

const char* log_likelihood_gradient_cpu(const GradientArguments& a, int threads) {
  if (const char* why = refuse(a.block, a.out)) return why;
  if (!a.block.rows) return nullptr;
  if (!a.maximum || !a.sum || !a.log_likelihood || !a.coefficients || !a.out.data)
    return "maximum, sum, log_likelihood, coefficients and out must not be null";
  if (a.is_kept && !a.block_maximum) return "a kept block needs the block_maximum that came with it";
  run(cpu_kernels().log_likelihood_gradient, a, a.block, threads);
  return nullptr;
}

}  // namespace pyunlearn
