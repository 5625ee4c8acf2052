// pyunlearn._C: names -> launchers. Addresses, sizes and strides of torch tensors come in (Python has checked and
// allocated them); no arithmetic here, no torch. A launcher's complaint becomes a RuntimeError.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bf16_products.h"
#include "device.h"
#include "hopper.h"
#include "kept_backward.h"
#include "kl_divergence.h"
#include "log_likelihood.h"
#include "token_statistics.h"

namespace py = pybind11;
using namespace pyunlearn;

namespace {

const void* in(std::uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* out(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

void raise_if(const char* complaint) {
  if (complaint) throw std::runtime_error(complaint);
}

using Address = std::uintptr_t;

LogitBlock logit_block(Address data, int dtype, int64_t stride, int64_t rows, int64_t columns, int64_t first_column,
                       Address bias, int bias_dtype, double scale, double softcap, Address targets) {
  return {in(data),
          Dtype(dtype),
          stride,
          rows,
          columns,
          first_column,
          in(bias),
          Dtype(bias_dtype),
          scale,
          softcap,
          static_cast<const int64_t*>(in(targets))};
}
MatrixOut matrix(Address data, int dtype, int64_t stride) { return {out(data), Dtype(dtype), stride}; }

template <class Arguments> struct Launchers {
  const char* (*cpu)(const Arguments&, int threads);
  const char* (*cuda)(const Arguments&, void* stream);
};

// `where` is a thread count for the CPU and a stream for CUDA
template <class Arguments>
void run(bool cuda, const Arguments& a, Address where, const Launchers<Arguments>& launchers) {
  const py::gil_scoped_release release;
  if (!cuda) raise_if(launchers.cpu(a, static_cast<int>(where)));
  else raise_if(launchers.cuda ? launchers.cuda(a, out(where)) : "this build has no CUDA kernels");
}
#ifdef PYUNLEARN_CUDA
#define PYUNLEARN_BOTH(kernel) {kernel##_cpu, kernel##_cuda}
#else
#define PYUNLEARN_BOTH(kernel) {kernel##_cpu, nullptr}
#endif
#define PYUNLEARN_BLOCK                                                                                       \
  Address data, int dtype, int64_t stride, int64_t rows, int64_t columns, int64_t first_column, Address bias, \
      int bias_dtype, double scale, double softcap, Address targets
#define PYUNLEARN_PAIR \
  PYUNLEARN_BLOCK, Address other, int64_t other_stride, Address other_bias, int other_bias_dtype, double target_shift

void statistics(bool cuda, PYUNLEARN_BLOCK, Address maximum, Address sum, Address target_logit, Address kept,
                int kept_dtype, int64_t kept_stride, Address block_maximum, Address where) {
  const LogitBlock block =
      logit_block(data, dtype, stride, rows, columns, first_column, bias, bias_dtype, scale, softcap, targets);
  const StatisticsArguments a{
      block, out(maximum), out(sum), out(target_logit), matrix(kept, kept_dtype, kept_stride), out(block_maximum)};
  run<StatisticsArguments>(cuda, a, where, PYUNLEARN_BOTH(log_likelihood_statistics));
}

void gradient(bool cuda, PYUNLEARN_BLOCK, bool is_kept, Address maximum, Address sum, Address log_likelihood,
              Address coefficients, Address block_maximum, Address result, int result_dtype, int64_t result_stride,
              Address where) {
  const LogitBlock block =
      logit_block(data, dtype, stride, rows, columns, first_column, bias, bias_dtype, scale, softcap, targets);
  const GradientArguments a{block,
                            is_kept,
                            in(maximum),
                            in(sum),
                            in(log_likelihood),
                            in(coefficients),
                            in(block_maximum),
                            matrix(result, result_dtype, result_stride)};
  run<GradientArguments>(cuda, a, where, PYUNLEARN_BOTH(log_likelihood_gradient));
}

void token_statistics(bool cuda, PYUNLEARN_BLOCK, Address threshold, Address maximum, Address sum, Address first,
                      Address second, Address target_logit, Address rank, Address where) {
  const LogitBlock block =
      logit_block(data, dtype, stride, rows, columns, first_column, bias, bias_dtype, scale, softcap, targets);
  const TokenStatisticsArguments a{block,      in(threshold), out(maximum),      out(sum),
                                   out(first), out(second),   out(target_logit), static_cast<int64_t*>(out(rank))};
  run<TokenStatisticsArguments>(cuda, a, where, PYUNLEARN_BOTH(token_statistics));
}

void target_products(bool cuda, Address hidden, Address weight, int dtype, int64_t rows, int64_t width,
                     int64_t vocabulary, int64_t hidden_stride, int64_t weight_stride, Address targets, Address sum,
                     Address size, Address where) {
  const TargetProductsArguments a{in(hidden),
                                  in(weight),
                                  Dtype(dtype),
                                  rows,
                                  width,
                                  vocabulary,
                                  hidden_stride,
                                  weight_stride,
                                  static_cast<const int64_t*>(in(targets)),
                                  static_cast<double*>(out(sum)),
                                  static_cast<double*>(out(size))};
  run<TargetProductsArguments>(cuda, a, where, PYUNLEARN_BOTH(target_products));
}

LogitPair logit_pair(PYUNLEARN_PAIR) {
  return {logit_block(data, dtype, stride, rows, columns, first_column, bias, bias_dtype, scale, softcap, targets),
          logit_block(other, dtype, other_stride, rows, columns, first_column, other_bias, other_bias_dtype, scale,
                      softcap, targets),
          target_shift};
}

void kl_statistics(bool cuda, PYUNLEARN_PAIR, Address maximum, Address sum, Address reference_maximum,
                   Address reference_sum, Address cross, Address where) {
  const LogitPair pair = logit_pair(data, dtype, stride, rows, columns, first_column, bias, bias_dtype, scale, softcap,
                                    targets, other, other_stride, other_bias, other_bias_dtype, target_shift);
  const KlStatisticsArguments a{pair, out(maximum), out(sum), out(reference_maximum), out(reference_sum), out(cross)};
  run<KlStatisticsArguments>(cuda, a, where, PYUNLEARN_BOTH(kl_statistics));
}

void kl_gradient(bool cuda, PYUNLEARN_PAIR, Address maximum, Address sum, Address reference_maximum,
                 Address reference_sum, Address coefficients, Address result, int result_dtype, int64_t result_stride,
                 Address where) {
  const LogitPair pair = logit_pair(data, dtype, stride, rows, columns, first_column, bias, bias_dtype, scale, softcap,
                                    targets, other, other_stride, other_bias, other_bias_dtype, target_shift);
  const KlGradientArguments a{pair,
                              in(maximum),
                              in(sum),
                              in(reference_maximum),
                              in(reference_sum),
                              in(coefficients),
                              matrix(result, result_dtype, result_stride)};
  run<KlGradientArguments>(cuda, a, where, PYUNLEARN_BOTH(kl_gradient));
}

void bf16_product(Address a, int64_t a_stride, Address b, int64_t b_stride, Address result, int64_t result_stride,
                  int64_t rows, int64_t columns, int64_t width, int threads) {
  const py::gil_scoped_release release;
  raise_if(bf16_product_cpu({static_cast<const uint16_t*>(in(a)), static_cast<const uint16_t*>(in(b)), a_stride,
                             b_stride, static_cast<float*>(out(result)), result_stride, rows, columns, width},
                            threads));
}

void bf16_gradient(Address a, int64_t a_stride, bool transposed, Address b, int64_t b_stride, Address result,
                   int64_t result_stride, bool rounds, bool adds, int64_t rows, int64_t columns, int64_t depth,
                   int threads) {
  const py::gil_scoped_release release;
  raise_if(bf16_gradient_cpu({static_cast<const uint16_t*>(in(a)), static_cast<const uint16_t*>(in(b)), a_stride,
                              b_stride, transposed, out(result), result_stride, rounds, adds, rows, columns, depth},
                             threads));
}

// The kernels of compute capability 9.0, on a stream. Where they were not built, the call says so.
#ifdef PYUNLEARN_HOPPER
#define PYUNLEARN_HOPPER_RUN(call)      \
  const py::gil_scoped_release release; \
  raise_if(call)
#else
// sizeof: named, and not linked
#define PYUNLEARN_HOPPER_RUN(call) static_cast<void>(sizeof(call)), raise_if(kNoHopper)
#endif
constexpr const char* kNoHopper = "this build has no Hopper kernels";

#define PYUNLEARN_INPUT                                                                              \
  Address hidden, Address weight, int dtype, int64_t n, int64_t d, int64_t v, int64_t hidden_stride, \
      int64_t weight_stride, Address bias, int bias_dtype, double scale, double softcap, Address targets

const float* floats(Address address) { return static_cast<const float*>(in(address)); }
float* floats_out(Address address) { return static_cast<float*>(out(address)); }
const int64_t* integers(Address address) { return static_cast<const int64_t*>(in(address)); }

HopperInput hopper_input(PYUNLEARN_INPUT) {
  return {in(hidden), in(weight), Dtype(dtype),     n, d, v, hidden_stride, weight_stride, in(bias), Dtype(bias_dtype),
          scale,      softcap,    integers(targets)};
}

py::object hopper_unavailable_here() {
#ifdef PYUNLEARN_HOPPER
  const char* why = hopper_unavailable();
#else
  const char* why = kNoHopper;
#endif
  return why ? py::object(py::str(why)) : py::none();
}

int64_t hopper_workspace(int64_t n) {
#ifdef PYUNLEARN_HOPPER
  return hopper_workspace_bytes(n);
#else
  throw std::runtime_error(kNoHopper);
#endif
}

void hopper_statistics_at(PYUNLEARN_INPUT, Address log_likelihood, Address maximum, Address total, Address entropy,
                          Address variance, Address rank, Address threshold, Address workspace, Address stream) {
  const HopperInput input = hopper_input(hidden, weight, dtype, n, d, v, hidden_stride, weight_stride, bias, bias_dtype,
                                         scale, softcap, targets);
  const HopperStatistics to{floats_out(log_likelihood), floats_out(maximum),  floats_out(total),
                            floats_out(entropy),        floats_out(variance), static_cast<int64_t*>(out(rank)),
                            floats(threshold)};
  PYUNLEARN_HOPPER_RUN(hopper_statistics(input, to, out(workspace), out(stream)));
}

void hopper_statistics_kept_at(PYUNLEARN_INPUT, Address log_likelihood, Address maximum, Address total, Address kept,
                               int64_t kept_stride, Address factor, Address workspace, Address stream) {
  const HopperInput input = hopper_input(hidden, weight, dtype, n, d, v, hidden_stride, weight_stride, bias, bias_dtype,
                                         scale, softcap, targets);
  PYUNLEARN_HOPPER_RUN(hopper_statistics_kept(input, floats_out(log_likelihood), floats_out(maximum), floats_out(total),
                                              out(kept), kept_stride, floats_out(factor), out(workspace), out(stream)));
}

void hopper_gradient_at(PYUNLEARN_INPUT, int64_t first_column, Address coefficients, Address log_likelihood,
                        Address maximum, Address total, Address result, int64_t result_stride, Address stream) {
  const HopperInput input = hopper_input(hidden, weight, dtype, n, d, v, hidden_stride, weight_stride, bias, bias_dtype,
                                         scale, softcap, targets);
  PYUNLEARN_HOPPER_RUN(hopper_gradient(input, first_column, floats(coefficients), floats(log_likelihood),
                                       floats(maximum), floats(total), out(result), result_stride, out(stream)));
}

void kept_scale_rows_at(int64_t n, int64_t d, double scale, Address coefficients, Address factor, Address data,
                        int dtype, int64_t stride, Address result, int result_dtype, int64_t result_stride,
                        Address stream) {
  const KeptRows rows{n, d, scale, floats(coefficients), floats(factor)};
  const MatrixIn matrix_in{in(data), Dtype(dtype), stride};
  PYUNLEARN_HOPPER_RUN(kept_scale_rows(rows, matrix_in, matrix(result, result_dtype, result_stride), out(stream)));
}

py::object name_of_bf16_products() { return bf16_products() ? py::object(py::str(bf16_products())) : py::none(); }

py::dict build_info() {
  py::dict info;
  info["bf16_products"] = name_of_bf16_products();
  info["cpu_variant"] = cpu_variant();
#ifdef PYUNLEARN_HOPPER
  info["hopper"] = true;
#else
  info["hopper"] = false;
#endif
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
  m.def("token_statistics", &token_statistics);
  m.def("target_products", &target_products);
  m.def("kl_statistics", &kl_statistics);
  m.def("kl_gradient", &kl_gradient);
  m.def("bf16_products", &name_of_bf16_products);
  m.def("bf16_product", &bf16_product);
  m.def("bf16_gradient", &bf16_gradient);
  m.def("hopper_unavailable", &hopper_unavailable_here);
  m.def("hopper_workspace_bytes", &hopper_workspace);
  m.def("hopper_statistics", &hopper_statistics_at);
  m.def("hopper_statistics_kept", &hopper_statistics_kept_at);
  m.def("hopper_gradient", &hopper_gradient_at);
  m.def("kept_scale_rows", &kept_scale_rows_at);
  m.def("build_info", &build_info);
}
