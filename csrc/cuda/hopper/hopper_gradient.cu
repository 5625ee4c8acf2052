// hopper_gradient: the logits of a vocabulary chunk once more, and their gradient to memory.
#include "launch.cuh"

namespace pyunlearn {

const char* hopper_gradient(const HopperInput& in, int64_t first_column, const float* coefficients,
                            const float* log_likelihood, const float* maximum, const float* total, void* g,
                            int64_t g_stride, void* stream) {
  if (const char* why = cannot(in)) return why;
  if (first_column < 0 || first_column > (1 << 30)) return "a chunk begins between 0 and 2^30";
  if (in.n == 0) return nullptr;
  Sweep sweep;
  if (const char* why = prepare<Task::gradient>(sweep, in, first_column, g, g_stride)) return why;
  Pointers& at = sweep.at;
  at.coefficients = coefficients, at.log_likelihood = log_likelihood, at.maximum = maximum, at.total = total;
  return sweep.run((cudaStream_t)stream);
}

const char* hopper_cannot_repair(const HopperInput& in, void* kept, int64_t kept_stride) {
  Sweep sweep;
  return prepare<Task::gradient>(sweep, in, 0, kept, kept_stride);
}

const char* hopper_repair_kept(const HopperInput& in, const float* log_likelihood, const float* maximum,
                               const float* total, const int* repair, void* kept, int64_t kept_stride, void* stream) {
  Sweep sweep;
  if (const char* why = prepare<Task::gradient>(sweep, in, 0, kept, kept_stride)) return why;
  Pointers& at = sweep.at;
  at.log_likelihood = log_likelihood, at.maximum = maximum, at.total = total, at.only = repair;
  return sweep.run((cudaStream_t)stream);
}

}  // namespace pyunlearn
