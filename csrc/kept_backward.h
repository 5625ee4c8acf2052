// The backward pass of the kept form (hopper.h): two matrix products over the kept exponentials, and around them what
// is elementwise or touches the targets' rows only. With, for the product and for the target (log_likelihood.h), which
// kept leaves out,
//     a_r = -coefficient_r * scale * factor_r
//     b_r = coefficient_r * scale * -expm1(log_likelihood_r) * (dz/du at the target)
// the gradients of sum_r coefficient_r * log_likelihood_r are
//     d_weight = kept' (a hidden) + sum over rows of b_r hidden_r at target_r
//     d_hidden = a (kept weight) + b weight[target]
//
// A row whose coefficient is 0, or whose target is outside [0, v) (its log-likelihood is NaN), has b = 0; coefficient 0
// also has a = 0, and its part of scaled_hidden and d_hidden is 0 whatever else it holds.
#pragma once
#include "log_likelihood.h"

namespace pyunlearn {

struct KeptRows {
  int64_t n, d, v;
  double scale, softcap;
  const int64_t* targets;
  const float *coefficients, *factor, *log_likelihood, *maximum, *total;  // (n,)
};

// Matrices here have contiguous columns and strides in elements; float32, bfloat16 or float16, each its own. Any
// alignment works, 16 bytes is fast.
struct MatrixIn {
  const void* data;
  Dtype dtype;
  int64_t stride;
};

// Each returns null, or a sentence that says what it cannot do. Bitwise repeatable, no host synchronisation.

// out (n, d) = a_r * hidden_r: what the product kept' (a hidden) takes.
const char* kept_scale_hidden(const KeptRows&, const MatrixIn& hidden, const MatrixOut& out, void* stream);

// out (n, d) = a_r * product_r + b_r * weight[target_r], rounded once; product = kept weight (n, d); out may be
// product's own memory when type and stride agree.
const char* kept_hidden_gradient(const KeptRows&, const MatrixIn& product, const MatrixIn& weight, const MatrixOut& out,
                                 void* stream);

// d_weight[t] += sum of b_r hidden_r over the rows r whose target is t, summed in fp32 in the given order and rounded
// once. sorted_targets (n,) are the targets in rising order, and order (n,) the rows they belong to
// (torch.sort(targets, stable=True)). Rows of d_weight without a target are not touched.
const char* kept_add_targets(const KeptRows&, const MatrixIn& hidden, const int64_t* sorted_targets,
                             const int64_t* order, const MatrixOut& d_weight, void* stream);

}  // namespace pyunlearn
