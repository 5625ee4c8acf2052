// The contract of kept_backward.h: everything that the kept form's backward does beside its two matrix products.
#include "../../kept_backward.h"

#include <cuda_runtime.h>

#include "../packs.cuh"

namespace pyunlearn {
namespace {

constexpr int N = 8;         // columns that a thread takes at a time
constexpr int kThreads = 64, kRowsABlock = 4;  // elementwise kernels: threads to a row, rows to a block
// threads of a block that sums rows: one slice of N * kSlice columns; also how many rows it looks up at a time
constexpr int kSlice = 128;
constexpr int64_t kMostColumns = int64_t(65535) * N * kSlice;  // slices are the second dimension of a grid
template <class T> constexpr int kBatch = 32 / (int)sizeof(T);  // rows whose loads are under way at a time

struct Rows {  // KeptRows with its numbers in the kernels' types
  int64_t n, v;
  int d;
  float scale, inverse_cap;
  const int64_t* targets;
  const float *coefficients, *factor, *log_likelihood, *maximum, *total;

  __device__ float for_product(int64_t row) const { return -coefficients[row] * scale * factor[row]; }
  struct OfTarget {  // what the factor of a target's row is made from: all of it is asked for before any of it is used
    float coefficient, log_likelihood, maximum, total;
  };
  __device__ OfTarget of_target(int64_t row) const {
    return {coefficients[row], log_likelihood[row], maximum[row], total[row]};
  }
  __device__ float for_target(const OfTarget& row) const {
    if (row.coefficient == 0.f) return 0.f;
    const float at_target = row.coefficient * scale * -expm1f(row.log_likelihood);
    if (inverse_cap == 0.f) return at_target;
    const float t = (row.log_likelihood + logf(row.total) + row.maximum) * inverse_cap;
    return at_target * fmaxf(fmaf(-t, t, 1.f), 0.f);
  }
};

__device__ __forceinline__ AnyRow<N> row_of(const MatrixIn& m, int64_t row, int columns) {
  return AnyRow<N>(m.data, m.dtype, m.stride, row, columns, 0);
}

__global__ void __launch_bounds__(kThreads* kRowsABlock)
    scale_hidden(const __grid_constant__ Rows rows, const __grid_constant__ MatrixIn hidden,
                 const __grid_constant__ MatrixOut out) {
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
    hidden_gradient(const __grid_constant__ Rows rows, const __grid_constant__ MatrixIn product,
                    const __grid_constant__ MatrixIn weight, const __grid_constant__ MatrixOut out) {
  const int64_t r = (int64_t)blockIdx.x * kRowsABlock + threadIdx.y;
  if (r >= rows.n) return;
  const int64_t target = rows.targets[r];
  const bool nothing = rows.coefficients[r] == 0.f, known = !nothing && target >= 0 && target < rows.v;
  const float a = nothing ? 0.f : rows.for_product(r), b = known ? rows.for_target(rows.of_target(r)) : 0.f;
  const AnyRow<N> from = row_of(product, r, rows.d), of_target = row_of(weight, known ? target : 0, rows.d),
                  to(out, r, rows.d, 0);
  for (int at = threadIdx.x * N; at < rows.d; at += kThreads * N) {
    float x[N] = {}, w[N] = {};
    if (!nothing) from.load(at, x);
    if (known) of_target.load(at, w);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = fmaf(b, w[i], a * x[i]);
    to.store(at, x);
  }
}

// sum += factor * row, row after row of those that a block has looked up, for this thread's columns at .. at + N - 1, W
// of them to a load. The loads of a batch are all under way before the first is used. A row whose factor is 0 is not
// read.
template <class T, int W>
__device__ __forceinline__ void add_rows(const MatrixIn& m, int at, int columns, const int (&row)[kSlice],
                                         const float (&factor)[kSlice], float (&sum)[N]) {
  constexpr int U = kBatch<T>;
  for (int begin = 0; begin < kSlice && row[begin] >= 0; begin += U) {
#pragma unroll
    for (int c = 0; c < N; c += W) {
      if (at + c >= columns) break;
      Pack<T, W> x[U];
#pragma unroll
      for (int k = 0; k < U; ++k) {
        x[k] = {};
        if (factor[begin + k] != 0.f)
          x[k] = *(const Pack<T, W>*)((const T*)m.data + row[begin + k] * m.stride + at + c);
      }
#pragma unroll
      for (int k = 0; k < U; ++k)
#pragma unroll
        for (int i = 0; i < W; ++i) sum[c + i] = fmaf(factor[begin + k], to_float(x[k].at[i]), sum[c + i]);
    }
  }
}
template <class T>
__device__ __forceinline__ void add_rows(const MatrixIn& m, int at, int columns, const int (&row)[kSlice],
                                         const float (&factor)[kSlice], float (&sum)[N]) {
  const bool aligned = ((uintptr_t)m.data | (uintptr_t)(m.stride * (int64_t)sizeof(T))) % 16 == 0;
  if (aligned && at + N <= columns) add_rows<T, N>(m, at, columns, row, factor, sum);
  else add_rows<T, 1>(m, at, columns, row, factor, sum);
}

// Block (i, slice) adds up the run of equal targets that begins at position i; the blocks of other positions have
// nothing to do. Most targets stand alone, so what counts is how often the block waits for memory: for the positions,
// for the rows' numbers, for the rows, each time for as many as there are threads, and for the next positions while it
// adds.
__global__ void __launch_bounds__(kSlice)
    add_targets(const __grid_constant__ Rows rows, const __grid_constant__ MatrixIn hidden, const int64_t* sorted,
                const int64_t* order, const __grid_constant__ MatrixOut d_weight) {
  __shared__ int row_at[kSlice];  // -1 beyond the run
  __shared__ float factor_at[kSlice];
  const int64_t first = blockIdx.x, target = sorted[first], target_before = first > 0 ? sorted[first - 1] : -1;
  int64_t i = first + threadIdx.x, its_target = i < rows.n ? sorted[i] : -1, row = i < rows.n ? order[i] : 0;
  if (target < 0 || target >= rows.v || target == target_before) return;

  const int at = (blockIdx.y * kSlice + threadIdx.x) * N;
  const AnyRow<N> to(d_weight, target, rows.d, 0);
  float sum[N] = {}, before[N];
  for (bool more = true; more;) {
    const bool inside = its_target == target;
    Rows::OfTarget of_target{};
    if (inside) of_target = rows.of_target(row);
    if (i == first + threadIdx.x) to.load(at, before);  // here, beside those numbers
    __syncthreads();  // whoever still adds the rows before
    row_at[threadIdx.x] = inside ? (int)row : -1;
    factor_at[threadIdx.x] = rows.for_target(of_target);
    more = __syncthreads_or(inside && threadIdx.x == kSlice - 1);
    if (more) {
      i += kSlice;
      its_target = i < rows.n ? sorted[i] : -1, row = i < rows.n ? order[i] : 0;
    }
    if (at >= rows.d) continue;
    if (hidden.dtype == Dtype::bfloat16) add_rows<__nv_bfloat16>(hidden, at, rows.d, row_at, factor_at, sum);
    else if (hidden.dtype == Dtype::float16) add_rows<__half>(hidden, at, rows.d, row_at, factor_at, sum);
    else add_rows<float>(hidden, at, rows.d, row_at, factor_at, sum);
  }
#pragma unroll
  for (int c = 0; c < N; ++c) sum[c] += before[c];
  to.store(at, sum);
}

// ---------------------------------------------------------------- launchers

template <class... Matrix> const char* cannot(const KeptRows& rows, const Matrix&... matrices) {
  if (((matrices.dtype == Dtype::float64) || ...)) return "float64 runs on the reference backend";
  if (rows.d > kMostColumns) return "a hidden size above 65535 * 1024";
  if (rows.n > (int64_t(1) << 31) - 1) return "more than 2^31 - 1 rows in one call";
  return nullptr;
}

Rows device_rows(const KeptRows& r) {
  const float inverse_cap = r.softcap != 0.0 ? (float)(1.0 / r.softcap) : 0.f;
  return {
      r.n,       r.v,    (int)r.d, (float)r.scale, inverse_cap, r.targets, r.coefficients, r.factor, r.log_likelihood,
      r.maximum, r.total};
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
  scale_hidden<<<grid_over_rows(rows.n), dim3(kThreads, kRowsABlock), 0, (cudaStream_t)stream>>>(device_rows(rows),
                                                                                                 hidden, out);
  return launched();
}

const char* kept_hidden_gradient(const KeptRows& rows, const MatrixIn& product, const MatrixIn& weight,
                                 const MatrixOut& out, void* stream) {
  if (const char* why = cannot(rows, product, weight, out)) return why;
  if (rows.n == 0) return nullptr;
  hidden_gradient<<<grid_over_rows(rows.n), dim3(kThreads, kRowsABlock), 0, (cudaStream_t)stream>>>(
      device_rows(rows), product, weight, out);
  return launched();
}

const char* kept_add_targets(const KeptRows& rows, const MatrixIn& hidden, const int64_t* sorted_targets,
                             const int64_t* order, const MatrixOut& d_weight, void* stream) {
  if (const char* why = cannot(rows, hidden, d_weight)) return why;
  if (rows.n == 0 || rows.d == 0) return nullptr;
  const dim3 grid((unsigned)rows.n, (unsigned)((rows.d + N * kSlice - 1) / (N * kSlice)));
  add_targets<<<grid, kSlice, 0, (cudaStream_t)stream>>>(device_rows(rows), hidden, sorted_targets, order, d_weight);
  return launched();
}

}  // namespace pyunlearn
