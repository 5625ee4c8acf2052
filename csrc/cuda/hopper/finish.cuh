// Before and after the sweep: the targets' exact logits, and from the clusters' sums to one answer a row.
#pragma once
#include "mainloop.cuh"

namespace pyunlearn {
namespace {

// For the sweeps that need the targets' logits beforehand.
template <class T>
__global__ void target_kernel(const __grid_constant__ Pointers at, const __grid_constant__ Plan plan) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *at.repair = 0;
  exact_targets<T>(at, plan, (blockIdx.x * blockDim.x + threadIdx.x) / 32, gridDim.x * blockDim.x / 32);
}

template <Task task> __device__ __forceinline__ Row merge_splits(const Pointers& at, const Plan& plan, int row) {
  Row sums;
  const int splits = splits_of(plan, row / (kCluster * kRows));
  for (int split = 0; split < splits; ++split) {
    const int64_t from = (int64_t)split * plan.n + row;
    const float2 q = at.partial[from];
    Row other;
    other.reference = q.x, other.sum = q.y;
    if constexpr (task == Task::all_statistics) {
      const float4 more = at.partial_more[from];
      other.first = more.x, other.second = more.y, other.above = more.z;
    }
    merge_rows<task>(sums, other);
  }
  if (!(fabsf(sums.reference) < 0x1p30f)) sums.sum = __int_as_float(0x7fffffff);  // float32 has no digits left there
  return sums;
}

struct Target {
  bool valid;
  float exact, rounded;  // its logit as a dot product, and as the WGMMA summed it
  __device__ Target(const Pointers& at, const Plan& plan, int row) {
    const int64_t target = at.target[row];
    valid = target >= 0 && target < plan.v;
    exact = valid ? at.target_exact[row] : 0.f, rounded = valid ? at.target_tile[row] : 0.f;
  }
};

// The exact target logit takes the place of the WGMMA's in the sums: so a certain token still gets 0.
template <Task task> __device__ __forceinline__ void swap_target(Row& sums, const Target& target) {
  const float y_in = fmaf(target.exact, kLog2e, -sums.reference), y_out = fmaf(target.rounded, kLog2e, -sums.reference);
  const float in = exp2f(y_in), out = exp2f(y_out);
  sums.sum += in - out;
  if constexpr (task == Task::all_statistics) {
    // an impossible target: 0 times infinity would be NaN
    const float up = in == 0.f ? 0.f : y_in, down = out == 0.f ? 0.f : y_out;
    sums.first += in * up - out * down;
    sums.second += in * up * up - out * down * down;
  }
}

// The log of the sum in base 2, as it stands to a logit times kLog2e: the rounding of kLog2e then stretches differences
// of logits, not logits.
__device__ __forceinline__ double log_sum(const Row& sums) { return (double)sums.reference + (double)log2f(sums.sum); }

__device__ __forceinline__ float log_likelihood_of(const Target& target, const Row& sums) {
  if (!target.valid) return __int_as_float(0x7fffffff);
  const float value = (float)(((double)target.exact * (double)kLog2e - log_sum(sums)) * kLn2);
  return value > 0.f ? 0.f : value;  // above 0 by rounding only; NaN stays
}

// M and S of log_likelihood.h, M near log S: then S is near 1, and what M is rounded by goes into S.
__device__ __forceinline__ void write_softmax(const Row& sums, float* maximum, float* total) {
  const float m = (float)(log_sum(sums) / (double)kLog2e);
  *maximum = m;
  *total = (float)exp2(log_sum(sums) - (double)m * (double)kLog2e);
}

}  // namespace
}  // namespace pyunlearn
