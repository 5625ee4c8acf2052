// The CPU entry points of the row kernels: which variant runs, what they refuse, and the rows' threads.
#include "../log_likelihood.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "row_kernels.h"

namespace pyunlearn {
namespace {

const CpuVariant& choose_variant() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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

const CpuVariant& variant() {
  static const CpuVariant& chosen = choose_variant();
  return chosen;
}

// The bias as CpuVariant wants it; empty if z = x.
template <class real> std::vector<real> bias_in_real(const LogitBlock& b) {
  std::vector<real> bias;
  if (!b.bias && b.scale == 1 && b.softcap == 0) return bias;
  bias.resize(b.columns + 16);
  if (!b.bias) return bias;
  if (b.bias_dtype == Dtype::float64) {
    const double* from = static_cast<const double*>(b.bias);
    for (int64_t i = 0; i < b.columns; ++i) bias[i] = static_cast<real>(from[i]);
  } else {
    std::vector<float> narrow(b.columns);
    variant().widen(b.bias_dtype, b.bias, b.columns, narrow.data());
    for (int64_t i = 0; i < b.columns; ++i) bias[i] = narrow[i];
  }
  return bias;
}

template <class Arguments>
void run(void (*rows)(const Arguments&, const void*, int64_t, int64_t), const Arguments& a, int threads) {
  const LogitBlock& b = a.block;
  std::vector<float> single;
  std::vector<double> twice;
  if (b.dtype == Dtype::float64) twice = bias_in_real<double>(b);
  else single = bias_in_real<float>(b);
  const void* bias = !twice.empty() ? static_cast<const void*>(twice.data()) : !single.empty() ? single.data() : nullptr;
  parallel_rows(b.rows, b.columns, threads, [&](int64_t begin, int64_t end) { rows(a, bias, begin, end); });
}

const char* refuse(const LogitBlock& b, const MatrixOut& out) {
  if (b.rows < 0 || b.columns < 0) return "the logits' rows and columns must not be negative";
  if (b.stride < b.columns && b.rows > 1) return "the logits' row stride must be at least the number of columns";
  if (b.rows > 0 && (!b.data || !b.targets)) return "the logits and targets must not be null";
  if (!(b.softcap >= 0)) return "softcap must be positive, or 0 for none";
  if (!out.data) return nullptr;
  if (out.stride < b.columns && b.rows > 1) return "the output's row stride must be at least the number of columns";
  if ((b.dtype == Dtype::float64) != (out.dtype == Dtype::float64))
    return "float64 logits go with float64 outputs, and no others do: convert one of them";
  if (out.data == b.data && b.rows > 0 && (out.dtype != b.dtype || out.stride != b.stride))
    return "an output in the logits' own memory must have their dtype and row stride";
  return nullptr;
}

}  // namespace

const char* cpu_variant() { return variant().name; }

const char* log_likelihood_statistics_cpu(const StatisticsArguments& a, int threads) {
  if (const char* why = refuse(a.block, a.kept)) return why;
  if (!a.maximum || !a.sum || !a.target_logit) return a.block.rows ? "maximum, sum and target_logit must not be null" : nullptr;
  if (a.kept.data && !a.block_maximum && a.block.rows) return "kept needs block_maximum, without which it cannot be used";
  run(variant().statistics, a, threads);
  return nullptr;
}

const char* log_likelihood_gradient_cpu(const GradientArguments& a, int threads) {
  if (const char* why = refuse(a.block, a.out)) return why;
  if (!a.block.rows) return nullptr;
  if (!a.maximum || !a.sum || !a.log_likelihood || !a.coefficients || !a.out.data)
    return "maximum, sum, log_likelihood, coefficients and out must not be null";
  if (a.is_kept && !a.block_maximum) return "a kept block needs the block_maximum that came with it";
  run(variant().gradient, a, threads);
  return nullptr;
}

}  // namespace pyunlearn
