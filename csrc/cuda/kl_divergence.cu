// The contract of kl_divergence.h for any NVIDIA GPU, on float32 products: each pair of logits is read once; a row
// belongs to one warp (narrow blocks) or to one thread block.
#include "../kl_divergence.h"

#include "../online_softmax.h"
#include "logits.cuh"

namespace pyunlearn {
namespace {

constexpr int N = kPack<float>, U = 2;  // a thread holds U packs of N pairs of logits at a time

struct Pair {
  Block model, reference;
  float target_shift;
};

// One row of both blocks, in packs of the same columns.
struct PairOfRows {
  const Pair& pair;
  const PackedRow<float> model, reference;
  const int target;

  __device__ PairOfRows(const Pair& p, int64_t row)
      : pair(p), model(p.model.data, row * p.model.stride, p.model.columns),
        reference(p.reference.data, row * p.reference.stride, model), target(p.model.target_column(row)) {}

  // The logits of U packs, `apart` columns apart; -inf beyond the row.
  __device__ __forceinline__ void load(int first, int apart, float (&z)[U][N], float (&y)[U][N]) const {
    model.load(first, apart, z);
    reference.load(first, apart, y);
    to_logits(pair.model, model, first, apart, z);
    to_logits(pair.reference, reference, first, apart, y);
    if (pair.target_shift == 0.f) return;
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (first + u * apart + i == target) y[u][i] -= pair.target_shift;
  }
};

struct Running { float *maximum, *sum, *reference_maximum, *reference_sum, *cross; };

struct Crossed {
  float maximum = -INFINITY, sum = 0.f, reference_maximum = -INFINITY, reference_sum = 0.f, cross = 0.f;

  __device__ __forceinline__ void move_to(float top, float reference_top) {
    const float d = maximum - softmax_shift(top), dq = reference_maximum - softmax_shift(reference_top);
    const float e = maximum == -INFINITY ? 0.f : fast_exp(d), eq = reference_maximum == -INFINITY ? 0.f : fast_exp(dq);
    // cross may be infinite
    if (reference_sum != 0.f) cross = eq == 0.f ? 0.f : eq * (cross + (dq - d) * reference_sum);
    if (maximum != -INFINITY) sum *= e;
    if (reference_maximum != -INFINITY) reference_sum *= eq;
    maximum = top, reference_maximum = reference_top;
  }
  __device__ __forceinline__ void add(float z, float y, float shift, float reference_shift) {
    const float e = fast_exp(y - reference_shift);
    sum += fast_exp(z - shift);
    reference_sum += e;
    // 0 where the reference has no mass, whatever the model has
    if (e != 0.f) cross += e * ((y - reference_shift) - (z - shift));
  }
};

template <int Threads>
__global__ void __launch_bounds__(kThreadsABlock<Threads>, kBlocks<Threads, 64>)
    streaming_kl_statistics(const Pair pair, const Running to) {
  const int64_t r = row_of_thread<Threads>();
  if (r >= pair.model.rows) return;
  const int lane = threadIdx.x % Threads;
  const PairOfRows row(pair, r);
  Crossed mine;
  for (int p = lane; p < row.model.packs; p += U * Threads) {
    float z[U][N], y[U][N], top = mine.maximum, reference_top = mine.reference_maximum;
    row.load(row.model.column(p), Threads * N, z, y);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i) top = fmaxf(top, z[u][i]), reference_top = fmaxf(reference_top, y[u][i]);
    mine.move_to(top, reference_top);
    const float shift = softmax_shift(top), reference_shift = softmax_shift(reference_top);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i) mine.add(z[u][i], y[u][i], shift, reference_shift);
  }
  Crossed all;  // the blocks before this one: asked for before the reductions, which take as long
  if (lane == 0) all = {to.maximum[r], to.sum[r], to.reference_maximum[r], to.reference_sum[r], to.cross[r]};
  float tops[2] = {mine.maximum, mine.reference_maximum};
  reduce_row<Threads>(tops, Larger());
  mine.move_to(tops[0], tops[1]);
  float sums[3] = {mine.sum, mine.reference_sum, mine.cross};
  reduce_row<Threads>(sums, Plus());
  if (lane == 0) {
    Crossed block{tops[0], sums[0], tops[1], sums[1], sums[2]};
    const float highest = fmaxf(all.maximum, tops[0]), reference_highest = fmaxf(all.reference_maximum, tops[1]);
    all.move_to(highest, reference_highest);
    block.move_to(highest, reference_highest);
    to.maximum[r] = highest;
    to.sum[r] = all.sum + block.sum;
    to.reference_maximum[r] = reference_highest;
    to.reference_sum[r] = all.reference_sum + block.reference_sum;
    to.cross[r] = all.cross + block.cross;
  }
}

