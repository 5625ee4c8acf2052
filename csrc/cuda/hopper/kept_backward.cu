// The contract of kept_backward.h: everything that the kept form's backward does beside its two matrix products.
#include "../../kept_backward.h"

#include <cuda_runtime.h>

#include "../packs.cuh"

namespace pyunlearn {
namespace {

constexpr int N = 8;         // columns that a thread takes at a time
constexpr int kThreads = 64, kRowsABlock = 4;  // elementwise kernels: threads to a row, rows to a block
constexpr int kSlice = 128;  // threads of a block that sums rows: one slice of N * kSlice columns
constexpr int kBatch = 8;    // rows whose loads are under way at a time

struct Rows {  // KeptRows with its numbers in the kernels' types
  int64_t n, v;
  int d;
  float scale, inverse_cap;
  const int64_t* targets;
  const float *coefficients, *factor, *log_likelihood, *maximum, *total;

  __device__ float for_product(int64_t row) const { return -coefficients[row] * scale * factor[row]; }
  __device__ float for_target(int64_t row) const {
    const float value = log_likelihood[row], at_target = coefficients[row] * scale * -expm1f(value);
    if (inverse_cap == 0.f) return at_target;
    const float t = (value + logf(total[row]) + maximum[row]) * inverse_cap;
    return at_target * fmaxf(fmaf(-t, t, 1.f), 0.f);
  }
};

__device__ __forceinline__ AnyRow<N> row_of(const MatrixIn& m, int64_t row, int columns) {
  return AnyRow<N>(m.data, m.dtype, m.stride, row, columns, 0);
}

__global__ void __launch_bounds__(kThreads* kRowsABlock)
scale_hidden(const __grid_constant__ Rows rows, const __grid_constant__ MatrixIn hidden, const __grid_constant__ MatrixOut out) {
  const int64_t r = (int64_t)blockIdx.x * kRowsABlock + threadIdx.y;
  if (r >= rows.n) return;
  const bool nothing = rows.coefficients[r] == 0.f;
  const float a = nothing ? 0.f : rows.for_product(r);
  const AnyRow<N> from = row_of(hidden, r, rows.d), to(out, r, rows.d, 0);
  for (int at = threadIdx.x * N; at < rows.d; at += kThreads * N) {
    float x[N] = {};
    if (!nothing) from.load(at, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= a;
    to.store(at, x);
  }
}

__global__ void __launch_bounds__(kThreads* kRowsABlock)
hidden_gradient(const __grid_constant__ Rows rows, const __grid_constant__ MatrixIn product, const __grid_constant__ MatrixIn weight,
                const __grid_constant__ MatrixOut out) {
  const int64_t r = (int64_t)blockIdx.x * kRowsABlock + threadIdx.y;
  if (r >= rows.n) return;
  const int64_t target = rows.targets[r];
  const bool nothing = rows.coefficients[r] == 0.f, known = !nothing && target >= 0 && target < rows.v;
  const float a = nothing ? 0.f : rows.for_product(r), b = known ? rows.for_target(r) : 0.f;
  const AnyRow<N> from = row_of(product, r, rows.d), of_target = row_of(weight, known ? target : 0, rows.d), to(out, r, rows.d, 0);
  for (int at = threadIdx.x * N; at < rows.d; at += kThreads * N) {
    float x[N] = {}, w[N] = {};
    if (!nothing) from.load(at, x);
    if (known) of_target.load(at, w);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = fmaf(b, w[i], a * x[i]);
    to.store(at, x);
  }
}

// Where the run of equal values that begins at `first` ends. Most targets stand alone, so the search starts small.
__device__ __forceinline__ int64_t end_of_run(const int64_t* sorted, int64_t first, int64_t n) {
  const int64_t value = sorted[first];
  int64_t in = first, step = 1;
  while (in + step < n && sorted[in + step] == value) in += step, step *= 2;
  int64_t out = in + step < n ? in + step : n;  // in: inside the run, out: outside
  while (out - in > 1) {
    const int64_t middle = in + (out - in) / 2;
    if (sorted[middle] == value) in = middle;
    else out = middle;
  }
  return out;
}

// Block (i, slice) adds up the run of equal targets that begins at position i; the blocks of other positions have nothing to do.
__global__ void __launch_bounds__(kSlice) add_targets(const __grid_constant__ Rows rows, const __grid_constant__ MatrixIn hidden, const int64_t* sorted,
                                                      const int64_t* order, const __grid_constant__ MatrixOut d_weight) {
  const int64_t first = blockIdx.x, target = sorted[first];
  if (target < 0 || target >= rows.v || (first > 0 && sorted[first - 1] == target)) return;
  const int at = (blockIdx.y * kSlice + threadIdx.x) * N;
  if (at >= rows.d) return;
  const int64_t end = end_of_run(sorted, first, rows.n);

  float sum[N] = {};
  for (int64_t begin = first; begin < end; begin += kBatch) {
    float b[kBatch], x[kBatch][N];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t r = begin + k < end ? order[begin + k] : -1;
      const bool something = r >= 0 && rows.coefficients[r] != 0.f;
      b[k] = something ? rows.for_target(r) : 0.f;
#pragma unroll
      for (int i = 0; i < N; ++i) x[k][i] = 0.f;
      if (something) row_of(hidden, r, rows.d).load(at, x[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = fmaf(b[k], x[k][i], sum[i]);
  }
  const AnyRow<N> to(d_weight, target, rows.d, 0);
  float before[N];
  to.load(at, before);
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] += before[i];
  to.store(at, sum);
}

// ------------------------------------------------------------------------------------------------------------- launchers

template <class... Matrix> const char* cannot(const KeptRows& rows, const Matrix&... matrices) {
  if (((matrices.dtype == Dtype::float64) || ...)) return "float64 runs on the reference backend";
  if (rows.d > 1 << 30) return "a hidden size above 2^30";
  if (rows.n > (int64_t(1) << 31) - 1) return "more than 2^31 - 1 rows in one call";
  return nullptr;
}

Rows device_rows(const KeptRows& r) {
  const float inverse_cap = r.softcap != 0.0 ? (float)(1.0 / r.softcap) : 0.f;
  return {r.n, r.v, (int)r.d, (float)r.scale, inverse_cap, r.targets, r.coefficients, r.factor, r.log_likelihood, r.maximum, r.total};
}

const char* launched() {
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

dim3 grid_over_rows(int64_t n) { return dim3((unsigned)((n + kRowsABlock - 1) / kRowsABlock)); }

}  // namespace

const char* kept_scale_hidden(const KeptRows& rows, const MatrixIn& hidden, const MatrixOut& out, void* stream) {
  if (const char* why = cannot(rows, hidden, out)) return why;
  if (rows.n == 0) return nullptr;
  scale_hidden<<<grid_over_rows(rows.n), dim3(kThreads, kRowsABlock), 0, (cudaStream_t)stream>>>(device_rows(rows), hidden, out);
  return launched();
}

const char* kept_hidden_gradient(const KeptRows& rows, const MatrixIn& product, const MatrixIn& weight, const MatrixOut& out, void* stream) {
  if (const char* why = cannot(rows, product, weight, out)) return why;
  if (rows.n == 0) return nullptr;
  hidden_gradient<<<grid_over_rows(rows.n), dim3(kThreads, kRowsABlock), 0, (cudaStream_t)stream>>>(device_rows(rows), product, weight, out);
  return launched();
}

const char* kept_add_targets(const KeptRows& rows, const MatrixIn& hidden, const int64_t* sorted_targets, const int64_t* order,
                             const MatrixOut& d_weight, void* stream) {
  if (const char* why = cannot(rows, hidden, d_weight)) return why;
  if (rows.n == 0 || rows.d == 0) return nullptr;
  const dim3 grid((unsigned)rows.n, (unsigned)((rows.d + N * kSlice - 1) / (N * kSlice)));
  add_targets<<<grid, kSlice, 0, (cudaStream_t)stream>>>(device_rows(rows), hidden, sorted_targets, order, d_weight);
  return launched();
}

}  // namespace pyunlearn
