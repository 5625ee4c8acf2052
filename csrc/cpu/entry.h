// What the CPU entry points share: what they refuse, the bias as the kernels want it, and the rows' threads.
#pragma once
#include <vector>

#include "parallel.h"
#include "variant.h"

namespace pyunlearn {

inline const char* refuse(const LogitBlock& b) {
  if (b.rows < 0 || b.columns < 0) return "the logits' rows and columns must not be negative";
  if (b.stride < b.columns && b.rows > 1) return "the logits' row stride must be at least the number of columns";
  if (b.rows > 0 && (!b.data || !b.targets)) return "the logits and targets must not be null";
  if (!(b.softcap >= 0)) return "softcap must be positive, or 0 for none";
  return nullptr;
}

inline const char* refuse(const LogitBlock& b, const MatrixOut& out) {
  if (const char* why = refuse(b)) return why;
  if (!out.data) return nullptr;
  if (out.stride < b.columns && b.rows > 1) return "the output's row stride must be at least the number of columns";
  if ((b.dtype == Dtype::float64) != (out.dtype == Dtype::float64))
    return "float64 logits go with float64 outputs, and no others do: convert one of them";
  if (out.data == b.data && b.rows > 0 && (out.dtype != b.dtype || out.stride != b.stride))
    return "an output in the logits' own memory must have their dtype and row stride";
  return nullptr;
}

// The bias of a block in float or double, as its statistics are, with room for whole vectors; null if z = x.
class Bias {
 public:
  explicit Bias(const LogitBlock& b) {
    if (!b.bias && b.scale == 1 && b.softcap == 0) return;
    if (b.dtype == Dtype::float64) fill(b, twice_);
    else fill(b, single_);
  }
  const void* data() const {
    return !twice_.empty() ? static_cast<const void*>(twice_.data()) : !single_.empty() ? single_.data() : nullptr;
  }

 private:
  template <class real> static void fill(const LogitBlock& b, std::vector<real>& bias) {
    bias.resize(b.columns + 16);
    if (!b.bias) return;
    if (b.bias_dtype == Dtype::float64) {
      const double* from = static_cast<const double*>(b.bias);
      for (int64_t i = 0; i < b.columns; ++i) bias[i] = static_cast<real>(from[i]);
    } else {
      std::vector<float> narrow(b.columns);
      cpu_kernels().widen(b.bias_dtype, b.bias, b.columns, narrow.data());
      for (int64_t i = 0; i < b.columns; ++i) bias[i] = narrow[i];
    }
  }
  std::vector<float> single_;
  std::vector<double> twice_;
};

template <class Arguments>
void run(const RowKernel<Arguments>& kernel, const Arguments& a, const LogitBlock& b, int threads) {
  const Bias bias(b);
  const auto rows = b.dtype == Dtype::float64 ? kernel.twice : kernel.single;
  parallel_rows(b.rows, b.columns, threads, [&](int64_t begin, int64_t end) { rows(a, bias.data(), begin, end); });
}

}  // namespace pyunlearn