struct From {
  const float *maximum, *sum, *reference_maximum, *reference_sum, *coefficients;
  MatrixOut out;
};

// blockDim.x threads to a row, blockDim.y rows to a block, gridDim.y blocks share the columns.
__global__ void __launch_bounds__(kBlock) kl_gradient(const Pair pair, const From from) {
  const int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= pair.model.rows) return;
  const PairOfRows row(pair, r);
  const Head& head = pair.model.head;
  const AnyRow<N> out(from.out, r, pair.model.columns, row.model.start);
  const float coefficient = from.coefficients[r] * head.scale, factor = coefficient / from.sum[r],
              reference_factor = coefficient / from.reference_sum[r];
  const float shift = softmax_shift(from.maximum[r]), reference_shift = softmax_shift(from.reference_maximum[r]);
  const bool nothing = from.coefficients[r] == 0.f;
  const int threads = (int)blockDim.x;
  for (int p = (int)blockIdx.y * U * threads + (int)threadIdx.x; p < row.model.packs;
       p += (int)gridDim.y * U * threads) {
    const int first = row.model.column(p), apart = threads * N;
    float z[U][N] = {}, y[U][N] = {};
    if (!nothing) {
      row.load(first, apart, z, y);
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int i = 0; i < N; ++i)
          z[u][i] = (fast_exp(z[u][i] - shift) * factor - fast_exp(y[u][i] - reference_shift) * reference_factor) *
                    head.slope(z[u][i]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) out.store(first + u * apart, z[u]);
  }
}

const char* cannot_pair(const LogitPair& pair) {
  if (const char* why = cannot(pair.model)) return why;
  if (const char* why = cannot(pair.reference)) return why;
  if (pair.model.dtype != Dtype::float32 || pair.reference.dtype != Dtype::float32)
    return "both blocks of logits must be float32";
  if (pair.model.rows != pair.reference.rows || pair.model.columns != pair.reference.columns)
    return "both blocks of logits must have the same rows and columns";
  return nullptr;
}

Pair device_pair(const LogitPair& pair) {
  return {device_block(pair.model), device_block(pair.reference), (float)pair.target_shift};
}

}  // namespace

const char* kl_statistics_cuda(const KlStatisticsArguments& a, void* stream) {
  if (const char* why = cannot_pair(a.pair)) return why;
  if (a.pair.model.rows == 0) return nullptr;
  const Running to{(float*)a.maximum, (float*)a.sum, (float*)a.reference_maximum, (float*)a.reference_sum,
                   (float*)a.cross};
  with_threads((int)a.pair.model.columns, [&](auto count) {
    constexpr int T = decltype(count)::threads;
    streaming_kl_statistics<T>
        <<<grid_over_rows<T>(a.pair.model.rows), kThreadsABlock<T>, 0, (cudaStream_t)stream>>>(device_pair(a.pair), to);
  });
  return launched();
}

const char* kl_gradient_cuda(const KlGradientArguments& a, void* stream) {
  if (const char* why = cannot_pair(a.pair)) return why;
  if (a.out.dtype == Dtype::float64) return "the gradient is written as float32, bfloat16 or float16";
  if (a.pair.model.rows == 0 || a.pair.model.columns == 0) return nullptr;
  const From from{(const float*)a.maximum,       (const float*)a.sum,          (const float*)a.reference_maximum,
                  (const float*)a.reference_sum, (const float*)a.coefficients, a.out};
  const dim3 threads = a.pair.model.columns <= 1024 ? dim3(32, kBlock / 32) : dim3(kBlock);
  const int64_t share = 2 * U * N * threads.x, shares = (a.pair.model.columns + share - 1) / share;  // 2 turns a thread
  const dim3 grid((unsigned)((a.pair.model.rows + threads.y - 1) / threads.y),
                  (unsigned)(shares < 65535 ? shares : 65535));
  kl_gradient<<<grid, threads, 0, (cudaStream_t)stream>>>(device_pair(a.pair), from);
  return launched();
}

}  // namespace pyunlearn
