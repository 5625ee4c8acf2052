// What the emulated extension has beside csrc/bindings.cpp: the encoder of tensor maps, and the CUDA kernels in the
// place of the CPU's.
#include <cuda.h>
#include <cuda_runtime.h>

#include "device.h"
#include "kl_divergence.h"
#include "token_statistics.h"

namespace {

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* size,
                const cuuint64_t* pitch, const cuuint32_t* box, const cuuint32_t* step, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t row = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 64;
  const bool fine = rank == 2 && (uintptr_t)data % 16 == 0 && *pitch % 16 == 0 && size[0] && size[1] &&
                    box[0] * 2 == row && box[1] <= 256 && step[0] == 1 && step[1] == 1;
  const emulator::TensorMap m{(uint8_t*)data, size[1], size[0], *pitch, box[1], box[0], row};
  std::memcpy(map, &m, sizeof m);
  return fine ? CUDA_SUCCESS : 1;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  return *function = (void*)&encode, cudaSuccess;
}

namespace pyunlearn {

const char* cpu_variant() { return "emulated"; }
const char* log_likelihood_statistics_cpu(const StatisticsArguments& a, int) {
  return log_likelihood_statistics_cuda(a, nullptr);
}
const char* log_likelihood_gradient_cpu(const GradientArguments& a, int) {
  return log_likelihood_gradient_cuda(a, nullptr);
}
const char* token_statistics_cpu(const TokenStatisticsArguments& a, int) { return token_statistics_cuda(a, nullptr); }
const char* target_products_cpu(const TargetProductsArguments& a, int) { return target_products_cuda(a, nullptr); }
const char* kl_statistics_cpu(const KlStatisticsArguments& a, int) { return kl_statistics_cuda(a, nullptr); }
const char* kl_gradient_cpu(const KlGradientArguments& a, int) { return kl_gradient_cuda(a, nullptr); }

}  // namespace pyunlearn

extern "C" __attribute__((visibility("default"))) void set_machine(int processors, unsigned seed) {
  emulator::machine().processors = processors, emulator::machine().seed = seed;
}

extern "C" __attribute__((visibility("default"))) void add_products_of_8(float* d, const float* a, const float* b) {
  emulator::add_products_of_8(d, a, b);
}
