// pyunlearn._C: names -> launchers. Addresses, sizes and strides of torch tensors come in (Python has checked and allocated them);
// no arithmetic here, no torch. A launcher's complaint becomes a RuntimeError.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "device.h"
#include "log_likelihood.h"

namespace py = pybind11;
using namespace pyunlearn;

namespace {

const void* in(std::uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* out(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

void raise_if(const char* complaint) {
  if (complaint) throw std::runtime_error(complaint);
}

LogitBlock logit_block(std::uintptr_t data, int dtype, int64_t stride, int64_t rows, int64_t columns, int64_t first_column,
                       std::uintptr_t bias, int bias_dtype, double scale, double softcap, std::uintptr_t targets) {
  return {in(data), Dtype(dtype), stride, rows, columns, first_column, in(bias), Dtype(bias_dtype), scale, softcap,
          static_cast<const int64_t*>(in(targets))};
}

// `where` is a thread count for the CPU and a stream for CUDA
void statistics(bool cuda, std::uintptr_t data, int dtype, int64_t stride, int64_t rows, int64_t columns, int64_t first_column,
                std::uintptr_t bias, int bias_dtype, double scale, double softcap, std::uintptr_t targets, std::uintptr_t maximum,
                std::uintptr_t sum, std::uintptr_t target_logit, std::uintptr_t kept, int kept_dtype, int64_t kept_stride,
                std::uintptr_t block_maximum, std::uintptr_t where) {
  const StatisticsArguments a{
      logit_block(data, dtype, stride, rows, columns, first_column, bias, bias_dtype, scale, softcap, targets),
      out(maximum), out(sum), out(target_logit), {out(kept), Dtype(kept_dtype), kept_stride}, out(block_maximum)};
  const py::gil_scoped_release release;
#ifdef PYUNLEARN_CUDA
  if (cuda) return raise_if(log_likelihood_statistics_cuda(a, out(where)));
#endif
  raise_if(cuda ? "this build has no CUDA kernels" : log_likelihood_statistics_cpu(a, static_cast<int>(where)));
}

void gradient(bool cuda, std::uintptr_t data, int dtype, int64_t stride, int64_t rows, int64_t columns, int64_t first_column,
              std::uintptr_t bias, int bias_dtype, double scale, double softcap, std::uintptr_t targets, bool is_kept, std::uintptr_t maximum,
              std::uintptr_t sum, std::uintptr_t log_likelihood, std::uintptr_t coefficients, std::uintptr_t block_maximum,
              std::uintptr_t result, int result_dtype, int64_t result_stride, std::uintptr_t where) {
  const GradientArguments a{
      logit_block(data, dtype, stride, rows, columns, first_column, bias, bias_dtype, scale, softcap, targets), is_kept,
      in(maximum), in(sum), in(log_likelihood), in(coefficients), in(block_maximum), {out(result), Dtype(result_dtype), result_stride}};
  const py::gil_scoped_release release;
#ifdef PYUNLEARN_CUDA
  if (cuda) return raise_if(log_likelihood_gradient_cuda(a, out(where)));
#endif
  raise_if(cuda ? "this build has no CUDA kernels" : log_likelihood_gradient_cpu(a, static_cast<int>(where)));
}

py::dict build_info() {
  py::dict info;
  info["cpu_variant"] = cpu_variant();
#ifdef PYUNLEARN_CUDA
  info["cuda_architectures"] = PYUNLEARN_CUDA_ARCHITECTURES;
  int devices = 0, driver = 0, runtime = 0;
  const char* problem = cuda_runtime_text(&devices, &driver, &runtime);
  info["cuda_devices"] = devices;
  info["cuda_driver"] = driver;
  info["cuda_runtime"] = runtime;
  info["cuda_problem"] = problem ? py::object(py::str(problem)) : py::none();
#else
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Row kernels of pyunlearn. Called by pyunlearn.ops, which checks the tensors; contracts in csrc/*.h.";
  m.def("statistics", &statistics);
  m.def("gradient", &gradient);
  m.def("build_info", &build_info);
}
