// What the extension sees of this machine, for `pyunlearn info` and for choosing the backend.
#pragma once

namespace pyunlearn {

// The instruction set whose CPU kernels run: "avx512", "avx2" or "portable".
const char* cpu_variant();

// Device count, CUDA version of the driver and of the runtime built in (13000 = 13.0). Returns null, or a sentence that
// says why the kernels cannot run here (no driver, one older than the runtime, no device); what is unknown is then 0.
// Never throws, creates no context.
const char* cuda_runtime_text(int* device_count, int* driver, int* runtime);

}  // namespace pyunlearn
