#include "../device.h"

#include <cuda_runtime_api.h>

namespace pyunlearn {

const char* cuda_runtime_text(int* device_count, int* driver, int* runtime) {
  *device_count = *driver = *runtime = 0;
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  if (*driver == 0) return "no NVIDIA driver was found";
  const cudaError_t e = cudaGetDeviceCount(device_count);
  if (e == cudaSuccess) return *device_count > 0 ? nullptr : "no CUDA device is visible";
  *device_count = 0;
  cudaGetLastError();  // leave no error behind for whoever asks next
  if (e == cudaErrorInsufficientDriver) return "the NVIDIA driver is older than the CUDA runtime that this build needs";
  return cudaGetErrorString(e);
}

}  // namespace pyunlearn
