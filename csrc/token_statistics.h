// The row kernel of token_statistics: entropy, variance and rank beside the log-likelihood, in the pass that makes it.
// Nothing is kept.
#pragma once
#include "log_likelihood.h"

namespace pyunlearn {

// Adds one block of logits z (from raw products as in log_likelihood.h) to the running statistics of each row. With M
// the row's maximum,
//     S = sum_j exp(z_j - M),   A = sum_j exp(z_j - M) (z_j - M),   B = sum_j exp(z_j - M) (z_j - M)^2,
//     rank = #{j not the target : z_j > threshold},   target_logit = z_target if the target is in the block.
// A block with maximum m moves all of them to M' = max(M, m): with d = M - M' <= 0,
//     S' = e^d S + ...,   A' = e^d (A + d S) + ...,   B' = e^d (B + 2 d A + d^2 S) + ...
// The caller starts with M = -inf and S = A = B = rank = 0; afterwards entropy = log S - A / S, and the variance of log
// p under p is B / S - (A / S)^2. Logits of -inf add nothing; a NaN in a row makes its S, A and B NaN and no other
// row's.
struct TokenStatisticsArguments {
  LogitBlock block;
  const void* threshold;                                  // (rows,) real
  void *maximum, *sum, *first, *second, *target_logit;    // (rows,) real, updated in place
  int64_t* rank;                                          // (rows,), updated in place
};

// What the threshold is made of: the raw product of each row's target, which has to be known before the vocabulary is
// gone through, and how far a float32 product of it may be off.
//     sum = sum_k hidden[r, k] weight[target_r, k],   size = sum_k |hidden[r, k] weight[target_r, k]|,   in float64
struct TargetProductsArguments {
  const void *hidden, *weight;  // (rows, width), (vocabulary, width), contiguous columns
  Dtype dtype;
  int64_t rows, width, vocabulary, hidden_stride, weight_stride;
  const int64_t* targets;  // (rows,): one outside the vocabulary is taken for its nearest entry
  double *sum, *size;      // (rows,)

#ifdef __CUDACC__
  __host__ __device__
#endif
  int64_t row_of_weight(int64_t row) const {
    const int64_t target = targets[row];
    return target < 0 ? 0 : target < vocabulary ? target : vocabulary - 1;
  }
};

// Each returns null, or a sentence that says what it cannot do.
const char* token_statistics_cpu(const TokenStatisticsArguments&, int threads);
const char* token_statistics_cuda(const TokenStatisticsArguments&, void* stream);
const char* target_products_cpu(const TargetProductsArguments&, int threads);
const char* target_products_cuda(const TargetProductsArguments&, void* stream);  // not float64

}  // namespace pyunlearn
