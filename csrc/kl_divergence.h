// The row kernels of kl_divergence: KL(reference || model) of two rows of logits, read side by side, and its gradient.
#pragma once
#include "log_likelihood.h"

namespace pyunlearn {

// Two blocks of the same rows and columns, in one dtype: raw products of the model, which become logits z as in
// log_likelihood.h, and of the reference, which become y in the same way. From the target's y, unless it lies in no
// block, target_shift (0 for none, infinity to leave it out) is subtracted. The reference's targets are not read.
struct LogitPair {
  LogitBlock model, reference;
  double target_shift;
};

// Adds one block to the running statistics of each row: (M, S) of z, (Mq, Sq) of y, both as in log_likelihood.h, and
//     C = sum_j exp(y_j - Mq) ((y_j - Mq) - (z_j - M)),
// which moves with the maxima: with d = M - M' and dq = Mq - Mq',  C' = e^dq (C + (dq - d) Sq) + ...
// The caller starts with M = Mq = -inf and zeros; afterwards KL = C / Sq - log Sq + log S. Reference mass below about
// e^-88 of the row's largest (e^-709 in float64) counts as none: its summand is 0 whatever z_j is. Where z_j = -inf
// beside any other mass, KL is infinite.
struct KlStatisticsArguments {
  LogitPair pair;
  void *maximum, *sum, *reference_maximum, *reference_sum, *cross;  // (rows,) real, updated in place
};

// The gradient of sum_r coefficient_r * KL_r with respect to the model's raw products, for one block:
//     g_rj = coefficient_r * scale * (exp(z_rj - M_r) / S_r - exp(y_rj - Mq_r) / Sq_r) * (dz/du)_rj
// Rows with coefficient 0 give zeros whatever else they hold.
struct KlGradientArguments {
  LogitPair pair;
  const void *maximum, *sum, *reference_maximum, *reference_sum, *coefficients;  // (rows,) real
  MatrixOut out;
};

// Each returns null, or a sentence that says what it cannot do.
const char* kl_statistics_cpu(const KlStatisticsArguments&, int threads);
const char* kl_gradient_cpu(const KlGradientArguments&, int threads);
const char* kl_statistics_cuda(const KlStatisticsArguments&, void* stream);
const char* kl_gradient_cuda(const KlGradientArguments&, void* stream);

}  // namespace pyunlearn
