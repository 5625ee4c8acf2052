// Rows of a matrix in packs of 16 bytes, whatever the alignment of the row: pack 0 begins at the last aligned address
// at or before the row, so the first and the last pack may stick out of it; those two go element by element, all others
// as one load or store.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../log_likelihood.h"

namespace pyunlearn {

template <class T> constexpr int kPack = 16 / (int)sizeof(T);  // elements of a pack of T

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack { T at[N]; };

// A row that is read in packs. It may be written at the same addresses by the thread that read them, so no read-only
// cache here.
template <class T> struct PackedRow {
  static constexpr int N = kPack<T>;
  const T* data;
  int columns, start, packs;  // start: the column of pack 0, in (-N, 0]
  bool aligned = true;

  __device__ PackedRow(const void* matrix, int64_t offset, int columns_)
      : data((const T*)matrix + offset), columns(columns_) {
    start = -(int)((uintptr_t)data % 16 / sizeof(T));
    packs = (columns - start + N - 1) / N;
  }
  // In packs of the same columns as those of another row; element by element if its addresses do not allow that.
  __device__ PackedRow(const void* matrix, int64_t offset, const PackedRow& other)
      : PackedRow(matrix, offset, other.columns) {
    aligned = start == other.start;
    start = other.start, packs = other.packs;
  }
  __device__ int column(int pack) const { return start + pack * N; }
  __device__ bool inside(int at) const { return at >= 0 && at + N <= columns; }

  __device__ void load(int at, float (&x)[N]) const {  // from column `at`; what lies outside the row is 0
    if (aligned && inside(at)) {
      const Pack<T, N> pack = *(const Pack<T, N>*)(data + at);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = to_float(pack.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = at + i >= 0 && at + i < columns ? to_float(data[at + i]) : 0.f;
    }
  }

  // U packs, `apart` columns apart, those beyond the row too; all loads are under way before the first is used
  template <int U> __device__ __forceinline__ void load(int at, int apart, float (&x)[U][N]) const {
    bool split = at < 0 || !aligned;  // only the first and the last pack of a row can stick out of it
#pragma unroll
    for (int u = 0; u < U; ++u) split |= at + u * apart < columns && at + u * apart + N > columns;
    if (!split) {
      Pack<T, N> packs[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        packs[u] = {};
        if (at + u * apart < columns) packs[u] = *(const Pack<T, N>*)(data + at + u * apart);
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int i = 0; i < N; ++i) x[u][i] = to_float(packs[u].at[i]);
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u) load(at + u * apart, x[u]);
    }
  }
};

// A row that is read or written N columns at a time, beginning at `start`, and whose type is known at run time only: a
// branch for N columns costs nothing beside the memory, and saves a kernel for every pair of types.
template <int N> struct AnyRow {
  void* data;
  Dtype dtype;
  int columns;
  bool aligned;

  __device__ AnyRow(const void* matrix, Dtype dtype_, int64_t stride, int64_t row, int columns_, int start)
      : dtype(dtype_), columns(columns_) {
    const int64_t size = dtype == Dtype::float32 ? 4 : 2, pack = size * N < 16 ? size * N : 16;
    data = (char*)matrix + row * stride * size;
    aligned = ((intptr_t)data + start * size) % pack == 0;
  }
  __device__ AnyRow(const MatrixOut& m, int64_t row, int columns_, int start)
      : AnyRow(m.data, m.dtype, m.stride, row, columns_, start) {}

  __device__ __forceinline__ void round(float (&x)[N]) const {  // to what a store would leave behind
    if (dtype == Dtype::bfloat16) round_as<__nv_bfloat16>(x);
    else if (dtype == Dtype::float16) round_as<__half>(x);
  }
  __device__ __forceinline__ void load(int at, float (&x)[N]) const {  // what lies outside the row is 0
    if (dtype == Dtype::bfloat16) load_as<__nv_bfloat16>(at, x);
    else if (dtype == Dtype::float16) load_as<__half>(at, x);
    else load_as<float>(at, x);
  }
  __device__ __forceinline__ void store(int at, const float (&x)[N]) const {
    if (dtype == Dtype::bfloat16) store_as<__nv_bfloat16>(at, x);
    else if (dtype == Dtype::float16) store_as<__half>(at, x);
    else store_as<float>(at, x);
  }

 private:
  template <class T> __device__ __forceinline__ void round_as(float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(from_float<T>(x[i]));
  }
  template <class T> __device__ __forceinline__ void load_as(int at, float (&x)[N]) const {
    const T* from = (const T*)data + at;
    if (aligned && at >= 0 && at + N <= columns) {
      const Pack<T, N> pack = *(const Pack<T, N>*)from;
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = to_float(pack.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = at + i >= 0 && at + i < columns ? to_float(from[i]) : 0.f;
    }
  }
  template <class T> __device__ __forceinline__ void store_as(int at, const float (&x)[N]) const {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = from_float<T>(x[i]);
    T* to = (T*)data + at;
    if (aligned && at >= 0 && at + N <= columns) {
      *(Pack<T, N>*)to = pack;
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (at + i >= 0 && at + i < columns) to[i] = pack.at[i];
    }
  }
};

// The sums, maxima, ... of Values values of each of the Threads threads that share a row (a warp, or the whole block),
// for all of them, between two barriers. The order is fixed, so they repeat bit for bit.
template <int Threads, int Values, class Combine>
__device__ __forceinline__ void reduce_row(float (&x)[Values], Combine combine) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1)
#pragma unroll
    for (int v = 0; v < Values; ++v) x[v] = combine(x[v], __shfl_xor_sync(~0u, x[v], offset));
  if constexpr (Threads > 32) {
    constexpr int warps = Threads / 32;
    __shared__ float of_warp[Values][warps];
    __syncthreads();  // whoever still reads the reduction before
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int v = 0; v < Values; ++v) of_warp[v][threadIdx.x / 32] = x[v];
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < Values; ++v) x[v] = of_warp[v][threadIdx.x % warps];
#pragma unroll
    for (int offset = warps / 2; offset; offset >>= 1)
#pragma unroll
      for (int v = 0; v < Values; ++v) x[v] = combine(x[v], __shfl_xor_sync(~0u, x[v], offset));
  }
}

template <int Threads, class Combine> __device__ __forceinline__ float reduce_row(float x, Combine combine) {
  float one[1] = {x};
  reduce_row<Threads>(one, combine);
  return one[0];
}

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};  // passes NaN over
struct Plus {
  __device__ float operator()(float a, float b) const { return a + b; }
};

}  // namespace pyunlearn
