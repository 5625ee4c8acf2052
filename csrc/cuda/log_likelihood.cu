// The contract of log_likelihood.h for any NVIDIA GPU. A row belongs to one warp (narrow blocks) or to one thread block; nothing is atomic, so
// results repeat bit for bit. Statistics alone read each logit once. Statistics that keep the exponentials read it once too while the
// block's row fits into registers, and twice beyond that.
#include <cuda_runtime.h>

#include <climits>

#include "../log_likelihood.h"
#include "../online_softmax.h"
#include "packs.cuh"

namespace pyunlearn {
namespace {

constexpr int kHeld = 32;    // logits that a thread holds at a time
constexpr int kNarrow = 32 * kHeld, kWide = 256 * kHeld;  // columns up to which a warp, a block can hold a row
constexpr int kBlock = 256;
constexpr int kNoColumn = INT_MIN;  // not -1: the pack at the start of a row that is not aligned covers columns below 0
constexpr int64_t kMostColumns = (int64_t(1) << 31) - (1 << 16), kMostRows = (int64_t(1) << 31) - 1;

__device__ __forceinline__ float fast_exp(float x) {  // within 2e-7 relative near 0, where the mass is; below e^-87 it is 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// From raw products to logits. The explicit roundings keep the compiler from fusing with what follows, which it might do in one kernel and
// not in another: kept and recomputed exponentials have to agree bit for bit.
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

struct Statistics {
  float *maximum, *sum, *target_logit, *block_maximum;
  MatrixOut kept;
};

struct Gradient {
  const float *maximum, *sum, *log_likelihood, *coefficients, *block_maximum;
  MatrixOut out;
};

// U packs of logits, `apart` columns apart; what lies outside the row is -inf, set after the softcap. The thread that holds the target's
// logit writes it down.
template <class In, int U>
__device__ __forceinline__ void load_logits(const Block& block, const PackedRow<In>& row, int first, int apart, int target, float* target_logit,
                                            float (&z)[U][kPack<In>]) {
  constexpr int N = kPack<In>;
  row.load(first, apart, z);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int at = first + u * apart;
    block.head.logits(z[u], at, row.columns);
    if (!row.whole(at)) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (at + i < 0 || at + i >= row.columns) z[u][i] = -INFINITY;
    }
    if (target >= at && target < at + N) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (at + i == target) *target_logit = z[u][i];
    }
  }
}

template <int N> __device__ __forceinline__ void keep(const Head& head, const float (&z)[N], float shift, float (&kept)[N], float& sum) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float e = fast_exp(z[i] - shift);
    sum += e;
    kept[i] = __fmul_rn(e, head.slope(z[i]));
  }
}

__device__ __forceinline__ void merge_into_row(const Statistics& to, int64_t row, float maximum, float sum) {
  const OnlineSoftmax<float> both = merge<float>({to.maximum[row], to.sum[row]}, {maximum, sum});
  to.maximum[row] = both.maximum;
  to.sum[row] = both.sum;
  if (to.block_maximum) to.block_maximum[row] = maximum;
}

template <int Threads> __device__ __forceinline__ int64_t row_of_thread() {
  return Threads == 32 ? (int64_t)blockIdx.x * (kBlock / 32) + threadIdx.x / 32 : blockIdx.x;
}

