// hopper_statistics_kept: the sweep of hopper_statistics that also writes every exponential, relative to a reference
// guessed beforehand, and a second sweep over the row pairs in which the guess was too far off.
#include "finish.cuh"
#include "launch.cuh"

namespace pyunlearn {
namespace {

// One block per row pair. A pair is swept again when one of its rows left the range of bfloat16: then its exponentials
// are relative to the sum. A row that is NaN gets exponentials of 0 then, and NaN as its factor.
__global__ void finish_kept_kernel(const __grid_constant__ Pointers at, const __grid_constant__ Plan plan,
                                   float* log_likelihood, float* maximum, float* total, float* factor) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  float shift = 0.f, repaired = 1.f;
  if (row < plan.n) {
    const Target target(at, plan, row);
    Row sums = merge_splits<Task::kept_statistics>(at, plan, row);
    if (target.valid) swap_target<Task::kept_statistics>(sums, target);
    write_softmax(sums, maximum + row, total + row);
    const float value = log_likelihood_of(target, sums);
    log_likelihood[row] = value;
    shift = (float)((target.valid ? (double)kept_reference(target.exact) : 0.0) - log_sum(sums));
    if (target.valid) {
      const float slope = at.head.softcap != 0.f ? at.head.slope(target.exact) : 1.f;
      at.kept[row * at.ld_kept + at.target[row]] = __float2bfloat16_rn(expm1f(value) * exp2f(-shift) * slope);
    }
    if (shift != shift) repaired = shift;  // its exponentials become 0, so that a coefficient of 0 leaves no NaN
  }
  // one barrier for all threads, also those beyond the last row
  const bool redo = __syncthreads_or(!(shift > -100.f && shift < 60.f));
  if (threadIdx.x == 0) {
    at.repair[1 + blockIdx.x] = redo;
    if (redo) *at.repair = 1;
  }
  if (row < plan.n) factor[row] = redo ? repaired : exp2f(shift);
}

}  // namespace

const char* hopper_statistics_kept(const HopperInput& in, float* log_likelihood, float* maximum, float* total,
                                   void* kept, int64_t kept_stride, float* factor, void* workspace, void* stream_) {
  if (const char* why = cannot(in)) return why;
  if (in.dtype != Dtype::bfloat16)
    return "only bfloat16 has the range to keep exponentials: recompute float16 with hopper_gradient";
  if (in.n == 0) return nullptr;
  if (const char* why = cannot_use(workspace)) return why;
  Sweep sweep;
  if (const char* why = prepare<Task::kept_statistics>(sweep, in, 0, kept, kept_stride)) return why;
  if (const char* why = hopper_cannot_repair(in, kept, kept_stride)) return why;
  const cudaStream_t stream = (cudaStream_t)stream_;
  Pointers& at = sweep.at;
  const Plan& plan = sweep.plan;
  use_workspace(at, plan, workspace);
  at.kept = (__nv_bfloat16*)kept, at.ld_kept = kept_stride;
  target_kernel<__nv_bfloat16><<<plan.clusters * kCluster * 4, 256, 0, stream>>>(at, plan);
  if (const char* why = sweep.run(stream)) return why;
  finish_kept_kernel<<<plan.pairs, kCluster * kRows, 0, stream>>>(at, plan, log_likelihood, maximum, total, factor);
  if (const char* why = launched()) return why;
  return hopper_repair_kept(in, log_likelihood, maximum, total, at.repair, kept, kept_stride, stream_);
}

}  // namespace pyunlearn
