// The contract of token_statistics.h for any NVIDIA GPU: each logit is read once; a row belongs to one warp (narrow
// blocks) or to one thread block.
#include "../token_statistics.h"

#include "../online_softmax.h"
#include "logits.cuh"

namespace pyunlearn {
namespace {

struct Running {
  const float* threshold;
  float *maximum, *sum, *first, *second, *target_logit;
  int64_t* rank;
};

// Sums of exp(z - m), of exp(z - m) (z - m) and of exp(z - m) (z - m)^2, for one maximum m.
struct Moments {
  float maximum = -INFINITY, sum = 0.f, first = 0.f, second = 0.f;

  __device__ __forceinline__ void move_to(float top) {
    if (maximum != -INFINITY) {  // otherwise there is nothing to move, and -inf times 0 would be NaN
      const float d = maximum - top, e = fast_exp(d);
      second = e * (second + d * (2.f * first + d * sum));
      first = e * (first + d * sum);
      sum *= e;
    }
    maximum = top;
  }
  __device__ __forceinline__ void add(float z, float shift) {
    const float e = fast_exp(z - shift), t = fmaxf(z - shift, -88.f), et = e * t;  // 0 times -inf would be NaN
    sum += e;
    first += et;
    second += et * t;
  }
};

template <class In, int Threads>
__global__ void __launch_bounds__(kThreadsABlock<Threads>, kBlocks<Threads, 64>)
    streaming_token_statistics(const Block block, const Running to) {
  constexpr int N = kPack<In>, U = 16 / N;
  const int64_t r = row_of_thread<Threads>();
  if (r >= block.rows) return;
  const int lane = threadIdx.x % Threads, target = block.target_column(r);
  const PackedRow<In> row(block.data, r * block.stride, block.columns);
  const float threshold = to.threshold[r];

  Moments mine;
  float above = 0.f;  // at most 2^24: exact
  for (int p = lane; p < row.packs; p += U * Threads) {
    const int first = row.column(p);
    float z[U][N], top = mine.maximum;
    load_logits(block, row, first, Threads * N, target, to.target_logit + r, z);  // packs beyond the row: -inf
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i) top = fmaxf(top, z[u][i]);
    mine.move_to(top);
    const float shift = softmax_shift(top);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        mine.add(z[u][i], shift);
        above += z[u][i] > threshold && first + u * Threads * N + i != target ? 1.f : 0.f;
      }
  }
  Moments all;  // the blocks before this one: asked for before the reductions, which take as long
  int64_t rank = 0;
  if (lane == 0) all = {to.maximum[r], to.sum[r], to.first[r], to.second[r]}, rank = to.rank[r];
  const float top = reduce_row<Threads>(mine.maximum, Larger());
  mine.move_to(top);
  float sums[4] = {mine.sum, mine.first, mine.second, above};
  reduce_row<Threads>(sums, Plus());
  if (lane == 0) {
    Moments block_moments{top, sums[0], sums[1], sums[2]};
    const float highest = fmaxf(all.maximum, top);
    all.move_to(highest);
    block_moments.move_to(highest);
    to.maximum[r] = highest;
    to.sum[r] = all.sum + block_moments.sum;
    to.first[r] = all.first + block_moments.first;
    to.second[r] = all.second + block_moments.second;
    to.rank[r] = rank + (int64_t)sums[3];
  }
}

}  // namespace

const char* token_statistics_cuda(const TokenStatisticsArguments& a, void* stream_) {
  if (const char* why = cannot(a.block)) return why;
  if (a.block.rows == 0) return nullptr;
  const Block block = device_block(a.block);
  const Running to{(const float*)a.threshold, (float*)a.maximum,      (float*)a.sum, (float*)a.first,
                   (float*)a.second,          (float*)a.target_logit, a.rank};
  const cudaStream_t stream = (cudaStream_t)stream_;
  with_type(a.block.dtype, [&](auto type) {
    using In = typename decltype(type)::type;
    with_threads(block.columns, [&](auto count) {
      constexpr int T = decltype(count)::threads;
      streaming_token_statistics<In, T><<<grid_over_rows<T>(block.rows), kThreadsABlock<T>, 0, stream>>>(block, to);
    });
  });
  return launched();
}

}  // namespace pyunlearn
