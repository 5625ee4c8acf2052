// Before and after the sweep: the targets' exact logits, and from the clusters' sums to one answer a row.
#pragma once
#include "mainloop.cuh"

namespace pyunlearn {
namespace {

// For the sweeps that need the targets' logits beforehand.
template <class T> __global__ void target_kernel(const __grid_constant__ Pointers at, const __grid_constant__ Plan plan) {
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
    sums.first += in * y_in - out * y_out;
    sums.second += in * y_in * y_in - out * y_out * y_out;
  }
}

__device__ __forceinline__ double log_sum(const Row& sums) { return ((double)sums.reference + (double)log2f(sums.sum)) * kLn2; }

__device__ __forceinline__ float log_likelihood_of(const Target& target, double lse) {
  if (!target.valid) return __int_as_float(0x7fffffff);
  const float value = (float)((double)target.exact - lse);
  return value > 0.f ? 0.f : value;  // above 0 by rounding only; NaN stays
}

}  // namespace
}  // namespace pyunlearn