// Any number of columns, read once; a second time if the exponentials are kept.
template <class In, int Threads, bool Keep>
__global__ void __launch_bounds__(Threads == 32 ? kBlock : Threads) streaming_statistics(const Block block, const Statistics to) {
  constexpr int N = kPack<In>, U = kHeld / 2 / N;
  const int64_t r = row_of_thread<Threads>();
  if (r >= block.rows) return;
  const int lane = threadIdx.x % Threads, target = block.target_column(r);
  const PackedRow<In> row(block.data, r * block.stride, block.columns);

  float maximum = -INFINITY, sum = 0.f;
  for (int64_t p = lane; p < row.packs; p += U * Threads) {
    float z[U][N], top = maximum;
    load_logits(block, row, row.column((int)p), Threads * N, target, to.target_logit + r, z);  // packs beyond the row: -inf
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i) top = fmaxf(top, z[u][i]);
    const float shift = softmax_shift(top);
    sum *= fast_exp(maximum - shift);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i) sum += fast_exp(z[u][i] - shift);
    maximum = top;
  }
  const float top = reduce_row<Threads>(maximum, Larger()), shift = softmax_shift(top);
  sum = reduce_row<Threads>(sum * expf(maximum - shift), Plus());
  if (lane == 0) merge_into_row(to, r, top, sum);

  if constexpr (Keep) {
    const AnyRow<N> out(to.kept, r, block.columns, row.start);
    for (int p = lane; p < row.packs; p += Threads) {
      float z[1][N], kept[N], unused = 0.f;
      load_logits(block, row, row.column(p), 0, kNoColumn, nullptr, z);
      keep(block.head, z[0], shift, kept, unused);
      out.store(row.column(p), kept);
    }
  }
}

// Up to Threads * kHeld columns, read once and held in registers until the maximum is known.
template <class In, int Threads>
__global__ void __launch_bounds__(Threads == 32 ? kBlock : Threads) held_statistics(const Block block, const Statistics to) {
  constexpr int N = kPack<In>, U = kHeld / N;
  const int64_t r = row_of_thread<Threads>();
  if (r >= block.rows) return;
  const int lane = threadIdx.x % Threads, target = block.target_column(r);
  const PackedRow<In> row(block.data, r * block.stride, block.columns);

  float z[U][N], top = -INFINITY, sum = 0.f;
  load_logits(block, row, row.column(lane), Threads * N, target, to.target_logit + r, z);
#pragma unroll
  for (int u = 0; u < U; ++u)
#pragma unroll
    for (int i = 0; i < N; ++i) top = fmaxf(top, z[u][i]);
  top = reduce_row<Threads>(top, Larger());
  const float shift = softmax_shift(top);
  const AnyRow<N> out(to.kept, r, block.columns, row.start);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float kept[N];
    keep(block.head, z[u], shift, kept, sum);
    out.store(row.column(u * Threads + lane), kept);
  }
  sum = reduce_row<Threads>(sum, Plus());
  if (lane == 0) merge_into_row(to, r, top, sum);
}

// blockDim.x threads to a row, blockDim.y rows to a block, gridDim.y blocks share the columns.
template <class In, bool IsKept> __global__ void __launch_bounds__(kBlock) logit_gradient(const Block block, const Gradient from) {
  constexpr int N = kPack<In>;
  const int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= block.rows) return;
  const PackedRow<In> row(block.data, r * block.stride, block.columns);
  const AnyRow<N> out(from.out, r, block.columns, row.start);
  const Head& head = block.head;
  const int target = block.target_column(r);
  const float maximum = from.maximum[r], sum = from.sum[r], coefficient = from.coefficients[r] * head.scale, value = from.log_likelihood[r];
  const float shift = softmax_shift(from.block_maximum ? from.block_maximum[r] : maximum);
  const float factor = -coefficient * (from.block_maximum ? expf(from.block_maximum[r] - maximum) : 1.f) / sum;
  const float at_target = coefficient * -expm1f(value) * (head.softcap != 0.f ? head.slope(value + logf(sum) + maximum) : 1.f);
  const bool nothing = from.coefficients[r] == 0.f;

  for (int64_t p = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; p < row.packs; p += (int64_t)gridDim.y * blockDim.x) {
    const int at = row.column((int)p);
    float g[N] = {};
    if (!nothing) {
      row.load(at, g);
      if constexpr (!IsKept) {
        float unused = 0.f;
        head.logits(g, at, block.columns);
        keep(head, g, shift, g, unused);
        if (from.block_maximum) out.round(g);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = at + i == target ? at_target : g[i] * factor;
    }
    out.store(at, g);
  }
}

