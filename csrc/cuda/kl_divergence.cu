// The contract of kl_divergence.h for any NVIDIA GPU, on float32 products: each pair of logits is read once; a row belongs to one thread block.
#include "../kl_divergence.h"

#include "../online_softmax.h"
#include "logits.cuh"

namespace pyunlearn {
namespace {

constexpr int kPairs = 8;  // pairs of logits that a thread holds at a time

struct Pair {
  Block model, reference;
  float target_shift;

  // The logits of column `at`; -inf beyond the row.
  __device__ __forceinline__ void load(int64_t row, int at, int target, float& z, float& y) const {
    float x[1] = {-INFINITY}, v[1] = {-INFINITY};
    if (at < model.columns) {
      x[0] = ((const float*)model.data)[row * model.stride + at];
      v[0] = ((const float*)reference.data)[row * reference.stride + at];
      model.head.logits(x, at, model.columns);
      reference.head.logits(v, at, reference.columns);
      if (at == target && target_shift != 0.f) v[0] -= target_shift;
    }
    z = x[0], y = v[0];
  }
};

struct Running {
  float *maximum, *sum, *reference_maximum, *reference_sum, *cross;
};

struct Crossed {
  float maximum = -INFINITY, sum = 0.f, reference_maximum = -INFINITY, reference_sum = 0.f, cross = 0.f;

  __device__ __forceinline__ void move_to(float top, float reference_top) {
    const float d = maximum - softmax_shift(top), dq = reference_maximum - softmax_shift(reference_top);
    const float e = maximum == -INFINITY ? 0.f : fast_exp(d), eq = reference_maximum == -INFINITY ? 0.f : fast_exp(dq);
    if (reference_sum != 0.f) cross = eq == 0.f ? 0.f : eq * (cross + (dq - d) * reference_sum);  // cross may be infinite
    if (maximum != -INFINITY) sum *= e;
    if (reference_maximum != -INFINITY) reference_sum *= eq;
    maximum = top, reference_maximum = reference_top;
  }
  __device__ __forceinline__ void add(float z, float y, float shift, float reference_shift) {
    const float e = fast_exp(y - reference_shift);
    sum += fast_exp(z - shift);
    reference_sum += e;
    if (e != 0.f) cross += e * ((y - reference_shift) - (z - shift));  // 0 where the reference has no mass, whatever the model has
  }
};

__global__ void __launch_bounds__(kBlock) streaming_kl_statistics(const Pair pair, const Running to) {
  const int64_t r = blockIdx.x;
  const int columns = pair.model.columns, target = pair.model.target_column(r);
  Crossed mine;
  for (int64_t begin = threadIdx.x; begin < columns; begin += kPairs * kBlock) {
    float z[kPairs], y[kPairs], top = mine.maximum, reference_top = mine.reference_maximum;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pair.load(r, (int)begin + i * kBlock, target, z[i], y[i]);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) top = fmaxf(top, z[i]), reference_top = fmaxf(reference_top, y[i]);
    mine.move_to(top, reference_top);
    const float shift = softmax_shift(top), reference_shift = softmax_shift(reference_top);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) mine.add(z[i], y[i], shift, reference_shift);
  }
  const float top = reduce_row<kBlock>(mine.maximum, Larger()), reference_top = reduce_row<kBlock>(mine.reference_maximum, Larger());
  mine.move_to(top, reference_top);
  Crossed block{top, reduce_row<kBlock>(mine.sum, Plus()), reference_top, reduce_row<kBlock>(mine.reference_sum, Plus()),
                reduce_row<kBlock>(mine.cross, Plus())};
  if (threadIdx.x == 0) {
    Crossed all{to.maximum[r], to.sum[r], to.reference_maximum[r], to.reference_sum[r], to.cross[r]};
    const float highest = fmaxf(all.maximum, top), reference_highest = fmaxf(all.reference_maximum, reference_top);
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

// gridDim.y blocks share the columns of a row.
__global__ void __launch_bounds__(kBlock) kl_gradient(const Pair pair, const From from) {
  const int64_t r = blockIdx.x;
  const int columns = pair.model.columns, target = pair.model.target_column(r);
  const Head& head = pair.model.head;
  const AnyRow<1> out(from.out, r, columns, 0);
  const float coefficient = from.coefficients[r] * head.scale, factor = coefficient / from.sum[r], reference_factor = coefficient / from.reference_sum[r];
  const float shift = softmax_shift(from.maximum[r]), reference_shift = softmax_shift(from.reference_maximum[r]);
  const bool nothing = from.coefficients[r] == 0.f;
  for (int64_t at = (int64_t)blockIdx.y * kBlock + threadIdx.x; at < columns; at += (int64_t)gridDim.y * kBlock) {
    float g[1] = {0.f};
    if (!nothing) {
      float z, y;
      pair.load(r, (int)at, target, z, y);
      g[0] = (fast_exp(z - shift) * factor - fast_exp(y - reference_shift) * reference_factor) * head.slope(z);
    }
    out.store((int)at, g);
  }
}

const char* cannot_pair(const LogitPair& pair) {
  if (const char* why = cannot(pair.model)) return why;
  if (const char* why = cannot(pair.reference)) return why;
  if (pair.model.dtype != Dtype::float32 || pair.reference.dtype != Dtype::float32) return "both blocks of logits must be float32";
  if (pair.model.rows != pair.reference.rows || pair.model.columns != pair.reference.columns)
    return "both blocks of logits must have the same rows and columns";
  return nullptr;
}

Pair device_pair(const LogitPair& pair) { return {device_block(pair.model), device_block(pair.reference), (float)pair.target_shift}; }

}  // namespace

const char* kl_statistics_cuda(const KlStatisticsArguments& a, void* stream) {
  if (const char* why = cannot_pair(a.pair)) return why;
  if (a.pair.model.rows == 0) return nullptr;
  const Running to{(float*)a.maximum, (float*)a.sum, (float*)a.reference_maximum, (float*)a.reference_sum, (float*)a.cross};
  streaming_kl_statistics<<<(unsigned)a.pair.model.rows, kBlock, 0, (cudaStream_t)stream>>>(device_pair(a.pair), to);
  return launched();
}

const char* kl_gradient_cuda(const KlGradientArguments& a, void* stream) {
  if (const char* why = cannot_pair(a.pair)) return why;
  if (a.out.dtype == Dtype::float64) return "the gradient is written as float32, bfloat16 or float16";
  if (a.pair.model.rows == 0 || a.pair.model.columns == 0) return nullptr;
  const From from{(const float*)a.maximum, (const float*)a.sum, (const float*)a.reference_maximum, (const float*)a.reference_sum,
                  (const float*)a.coefficients, a.out};
  const int64_t shares = (a.pair.model.columns + 8 * kBlock - 1) / (8 * kBlock);
  const dim3 grid((unsigned)a.pair.model.rows, (unsigned)(shares < 65535 ? shares : 65535));
  kl_gradient<<<grid, kBlock, 0, (cudaStream_t)stream>>>(device_pair(a.pair), from);
  return launched();
}

}  // namespace pyunlearn
