// The contract of log_likelihood.h for any NVIDIA GPU. A row belongs to one warp (narrow blocks) or to one thread
// block; nothing is atomic, so results repeat bit for bit. Statistics alone read each logit once. Statistics that keep
// the exponentials read it once too while the block's row fits into registers, and twice beyond that.
#include "../log_likelihood.h"

#include "../online_softmax.h"
#include "logits.cuh"

namespace pyunlearn {
namespace {

constexpr int kHeld = 32;    // logits that a thread holds at a time
// columns up to which a warp, a small block, a block can hold a row
constexpr int kNarrow = 32 * kHeld, kMiddle = 128 * kHeld, kWide = 256 * kHeld;

struct Statistics {
  float *maximum, *sum, *target_logit, *block_maximum;
  MatrixOut kept;
};

struct Gradient {
  const float *maximum, *sum, *log_likelihood, *coefficients, *block_maximum;
  MatrixOut out;
};

template <int N>
__device__ __forceinline__ void keep(const Head& head, const float (&z)[N], float shift, float (&kept)[N], float& sum) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float e = fast_exp(z[i] - shift);
    sum += e;
    kept[i] = __fmul_rn(e, head.slope(z[i]));
  }
}

// What the blocks before this one left of a row. Asked for before the last reduction, which takes as long; when the row
// begins, registers are short.
__device__ __forceinline__ OnlineSoftmax<float> so_far(const Statistics& to, int64_t row, int lane) {
  OnlineSoftmax<float> before;
  if (lane == 0) before = {to.maximum[row], to.sum[row]};
  return before;
}

__device__ __forceinline__ void merge_into_row(const Statistics& to, int64_t row, const OnlineSoftmax<float>& before,
                                               float maximum, float sum) {
  const OnlineSoftmax<float> both = merge<float>(before, {maximum, sum});
  to.maximum[row] = both.maximum;
  to.sum[row] = both.sum;
  if (to.block_maximum) to.block_maximum[row] = maximum;
}

// Any number of columns, read once; a second time if the exponentials are kept.
template <class In, int Threads, bool Keep>
__global__ void __launch_bounds__(kThreadsABlock<Threads>, kBlocks<Threads, 64>)
    streaming_statistics(const Block block, const Statistics to) {
  constexpr int N = kPack<In>, U = kHeld / 2 / N;
  const int64_t r = row_of_thread<Threads>();
  if (r >= block.rows) return;
  const int lane = threadIdx.x % Threads, target = block.target_column(r);
  const PackedRow<In> row(block.data, r * block.stride, block.columns);

  float maximum = -INFINITY, sum = 0.f;
  for (int p = lane; p < row.packs; p += U * Threads) {
    float z[U][N], top = maximum;
    load_logits(block, row, row.column(p), Threads * N, target, to.target_logit + r, z);  // packs beyond the row: -inf
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
  const OnlineSoftmax<float> before = so_far(to, r, lane);
  const float top = reduce_row<Threads>(maximum, Larger()), shift = softmax_shift(top);
  sum = reduce_row<Threads>(sum * expf(maximum - shift), Plus());
  if (lane == 0) merge_into_row(to, r, before, top, sum);

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
__global__ void __launch_bounds__(kThreadsABlock<Threads>, kBlocks<Threads, 80>)
    held_statistics(const Block block, const Statistics to) {
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
    if (u * Threads >= row.packs) break;
    float kept[N];
    keep(block.head, z[u], shift, kept, sum);
    out.store(row.column(u * Threads + lane), kept);
  }
  const OnlineSoftmax<float> before = so_far(to, r, lane);
  sum = reduce_row<Threads>(sum, Plus());
  if (lane == 0) merge_into_row(to, r, before, top, sum);
}

// blockDim.x threads to a row, blockDim.y rows to a block, gridDim.y blocks share the columns.
template <class In, bool IsKept>
__global__ void __launch_bounds__(kBlock) logit_gradient(const Block block, const Gradient from) {
  constexpr int N = kPack<In>;
  const int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= block.rows) return;
  const PackedRow<In> row(block.data, r * block.stride, block.columns);
  const AnyRow<N> out(from.out, r, block.columns, row.start);
  const Head& head = block.head;
  const int target = block.target_column(r);
  const float maximum = from.maximum[r], sum = from.sum[r], coefficient = from.coefficients[r] * head.scale,
              value = from.log_likelihood[r];
  const float shift = softmax_shift(from.block_maximum ? from.block_maximum[r] : maximum);
  const float factor = -coefficient * (from.block_maximum ? expf(from.block_maximum[r] - maximum) : 1.f) / sum;
  const float at_target =
      coefficient * -expm1f(value) * (head.softcap != 0.f ? head.slope(value + logf(sum) + maximum) : 1.f);
  const bool nothing = from.coefficients[r] == 0.f;

  for (int64_t p = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; p < row.packs;
       p += (int64_t)gridDim.y * blockDim.x) {
    const int at = row.column(p);
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

// ---------------------------------------------------------------- launchers

template <class In, int Threads, bool Keep>
void stream_rows(const Block& block, const Statistics& to, cudaStream_t stream) {
  streaming_statistics<In, Threads, Keep>
      <<<grid_over_rows<Threads>(block.rows), kThreadsABlock<Threads>, 0, stream>>>(block, to);
}
template <class In, int Threads> void hold_rows(const Block& block, const Statistics& to, cudaStream_t stream) {
  held_statistics<In, Threads><<<grid_over_rows<Threads>(block.rows), kThreadsABlock<Threads>, 0, stream>>>(block, to);
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
    if (!a.kept.data) {
      with_threads(block.columns,
                   [&](auto count) { stream_rows<In, decltype(count)::threads, false>(block, to, stream); });
      return;
    }
    const bool aligned = (uintptr_t)block.data % 16 == 0 && block.stride % kPack<In> == 0;
    // a row that is not aligned begins inside its first pack
    const int held = block.columns + (aligned ? 0 : kPack<In> - 1);
    if (held <= kNarrow) hold_rows<In, 32>(block, to, stream);
    else if (held <= kMiddle) hold_rows<In, 128>(block, to, stream);
    else if (held <= kWide) hold_rows<In, 256>(block, to, stream);
    else stream_rows<In, 512, true>(block, to, stream);
  });
  return launched();
}

const char* log_likelihood_gradient_cuda(const GradientArguments& a, void* stream_) {
  if (const char* why = cannot(a.block)) return why;
  if (a.out.dtype == Dtype::float64) return "the gradient is written as float32, bfloat16 or float16";
  if (a.is_kept && !a.block_maximum) return "kept exponentials need the block_maximum that came with them";
  if (a.block.rows == 0 || a.block.columns == 0) return nullptr;
  const Block block = device_block(a.block);
  const Gradient from{(const float*)a.maximum,      (const float*)a.sum,           (const float*)a.log_likelihood,
                      (const float*)a.coefficients, (const float*)a.block_maximum, a.out};
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