// ------------------------------------------------------------------------------------------------------------- launchers

template <class T> struct Type { using type = T; };

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
  return {b.data, b.stride, b.rows, b.first_column, (int)b.columns, b.targets, {b.bias, b.bias_dtype, (float)b.scale, cap, inverse}};
}

const char* launched() {
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

template <int Threads> dim3 grid_over_rows(int64_t rows) {
  constexpr int rows_a_block = Threads == 32 ? kBlock / 32 : 1;
  return dim3((unsigned)((rows + rows_a_block - 1) / rows_a_block));
}

template <class In, int Threads, bool Keep> void stream_rows(const Block& block, const Statistics& to, cudaStream_t stream) {
  streaming_statistics<In, Threads, Keep><<<grid_over_rows<Threads>(block.rows), Threads == 32 ? kBlock : Threads, 0, stream>>>(block, to);
}
template <class In, int Threads> void hold_rows(const Block& block, const Statistics& to, cudaStream_t stream) {
  held_statistics<In, Threads><<<grid_over_rows<Threads>(block.rows), Threads == 32 ? kBlock : Threads, 0, stream>>>(block, to);
}

}  // namespace

const char* log_likelihood_statistics_cuda(const StatisticsArguments& a, void* stream_) {
  if (const char* why = cannot(a.block)) return why;
  if (a.kept.data && a.kept.dtype == Dtype::float64) return "the exponentials are kept as float32, bfloat16 or float16";
  if (a.block.rows == 0) return nullptr;
  const Block block = device_block(a.block);
  const Statistics to{(float*)a.maximum, (float*)a.sum, (float*)a.target_logit, (float*)a.block_maximum, a.kept};
  const cudaStream_t stream = (cudaStream_t)stream_;
  with_type(a.block.dtype, [&](auto type) {
    using In = typename decltype(type)::type;
    const bool aligned = (uintptr_t)block.data % 16 == 0 && block.stride % kPack<In> == 0;
    const int held = block.columns + (aligned ? 0 : kPack<In> - 1);  // a row that is not aligned begins inside its first pack
    if (!a.kept.data) {
      if (held <= kNarrow) stream_rows<In, 32, false>(block, to, stream);
      else stream_rows<In, 512, false>(block, to, stream);
    } else {
      if (held <= kNarrow) hold_rows<In, 32>(block, to, stream);
      else if (held <= kWide) hold_rows<In, 256>(block, to, stream);
      else stream_rows<In, 512, true>(block, to, stream);
    }
  });
  return launched();
}

const char* log_likelihood_gradient_cuda(const GradientArguments& a, void* stream_) {
  if (const char* why = cannot(a.block)) return why;
  if (a.out.dtype == Dtype::float64) return "the gradient is written as float32, bfloat16 or float16";
  if (a.is_kept && !a.block_maximum) return "kept exponentials need the block_maximum that came with them";
  if (a.block.rows == 0 || a.block.columns == 0) return nullptr;
  const Block block = device_block(a.block);
  const Gradient from{(const float*)a.maximum, (const float*)a.sum, (const float*)a.log_likelihood, (const float*)a.coefficients,
                      (const float*)a.block_maximum, a.out};
  const cudaStream_t stream = (cudaStream_t)stream_;
  const dim3 threads = block.columns <= kNarrow ? dim3(32, kBlock / 32) : dim3(kBlock);
  with_type(a.block.dtype, [&](auto type) {
    using In = typename decltype(type)::type;
    const int64_t share = 4 * kPack<In> * threads.x, shares = (block.columns + share - 1) / share;  // 4 packs a thread
    const dim3 grid((unsigned)((block.rows + threads.y - 1) / threads.y), (unsigned)(shares < 65535 ? shares : 65535));
    if (a.is_kept) logit_gradient<In, true><<<grid, threads, 0, stream>>>(block, from);
    else logit_gradient<In, false><<<grid, threads, 0, stream>>>(block, from);
  });
  return launched();
}

}  // namespace pyunlearn
