// The CPU entry point of target_products in token_statistics.h.
#include <cmath>
#include <vector>

#include "../token_statistics.h"
#include "parallel.h"
#include "variant.h"

namespace pyunlearn {
namespace {

constexpr int kLanes = 8;  // sums side by side, so that none waits for the one before

template <class T> void add_products(const T* a, const T* b, int64_t width, double* sum, double* size) {
  double sums[kLanes] = {}, sizes[kLanes] = {};
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const double x = double(a[k + i]) * double(b[k + i]);
      sums[i] += x, sizes[i] += std::fabs(x);
    }
  for (int64_t k = whole; k < width; ++k) {
    const double x = double(a[k]) * double(b[k]);
    sums[k - whole] += x, sizes[k - whole] += std::fabs(x);
  }
  *sum = *size = 0;
  for (int i = 0; i < kLanes; ++i) *sum += sums[i], *size += sizes[i];
}

const void* row_of(const void* matrix, Dtype dtype, int64_t at) {
  return static_cast<const char*>(matrix) + at * (dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2);
}

}  // namespace

const char* target_products_cpu(const TargetProductsArguments& a, int threads) {
  if (a.rows < 0 || a.width < 0 || a.vocabulary <= 0)
    return "rows and width must not be negative, and the vocabulary not empty";
  if (!a.rows) return nullptr;
  if ((a.width && (!a.hidden || !a.weight)) || !a.targets || !a.sum || !a.size)
    return "hidden, weight, targets, sum and size must not be null";
  parallel_rows(a.rows, a.width, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> h(a.width), w(a.width);
    for (int64_t r = begin; r < end; ++r) {
      const void* hidden = row_of(a.hidden, a.dtype, r * a.hidden_stride);
      const void* weight = row_of(a.weight, a.dtype, a.row_of_weight(r) * a.weight_stride);
      if (a.dtype == Dtype::float64) {
        add_products(static_cast<const double*>(hidden), static_cast<const double*>(weight), a.width, a.sum + r,
                     a.size + r);
      } else {
        cpu_kernels().widen(a.dtype, hidden, a.width, h.data());
        cpu_kernels().widen(a.dtype, weight, a.width, w.data());
        add_products(h.data(), w.data(), a.width, a.sum + r, a.size + r);
      }
    }
  });
  return nullptr;
}

}  // namespace pyunlearn
