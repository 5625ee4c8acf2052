// From a HopperInput to a running kernel.
#pragma once
#include <atomic>

#include "../../hopper.h"
#include "mainloop.cuh"
#include "tensor_map.h"

namespace pyunlearn {

// hopper_gradient.cu: writes kept_rj of hopper.h for a factor of 1, for the row pairs that repair names. For
// hopper_kept.cu, which asks before its own launches whether that can be done.
const char* hopper_cannot_repair(const HopperInput& in, void* kept, int64_t kept_stride);
const char* hopper_repair_kept(const HopperInput& in, const float* log_likelihood, const float* maximum,
                               const float* total, const int* repair, void* kept, int64_t kept_stride, void* stream);

namespace {

inline int attribute_of_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int clusters_on_device() { return attribute_of_device(cudaDevAttrMultiProcessorCount) / kCluster; }

inline const char* launched() {
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

inline const char* cannot_use(const void* workspace) {
  return (uintptr_t)workspace % 16 ? "the workspace needs to be 16-byte aligned" : nullptr;
}

inline const char* cannot(const HopperInput& in) {
  if (const char* why = hopper_unavailable()) return why;
  if (in.dtype != Dtype::bfloat16 && in.dtype != Dtype::float16)
    return "hidden and weight need to be bfloat16 or float16";
  if (in.bias && in.bias_dtype != Dtype::float32 && in.bias_dtype != in.dtype)
    return "bias needs to be float32 or of weight's type";
  const int64_t limit = 1 << 30;
  if (in.d <= 0 || in.d > limit / 32 || in.d % 8) return "the hidden size needs to be a multiple of 8, at most 2^25";
  if (in.v <= 0 || in.v > limit || in.n < 0 || in.n > limit)
    return "a vocabulary of 1 to 2^30 entries and at most 2^30 rows are possible";
  return nullptr;
}

inline Plan make_plan(int64_t n, int64_t v, int64_t first) {
  Plan p{};
  p.n = (int)n, p.v = (int)v, p.first = (int)first;
  p.v_tiles = (int)((v + kColumns - 1) / kColumns);
  p.pairs = (int)((n + kCluster * kRows - 1) / (kCluster * kRows));
  // 66 on 132 multiprocessors; a prime number would leave one by one
  for (p.clusters = clusters_on_device();; --p.clusters) {
    const int most = kGroup < p.clusters ? kGroup : p.clusters;
    for (p.group = most; p.clusters % p.group;) --p.group;
    if (2 * p.group >= most) return p;
  }
}

inline bool headed(const HopperInput& in) { return in.bias || in.scale != 1.0 || in.softcap != 0.0; }

inline Pointers make_pointers(const HopperInput& in) {
  Pointers at{};
  at.h = in.hidden, at.w = in.weight, at.ld_h = in.hidden_stride, at.ld_w = in.weight_stride, at.d = (int)in.d,
  at.target = in.targets;
  at.head = {in.bias, in.bias_dtype == Dtype::float32, (float)in.scale, (float)in.softcap,
             in.softcap != 0.0 ? (float)(1.0 / in.softcap) : 0.f};
  return at;
}

// The scratch of the statistics: per cluster and row 16 + 8 bytes of sums, per row two target logits, and the repair
// list.
struct Workspace {
  float4* partial_more;
  float2* partial;
  float *target_tile, *target_exact;
  int* repair;
  Workspace(void* memory, int64_t entries, int64_t n)
      : partial_more((float4*)memory), partial((float2*)(partial_more + entries)),
        target_tile((float*)(partial + entries)), target_exact(target_tile + n), repair((int*)(target_exact + n)) {}
};

inline void use_workspace(Pointers& at, const Plan& plan, void* memory) {
  const Workspace space(memory, (int64_t)plan.clusters * plan.n, plan.n);
  at.partial_more = space.partial_more, at.partial = space.partial;
  at.target_tile = space.target_tile, at.target_exact = space.target_exact, at.repair = space.repair;
}

// More than 48 KB of shared memory has to be asked for, once for each kernel on each device.
inline const char* allow_shared(const void* kernel, int bytes, std::atomic<uint64_t>& devices) {
  int device = 0;
  cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (devices.load(std::memory_order_relaxed) & bit) return nullptr;
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  devices.fetch_or(bit, std::memory_order_relaxed);
  return nullptr;
}

// A launch of logit_kernel. Whatever can be refused was refused when `prepare` made it, so the launches before it may
// begin.
struct Sweep {
  CUtensorMap map_h, map_w, map_out;
  void (*kernel)(CUtensorMap, CUtensorMap, CUtensorMap, Pointers, Plan);
  int bytes;
  Pointers at;
  Plan plan;

  const char* run(cudaStream_t stream) const {
    kernel<<<plan.clusters * kCluster, kThreads, bytes, stream>>>(map_h, map_w, map_out, at, plan);
    return launched();
  }
};

template <class T, Task task, int Depth, bool Headed> const char* choose_kernel(Sweep& sweep, const HopperInput& in) {
  if (const char* why = tensor_map(&sweep.map_h, in.hidden, in.dtype, in.n, in.d, in.hidden_stride, kRows, Depth))
    return why;
  if (const char* why =
          tensor_map(&sweep.map_w, in.weight, in.dtype, in.v, in.d, in.weight_stride, kColumns / kCluster, Depth))
    return why;
  sweep.plan.k_steps = (int)((in.d + Depth - 1) / Depth);
  sweep.kernel = logit_kernel<T, task, Depth, Headed>;
  sweep.bytes = Pipeline<task, Depth>::shared;
  static std::atomic<uint64_t> devices{0};
  return allow_shared((const void*)sweep.kernel, sweep.bytes, devices);
}

template <class T, Task task> const char* choose_kernel(Sweep& sweep, const HopperInput& in) {
  // where the head is a matter of one branch a tile, one kernel does for both
  constexpr bool always = task == Task::all_statistics;
  const bool shallow = in.d <= kShallow;
  if (always || headed(in))
    return shallow ? choose_kernel<T, task, 32, true>(sweep, in) : choose_kernel<T, task, 64, true>(sweep, in);
  return shallow ? choose_kernel<T, task, 32, always>(sweep, in) : choose_kernel<T, task, 64, always>(sweep, in);
}

// out (n, v): where the tasks that write tiles write them. What a task needs beside it, the caller sets in sweep.at.
template <Task task>
const char* prepare(Sweep& sweep, const HopperInput& in, int64_t first_column = 0, void* out = nullptr,
                    int64_t out_stride = 0) {
  sweep.plan = make_plan(in.n, in.v, first_column);
  sweep.at = make_pointers(in);
  if constexpr (writes_tiles(task)) {
    if (const char* why = tensor_map(&sweep.map_out, out, in.dtype, in.n, in.v, out_stride, 64, 64)) return why;
  } else {
    sweep.map_out = {};
  }
  if constexpr (task != Task::kept_statistics)
    if (in.dtype == Dtype::float16) return choose_kernel<__half, task>(sweep, in);
  return choose_kernel<__nv_bfloat16, task>(sweep, in);
}

}  // namespace
}  // namespace pyunlearn
