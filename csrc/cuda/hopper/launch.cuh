// From a HopperInput to a running kernel.
#pragma once
#include <atomic>

#include "../../hopper.h"
#include "mainloop.cuh"
#include "tensor_map.h"

namespace pyunlearn {

// hopper_gradient.cu: writes exp(z - maximum) / total dz/du, and 0 at the target, for the row pairs that repair names. For hopper_kept.cu.
const char* hopper_repair_kept(const HopperInput& in, const float* maximum, const float* total, const int* repair, void* kept,
                               int64_t kept_stride, void* stream);

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

inline const char* cannot(const HopperInput& in) {
  if (const char* why = hopper_unavailable()) return why;
  if (in.dtype != Dtype::bfloat16 && in.dtype != Dtype::float16) return "hidden and weight need to be bfloat16 or float16";
  if (in.bias && in.bias_dtype != Dtype::float32 && in.bias_dtype != in.dtype) return "bias needs to be float32 or of weight's type";
  const int64_t limit = 1 << 30;
  if (in.d <= 0 || in.d > limit || in.d % 8) return "the hidden size needs to be a multiple of 8";
  if (in.v <= 0 || in.v > limit || in.n < 0 || in.n > limit) return "a vocabulary of 1 to 2^30 entries and at most 2^30 rows are possible";
  return nullptr;
}

inline Plan make_plan(int64_t n, int64_t v, int64_t first) {
  Plan p{};
  p.n = (int)n, p.v = (int)v, p.first = (int)first;
  p.v_tiles = (int)((v + kColumns - 1) / kColumns);
  p.pairs = (int)((n + kCluster * kRows - 1) / (kCluster * kRows));
  for (p.clusters = clusters_on_device();; --p.clusters) {  // 66 on 132 multiprocessors; a prime number would leave one by one
    const int most = kGroup < p.clusters ? kGroup : p.clusters;
    for (p.group = most; p.clusters % p.group;) --p.group;
    if (2 * p.group >= most) return p;
  }
}

inline bool headed(const HopperInput& in) { return in.bias || in.scale != 1.0 || in.softcap != 0.0; }

inline Pointers make_pointers(const HopperInput& in) {
  Pointers at{};
  at.h = in.hidden, at.w = in.weight, at.ld_h = in.hidden_stride, at.ld_w = in.weight_stride, at.d = (int)in.d, at.target = in.targets;
  at.head = {in.bias, in.bias_dtype == Dtype::float32, (float)in.scale, (float)in.softcap, in.softcap != 0.0 ? (float)(1.0 / in.softcap) : 0.f};
  return at;
}

// The scratch of the statistics: per cluster and row 16 + 8 bytes of sums, per row two target logits, and the repair list.
struct Workspace {
  float4* partial_more;
  float2* partial;
  float *target_tile, *target_exact;
  int* repair;
  Workspace(void* memory, int64_t entries, int64_t n)
      : partial_more((float4*)memory), partial((float2*)(partial_more + entries)), target_tile((float*)(partial + entries)),
        target_exact(target_tile + n), repair((int*)(target_exact + n)) {}
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

template <class T, Task task, int Depth, bool Headed>
const char* launch(const HopperInput& in, const CUtensorMap* map_out, const Pointers& at, Plan plan, cudaStream_t stream) {
  CUtensorMap map_h, map_w;
  if (const char* why = tensor_map(&map_h, in.hidden, in.dtype, in.n, in.d, in.hidden_stride, kRows, Depth)) return why;
  if (const char* why = tensor_map(&map_w, in.weight, in.dtype, in.v, in.d, in.weight_stride, kColumns / kCluster, Depth)) return why;
  plan.k_steps = (int)((in.d + Depth - 1) / Depth);
  static std::atomic<uint64_t> devices{0};
  constexpr int bytes = Pipeline<task, Depth>::shared;
  const auto kernel = logit_kernel<T, task, Depth, Headed>;
  if (const char* why = allow_shared((const void*)kernel, bytes, devices)) return why;
  kernel<<<plan.clusters * kCluster, kThreads, bytes, stream>>>(map_h, map_w, map_out ? *map_out : map_h, at, plan);
  return launched();
}

template <class T, Task task>
const char* launch(const HopperInput& in, const CUtensorMap* map_out, const Pointers& at, const Plan& plan, cudaStream_t stream) {
  constexpr bool always = task == Task::all_statistics;  // where the head is a matter of one branch a tile, one kernel does for both
  const bool shallow = in.d <= kShallow;
  if (always || headed(in))
    return shallow ? launch<T, task, 32, true>(in, map_out, at, plan, stream) : launch<T, task, 64, true>(in, map_out, at, plan, stream);
  return shallow ? launch<T, task, 32, always>(in, map_out, at, plan, stream) : launch<T, task, 64, always>(in, map_out, at, plan, stream);
}

template <Task task>
const char* launch(const HopperInput& in, const CUtensorMap* map_out, const Pointers& at, const Plan& plan, cudaStream_t stream) {
  return in.dtype == Dtype::bfloat16 ? launch<__nv_bfloat16, task>(in, map_out, at, plan, stream) : launch<__half, task>(in, map_out, at, plan, stream);
}

}  // namespace
}  // namespace pyunlearn
