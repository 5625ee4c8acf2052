// What every row kernel on a GPU has: logits from raw products, rows as threads read them, and how a launch is laid
// out.
#pragma once
#include <cuda_runtime.h>

#include <climits>

#include "../log_likelihood.h"
#include "packs.cuh"

namespace pyunlearn {
namespace {

constexpr int kBlock = 256;
constexpr int kNoColumn = INT_MIN;  // not -1: the pack at the start of a row that is not aligned covers columns below 0
constexpr int64_t kMostColumns = (int64_t(1) << 31) - (1 << 16), kMostRows = (int64_t(1) << 31) - 1;

// within 2e-7 relative near 0, where the mass is; below e^-87 it is 0
__device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// From raw products to logits. The explicit roundings keep the compiler from fusing with what follows, which it might
// do in one kernel and not in another: kept and recomputed exponentials have to agree bit for bit.
struct Head {
  const void* bias;
  Dtype bias_dtype;
  float scale, softcap, inverse_cap;

  __device__ float bias_at(int column) const {
    switch (bias_dtype) {
      case Dtype::bfloat16: return to_float(((const __nv_bfloat16*)bias)[column]);
      case Dtype::float16: return to_float(((const __half*)bias)[column]);
      default: return ((const float*)bias)[column];
    }
  }
  __device__ float slope(float z) const {  // dz/du
    if (softcap == 0.f) return 1.f;
    const float t = __fmul_rn(z, inverse_cap);
    return fmaxf(fmaf(-t, t, 1.f), 0.f);
  }
  template <int N> __device__ __forceinline__ void logits(float (&x)[N], int at, int columns) const {
    if (bias) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (at + i >= 0 && at + i < columns) x[i] = __fadd_rn(x[i], bias_at(at + i));
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(scale, x[i]);
    if (softcap != 0.f) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = __fmul_rn(softcap, tanhf(__fmul_rn(x[i], inverse_cap)));
    }
  }
};

struct Block {  // LogitBlock with its numbers in the kernels' types
  const void* data;
  int64_t stride, rows, first_column;
  int columns;
  const int64_t* targets;
  Head head;

  __device__ int target_column(int64_t row) const {
    const int64_t target = targets[row];
    return target >= first_column && target - first_column < columns ? (int)(target - first_column) : kNoColumn;
  }
};

// From raw products to logits, of U packs, `apart` columns apart; what lies outside the row is -inf, set after the
// softcap.
template <class In, int U>
__device__ __forceinline__ void to_logits(const Block& block, const PackedRow<In>& row, int first, int apart,
                                          float (&z)[U][kPack<In>]) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int at = first + u * apart;
    block.head.logits(z[u], at, row.columns);
    if (row.inside(at)) continue;
#pragma unroll
    for (int i = 0; i < kPack<In>; ++i)
      if (at + i < 0 || at + i >= row.columns) z[u][i] = -INFINITY;
  }
}

// The same from memory. The thread that holds the target's logit writes it down.
template <class In, int U>
__device__ __forceinline__ void load_logits(const Block& block, const PackedRow<In>& row, int first, int apart,
                                            int target, float* target_logit, float (&z)[U][kPack<In>]) {
  row.load(first, apart, z);
  to_logits(block, row, first, apart, z);
#pragma unroll
  for (int u = 0; u < U; ++u)
#pragma unroll
    for (int i = 0; i < kPack<In>; ++i)
      if (first + u * apart + i == target) *target_logit = z[u][i];
}

template <int Threads> constexpr int kThreadsABlock = Threads == 32 ? 128 : Threads;  // a row has a warp, or a block
// Blocks of so many threads that a multiprocessor shall hold, so that a thread has Registers of its 65536 registers.
// Left to itself, ptxas spills for the sake of more blocks.
template <int Threads, int Registers> constexpr int kBlocks = 65536 / Registers / kThreadsABlock<Threads>;

template <int Threads> __device__ __forceinline__ int64_t row_of_thread() {
  constexpr int rows_a_block = kThreadsABlock<Threads> / Threads;
  return (int64_t)blockIdx.x * rows_a_block + threadIdx.x / Threads;
}

// ---------------------------------------------------------------- launchers

template <class T> struct Type { using type = T; };

// f with the threads that share a row: as few as give every one of them its 16 logits at a time, in few turns, with
// little left over. Narrow blocks come with many rows, so the GPU is full either way (pyunlearn/ops/_plan.py).
template <int N> struct Count { static constexpr int threads = N; };

template <class F> void with_threads(int columns, F&& f) {
  if (columns <= 1024) f(Count<32>());
  else if (columns <= 6144) f(Count<128>());
  else f(Count<512>());
}

template <class F> void with_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::bfloat16) f(Type<__nv_bfloat16>());
  else if (dtype == Dtype::float16) f(Type<__half>());
  else f(Type<float>());
}

const char* cannot(const LogitBlock& b) {
  if (b.dtype == Dtype::float64) return "float64 logits run on the reference backend";
  if (b.bias && b.bias_dtype == Dtype::float64) return "a float64 bias runs on the reference backend";
  if (b.rows > kMostRows) return "more than 2^31 - 1 rows in one call";
  if (b.columns > kMostColumns) return "more than 2^31 - 65536 columns in one block";
  return nullptr;
}

Block device_block(const LogitBlock& b) {
  const float cap = (float)b.softcap, inverse = cap != 0.f ? (float)(1.0 / b.softcap) : 0.f;
  return {b.data,
          b.stride,
          b.rows,
          b.first_column,
          (int)b.columns,
          b.targets,
          {b.bias, b.bias_dtype, (float)b.scale, cap, inverse}};
}

const char* launched() {
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

template <int Threads> dim3 grid_over_rows(int64_t rows) {
  constexpr int rows_a_block = kThreadsABlock<Threads> / Threads;
  return dim3((unsigned)((rows + rows_a_block - 1) / rows_a_block));
}

}  // namespace
}  // namespace pyunlearn
