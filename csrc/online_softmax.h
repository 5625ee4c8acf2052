// The running denominator of a softmax, (maximum, sum) with sum = sum_j exp(z_j - maximum), and how two of them merge.
// It starts at (-inf, 0).
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define PYUNLEARN_ANYWHERE __host__ __device__ __forceinline__
#else
#define PYUNLEARN_ANYWHERE inline
#endif

namespace pyunlearn {

template <class Real> struct OnlineSoftmax {
  Real maximum = -(Real)INFINITY;  // of everything that is not NaN
  Real sum = 0;                                           // NaN once a NaN was added
};

// What to subtract from z before exp: the maximum, or 0 when there is nothing above -inf, so that exp(-inf - -inf) is 0
// and not NaN.
template <class Real> PYUNLEARN_ANYWHERE Real softmax_shift(Real maximum) {
  return maximum == -(Real)INFINITY ? Real(0) : maximum;
}

template <class Real>
PYUNLEARN_ANYWHERE OnlineSoftmax<Real> merge(const OnlineSoftmax<Real>& a, const OnlineSoftmax<Real>& b) {
  using std::exp;
  OnlineSoftmax<Real> both;
  both.maximum = a.maximum < b.maximum ? b.maximum : a.maximum;
  const Real shift = softmax_shift(both.maximum);
  both.sum = a.sum * exp(a.maximum - shift) + b.sum * exp(b.maximum - shift);
  return both;
}

}  // namespace pyunlearn
