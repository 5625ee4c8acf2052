// hopper_statistics: one sweep over the vocabulary, then the clusters' sums merged row by row.
#include "finish.cuh"
#include "launch.cuh"

namespace pyunlearn {
namespace {

template <Task task>
__global__ void finish_kernel(const __grid_constant__ Pointers at, const __grid_constant__ Plan plan,
                              const __grid_constant__ HopperStatistics to) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= plan.n) return;
  const Target target(at, plan, row);
  Row sums = merge_splits<task>(at, plan, row);
  if (target.valid) swap_target<task>(sums, target);
  write_softmax(sums, to.maximum + row, to.total + row);
  to.log_likelihood[row] = log_likelihood_of(target, sums);
  if constexpr (task == Task::all_statistics) {
    const float mean = sums.first / sums.sum, variance = sums.second / sums.sum - mean * mean;
    const float entropy = (float)kLn2 * (log2f(sums.sum) - mean);
    if (to.entropy) to.entropy[row] = entropy < 0.f ? 0.f : entropy;  // below 0 by rounding only; NaN stays
    if (to.variance) to.variance[row] = variance < 0.f ? 0.f : (float)(kLn2 * kLn2) * variance;
    if (!to.rank) return;
    const bool itself = target.valid && target.rounded > at.threshold_of(row);  // counted, and does not count
    to.rank[row] = target.valid ? (int64_t)sums.above - itself : -1;
  }
}

template <class T> void find_targets(const Pointers& at, const Plan& plan, cudaStream_t stream) {
  target_kernel<T><<<plan.clusters * kCluster * 4, 256, 0, stream>>>(at, plan);
}

}  // namespace

const char* hopper_unavailable() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
    return cudaGetLastError(), "no CUDA device is visible";
  if (attribute_of_device(cudaDevAttrComputeCapabilityMajor) != 9)
    return "the Hopper kernels need a device of compute capability 9.0";
  return nullptr;
}

int64_t hopper_workspace_bytes(int64_t n) {
  return n * (clusters_on_device() * 24 + 8) + (n / (kCluster * kRows) + 2) * 4;
}

const char* hopper_statistics(const HopperInput& in, const HopperStatistics& to, void* workspace, void* stream_) {
  if (const char* why = cannot(in)) return why;
  if (in.n == 0) return nullptr;
  if (const char* why = cannot_use(workspace)) return why;
  const bool more = to.entropy || to.variance || to.rank;
  Sweep sweep;
  if (const char* why = more ? prepare<Task::all_statistics>(sweep, in) : prepare<Task::statistics>(sweep, in))
    return why;
  const cudaStream_t stream = (cudaStream_t)stream_;
  Pointers& at = sweep.at;
  const Plan& plan = sweep.plan;
  use_workspace(at, plan, workspace);
  at.threshold = to.threshold;
  // the rank needs the target's logit before the sweep; a plain head's targets are taken during the sweep
  if (more || headed(in)) {
    if (in.dtype == Dtype::bfloat16) find_targets<__nv_bfloat16>(at, plan, stream);
    else find_targets<__half>(at, plan, stream);
  }
  if (const char* why = sweep.run(stream)) return why;
  const unsigned blocks = (unsigned)((in.n + 63) / 64);
  if (more) finish_kernel<Task::all_statistics><<<blocks, 64, 0, stream>>>(at, plan, to);
  else finish_kernel<Task::statistics><<<blocks, 64, 0, stream>>>(at, plan, to);
  return launched();
}

}  // namespace pyunlearn
