// The vocabulary product fused with its row statistics, for compute capability 9.0 (H100, H200): the logits live in
// registers only. What is computed is defined in log_likelihood.h; here x = hidden . weight is made inside, in fp32,
// and z, dz/du follow from it as there.
//
// All functions return null, or a sentence that says what they cannot do (nothing was launched then), or CUDA's own
// words for a launch that failed. They launch on `stream` of the current device, never synchronise, use no atomics,
// repeat bit for bit, and may be captured into a CUDA graph.
#pragma once
#include "dtype.h"

namespace pyunlearn {

// hidden and weight: bfloat16 or float16, both alike; 16-byte aligned, strides (elements between rows) multiples of 8
// and at least d. d: a multiple of 8, at most 2^25. n, v: anything up to 2^30. bias: float32 or the dtype of weight. A
// target may be any number. A row whose largest logit is beyond 7e8 in size, or whose logits are all -inf, gets NaN.
struct HopperInput {
  const void *hidden, *weight;  // (n, d), (v, d)
  Dtype dtype;
  int64_t n, d, v, hidden_stride, weight_stride;
  const void* bias;  // (v,), or null
  Dtype bias_dtype;
  double scale, softcap;  // 1 and 0: none
  const int64_t* targets;  // (n,)
};

// All (n,). log-likelihood, entropy in nats, variance in nats^2. A target outside [0, v): log-likelihood NaN, rank -1,
// the others as usual.
struct HopperStatistics {
  float* log_likelihood;
  float *maximum, *total;  // M and S of log_likelihood.h, with M near the log of the sum
  float* entropy;   // -sum_j p_j log p_j; or null
  float* variance;  // of log p under p; or null
  // how many logits are above the threshold, the target's own not counted (exact for v up to 2^24); or null
  int64_t* rank;
  const float* threshold;  // or null: the target's logit
};

// Null if the current device can run these kernels.
const char* hopper_unavailable();

// Scratch of either statistics function on the current device, 16-byte aligned, any content: about 1.6 KB a row.
int64_t hopper_workspace_bytes(int64_t n);

const char* hopper_statistics(const HopperInput&, const HopperStatistics&, void* workspace, void* stream);

// The log-likelihoods, and what a backward pass needs of every logit, so that the coefficients may come later and
// nothing is multiplied twice:
//     (p_rj - [j is the target of r]) (dz/du)_rj = factor_r * kept_rj
// A row that is NaN has kept_rj = 0 and a factor of NaN, so that no other row's gradient meets it. Where
// log S + M is nearly 69 nats above the reference the factor is near 2^-100, and what a row adds to d_weight is lost
// where its |coefficient * scale * hidden| is below about 2^-34.
//
// kept (n, v) bfloat16, 16-byte aligned, its stride a multiple of 8 that is at least v; columns v .. next multiple of 8
// are zeroed. bfloat16 inputs only. The exponentials are kept relative to a reference that has to be known before the
// sweep: max(target logit, 0). bfloat16 has the range for that (the few rows that leave it, log S + M more than 69 nats
// above or 41 below, are written again by a second sweep that otherwise ends at once). float16 spans 2^-24 .. 2^16: any
// row with a surprising target would overflow it, and factor_r * hidden would underflow it, so nearly every block of
// 256 rows would be swept twice, which is what recomputing with hopper_gradient costs.
const char* hopper_statistics_kept(const HopperInput&, float* log_likelihood, float* maximum, float* total, void* kept,
                                   int64_t kept_stride, float* factor, void* workspace, void* stream);

// For a chunk of the vocabulary, entries first_column .. first_column + v - 1, whose rows of weight and bias are given:
//     g_rj = coefficient_r * scale * ([first_column + j is the target of r] - p_rj) * (dz/du)_rj
// with p and dz/du of log_likelihood.h.
//
// g (n, v) in the input's dtype, 16-byte aligned, its stride a multiple of 8 that is at least v; columns v .. next
// multiple of 8 are zeroed. Rows with coefficient 0 give zeros whatever else they hold.
const char* hopper_gradient(const HopperInput&, int64_t first_column, const float* coefficients,
                            const float* log_likelihood, const float* maximum, const float* total, void* g,
                            int64_t g_stride, void* stream);

}  // namespace pyunlearn
