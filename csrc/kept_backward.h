// The backward pass of the kept form (hopper.h): two matrix products over the kept exponentials. With
//     a_r = -coefficient_r * scale * factor_r
// the gradients of sum_r coefficient_r * log_likelihood_r are
//     d_weight = kept' (a hidden)
//     d_hidden = a (kept weight)
// and d_bias is d_weight of a column of ones. Here are the rows' factors, before one product and after the other.
#pragma once
#include "log_likelihood.h"

namespace pyunlearn {

// A matrix (n, d) with contiguous columns and strides in elements; float32, bfloat16 or float16. Any alignment works,
// 16 bytes is fast.
struct MatrixIn {
  const void* data;
  Dtype dtype;
  int64_t stride;
};

struct KeptRows {
  int64_t n, d;
  double scale;
  const float *coefficients, *factor;  // (n,)
};

// out (n, d) = a_r * in_r, rounded once; 0 for a coefficient of 0, also where the row holds NaN. out may be in's own
// memory when type and stride agree. Returns null, or a sentence that says what it cannot do. Bitwise repeatable, no
// host synchronisation.
const char* kept_scale_rows(const KeptRows&, const MatrixIn& in, const MatrixOut& out, void* stream);

}  // namespace pyunlearn
