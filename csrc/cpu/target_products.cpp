// The CPU entry point of target_products in token_statistics.h.
#include <cmath>

#include "../token_statistics.h"
#include "parallel.h"
#include "variant.h"

namespace pyunlearn {
namespace {

constexpr int kLanes = 8;  // sums side by side, so that none waits for the one before
constexpr int64_t kWide = 512;  // numbers that are widened at a time

struct Sums {
  double sums[kLanes] = {}, sizes[kLanes] = {};

  template <class T> void add(const T* a, const T* b, int64_t count) {  // a multiple of kLanes, except the last time
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t k = 0; k < whole; k += kLanes)
      for (int i = 0; i < kLanes; ++i) add_to(i, double(a[k + i]), double(b[k + i]));
    for (int64_t k = whole; k < count; ++k) add_to(static_cast<int>(k - whole), double(a[k]), double(b[k]));
  }
  void add_to(int lane, double a, double b) {
    const double x = a * b;
    sums[lane] += x, sizes[lane] += std::fabs(x);
  }
  void total(double* sum, double* size) const {
    *sum = *size = 0;
    for (int i = 0; i < kLanes; ++i) *sum += sums[i], *size += sizes[i];
  }
};

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

const void* row_of(const void* matrix, Dtype dtype, int64_t at) {
  return static_cast<const char*>(matrix) + at * bytes_of(dtype);
}

}  // namespace

const char* target_products_cpu(const TargetProductsArguments& a, int threads) {
  if (a.rows < 0 || a.width < 0 || a.vocabulary <= 0)
    return "rows and width must not be negative, and the vocabulary not empty";
  if (!a.rows) return nullptr;
  if ((a.width && (!a.hidden || !a.weight)) || !a.targets || !a.sum || !a.size)
    return "hidden, weight, targets, sum and size must not be null";
  parallel_rows(a.rows, a.width, threads, [&](int64_t begin, int64_t end) {
    float h[kWide], w[kWide];
    for (int64_t r = begin; r < end; ++r) {
      const void* hidden = row_of(a.hidden, a.dtype, r * a.hidden_stride);
      const void* weight = row_of(a.weight, a.dtype, a.row_of_weight(r) * a.weight_stride);
      Sums sums;
      if (a.dtype == Dtype::float64) {
        sums.add(static_cast<const double*>(hidden), static_cast<const double*>(weight), a.width);
      } else {
        for (int64_t k = 0; k < a.width; k += kWide) {
          const int64_t count = a.width - k < kWide ? a.width - k : kWide;
          cpu_kernels().widen(a.dtype, row_of(hidden, a.dtype, k), count, h);
          cpu_kernels().widen(a.dtype, row_of(weight, a.dtype, k), count, w);
          sums.add(h, w, count);
        }
      }
      sums.total(a.sum + r, a.size + r);
    }
  });
  return nullptr;
}

}  // namespace pyunlearn
