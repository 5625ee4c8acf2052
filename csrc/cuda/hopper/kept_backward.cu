// The contract of kept_backward.h: what the kept form's backward does in addition to its two matrix products.
#include "../../kept_backward.h"

#include <cuda_runtime.h>

#include "../packs.cuh"

namespace pyunlearn {
namespace {

constexpr int N = 8;  // columns that a thread takes at a time
constexpr int kThreads = 64, kRowsABlock = 4;  // threads to a row, rows to a block

__global__ void __launch_bounds__(kThreads* kRowsABlock)
    scale_rows(const __grid_constant__ KeptRows rows, const __grid_constant__ MatrixIn in,
               const __grid_constant__ MatrixOut out) {
  const int64_t r = (int64_t)blockIdx.x * kRowsABlock + threadIdx.y;
  if (r >= rows.n) return;
  const int d = (int)rows.d;
  const bool nothing = rows.coefficients[r] == 0.f;
  const float a = nothing ? 0.f : -rows.coefficients[r] * (float)rows.scale * rows.factor[r];
  const AnyRow<N> from(in.data, in.dtype, in.stride, r, d, 0), to(out, r, d, 0);
  for (int at = threadIdx.x * N; at < d; at += kThreads * N) {
    float x[N] = {};
    if (!nothing) from.load(at, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= a;
    to.store(at, x);
  }
}

}  // namespace

const char* kept_scale_rows(const KeptRows& rows, const MatrixIn& in, const MatrixOut& out, void* stream) {
  if (in.dtype == Dtype::float64 || out.dtype == Dtype::float64) return "float64 runs on the reference backend";
  if (rows.d > 1 << 30) return "a hidden size above 2^30";
  if (rows.n > (int64_t(1) << 31) - 1) return "more than 2^31 - 1 rows in one call";
  if (rows.n == 0) return nullptr;
  const unsigned blocks = (unsigned)((rows.n + kRowsABlock - 1) / kRowsABlock);
  scale_rows<<<blocks, dim3(kThreads, kRowsABlock), 0, (cudaStream_t)stream>>>(rows, in, out);
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace pyunlearn
