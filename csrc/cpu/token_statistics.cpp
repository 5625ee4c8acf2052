// The CPU entry point of token_statistics.h.
#include "../token_statistics.h"

#include "entry.h"

namespace pyunlearn {

const char* token_statistics_cpu(const TokenStatisticsArguments& a, int threads) {
  if (const char* why = refuse(a.block)) return why;
  if (!a.block.rows) return nullptr;
  if (!a.threshold || !a.maximum || !a.sum || !a.first || !a.second || !a.target_logit || !a.rank)
    return "threshold, maximum, sum, first, second, target_logit and rank must not be null";
  run(cpu_kernels().token_statistics, a, a.block, threads);
  return nullptr;
}

}  // namespace pyunlearn
