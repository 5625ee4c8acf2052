// target_products of token_statistics.h for any NVIDIA GPU: a warp for each row.
#include "../token_statistics.h"
#include "logits.cuh"

namespace pyunlearn {
namespace {

__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreadsABlock<32>) multiply_targets(const TargetProductsArguments a) {
  const int64_t r = row_of_thread<32>();
  if (r >= a.rows) return;
  const T* hidden = (const T*)a.hidden + r * a.hidden_stride;
  const T* weight = (const T*)a.weight + a.row_of_weight(r) * a.weight_stride;
  double sum = 0, size = 0;
#pragma unroll 4
  for (int64_t k = threadIdx.x % 32; k < a.width; k += 32) {
    const double x = (double)to_float(hidden[k]) * (double)to_float(weight[k]);
    sum += x, size += fabs(x);
  }
  sum = sum_of_warp(sum), size = sum_of_warp(size);
  if (threadIdx.x % 32 == 0) a.sum[r] = sum, a.size[r] = size;
}

}  // namespace

const char* target_products_cuda(const TargetProductsArguments& a, void* stream) {
  if (a.dtype == Dtype::float64) return "float64 runs on the reference backend";
  if (a.rows > kMostRows) return "more than 2^31 - 1 rows in one call";
  if (!a.rows) return nullptr;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    multiply_targets<T><<<grid_over_rows<32>(a.rows), kThreadsABlock<32>, 0, (cudaStream_t)stream>>>(a);
  });
  return launched();
}

}  // namespace pyunlearn
