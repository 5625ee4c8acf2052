// hopper_gradient: the logits of a vocabulary chunk once more, and their gradient to memory.
#include "launch.cuh"

namespace pyunlearn {

const char* hopper_gradient(const HopperInput& in, int64_t first_column, const float* coefficients, const float* log_likelihood, const float* maximum,
                            const float* total, void* g, int64_t g_stride, void* stream) {
  if (const char* why = cannot(in)) return why;
  if (first_column < 0 || first_column > (1 << 30)) return "a chunk begins between 0 and 2^30";
  if (in.n == 0) return nullptr;
  CUtensorMap map_g;
  if (const char* why = tensor_map(&map_g, g, in.dtype, in.n, in.v, g_stride, 64, 64)) return why;
  Pointers at = make_pointers(in);
  at.coefficients = coefficients, at.log_likelihood = log_likelihood, at.maximum = maximum, at.total = total;
  return launch<Task::gradient>(in, &map_g, at, make_plan(in.n, in.v, first_column), (cudaStream_t)stream);
}

const char* hopper_repair_kept(const HopperInput& in, const float* maximum, const float* total, const int* repair, void* kept,
                               int64_t kept_stride, void* stream) {
  CUtensorMap map_kept;
  if (const char* why = tensor_map(&map_kept, kept, in.dtype, in.n, in.v, kept_stride, 64, 64)) return why;
  Pointers at = make_pointers(in);
  at.maximum = maximum, at.total = total, at.only = repair;
  return launch<__nv_bfloat16, Task::gradient>(in, &map_kept, at, make_plan(in.n, in.v, 0), (cudaStream_t)stream);
}

}  // namespace pyunlearn
