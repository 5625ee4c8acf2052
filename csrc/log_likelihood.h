// The row kernels of linear_log_likelihood and log_likelihood: what they compute, on which memory. Every backend
// implements these two.
//
// The logits z of N rows over V vocabulary entries arrive in blocks of columns, as raw products x = hidden . weight:
//     u = scale * (x + bias),   z = u,                  dz/du = 1
//     or, with a softcap c > 0, z = c * tanh(u / c),    dz/du = 1 - (z / c)^2
//
// A block's column j is vocabulary entry first_column + j.
//
// Types: logits float32 / bfloat16 / float16 / float64. Everything per row is float (double when the logits are
// float64): "real" below. All arithmetic is in real. Rows whose target lies in no block keep what target_logit held
// before (NaN by the caller's choice), so no target can make a kernel read outside its block. NaN in a row stays in
// that row. Sizes and strides are in elements, 64-bit.
#pragma once
#include "dtype.h"

namespace pyunlearn {

struct LogitBlock {
  const void* data;  // (rows, columns), columns contiguous; raw products x
  Dtype dtype;
  int64_t stride;    // between rows
  int64_t rows, columns, first_column;
  const void* bias;  // (columns,) in bias_dtype, or null
  Dtype bias_dtype;
  double scale, softcap;   // softcap 0: none
  const int64_t* targets;  // (rows,) vocabulary entries; anything outside the block is legal
};

struct MatrixOut {
  void* data;  // (rows, columns), columns contiguous; may be the input block's own memory when dtype and stride agree
  Dtype dtype;
  int64_t stride;
};

// Adds one block to the running statistics of each row: with M, S the row's (maximum, sum) so far and m = max_j z_j of
// this block,
//     M' = max(M, m),   S' = S exp(M - M') + sum_j exp(z_j - M'),
//     target_logit = z_target if the target is in the block.
//
// The caller starts with M = -inf, S = 0; afterwards log-likelihood = (target_logit - M) - log S.
//
// kept.data, unless null: receives exp(z_j - m) * (dz/du)_j rounded to kept.dtype, in [0, 1]: what the gradient needs
// of this block. block_maximum, unless null (never null with kept): (rows,) real, receives m, with or without kept.
struct StatisticsArguments {
  LogitBlock block;
  void *maximum, *sum, *target_logit;  // (rows,) real, updated in place
  MatrixOut kept;
  void* block_maximum;
};

// The gradient of sum_r coefficient_r * log_likelihood_r with respect to x, for one block:
//     g_rj = coefficient_r * scale * ([j is the target of r] - exp(z_rj - M_r) / S_r) * (dz/du)_rj
// with the row's final M and S, not log(sum of exp(z)) = M + log S, in which a large M would drown the digits of S. At
// the target it is coefficient * scale * -expm1(log_likelihood) * dz/du with z = log_likelihood + log S + M, which
// keeps its digits when the target is nearly certain. Rows with coefficient 0 give zeros whatever else they hold.
//
// is_kept = false: block holds logits. With block_maximum: exp(z - M) dz/du is taken as round(exp(z - m) dz/du) * exp(m
// - M) with round to out.dtype, so that a recomputed block gives bit for bit what a kept one gives. Without: directly.
// is_kept = true: block holds what the statistics kept (bias, softcap already inside; dz/du at the target still from z
// as above).
struct GradientArguments {
  LogitBlock block;
  bool is_kept;
  const void *maximum, *sum, *log_likelihood, *coefficients;  // (rows,) real
  const void* block_maximum;  // (rows,) real, or null
  MatrixOut out;
};

// Each returns null, or a sentence that says what it cannot do. Device pointers and a stream for cuda; a thread count
// for cpu.
const char* log_likelihood_statistics_cpu(const StatisticsArguments&, int threads);
const char* log_likelihood_gradient_cpu(const GradientArguments&, int threads);
const char* log_likelihood_statistics_cuda(const StatisticsArguments&, void* stream);
const char* log_likelihood_gradient_cuda(const GradientArguments&, void* stream);

}  // namespace pyunlearn
