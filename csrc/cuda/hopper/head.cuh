// From a raw product x to the logit: u = scale (x + bias), z = u or c tanh(u / c). The kernels that train are compiled
// a second time without it, for the plain head (z = x).
#pragma once
#include "plan.cuh"
#include "ptx.cuh"

namespace pyunlearn {
namespace {

struct Head {
  const void* bias;
  bool bias_is_float;  // otherwise of the operands' type
  float scale, softcap, inverse_cap;  // inverse_cap 0 without softcap

  template <class T> __device__ __forceinline__ float bias_at(int column) const {
    return bias_is_float ? __ldg((const float*)bias + column) : (float)((const T*)bias)[column];
  }

  __device__ __forceinline__ bool plain() const { return !bias && scale == 1.f && softcap == 0.f; }

  // dz/du. The lower bound is for the columns beyond v, whose z is far outside the cap.
  __device__ __forceinline__ float slope(float z) const {
    const float t = z * inverse_cap;
    return fmaxf(fmaf(-t, t, 1.f), 0.f);
  }

  // For the target, whose logit enters the log-likelihood directly.
  template <class T> __device__ float exact(float x, int column) const {
    const float u = scale * (bias ? x + bias_at<T>(column) : x);
    return softcap != 0.f ? softcap * tanhf(u * inverse_cap) : u;
  }

  // For this thread's accumulators of a tile whose first column is this thread's `column`. tanh y = 1 - 2 / (1 + e^2y):
  // two instructions of the special function unit, within 3e-7 of the cap.
  template <class T> __device__ __forceinline__ void apply(float (&d)[128], int column, int v) const {
    if (bias) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const float b = bias_at<T>(min(column + 8 * (i / 2) + i % 2, v - 1));
        d[4 * (i / 2) + i % 2] += b, d[4 * (i / 2) + 2 + i % 2] += b;
      }
    }
    if (softcap != 0.f) {
      const float twice = 2.f * kLog2e * scale * inverse_cap;
#pragma unroll
      for (int i = 0; i < 128; ++i)
        d[i] = fmaf(-2.f * softcap, reciprocal_mufu(1.f + exp2_mufu(d[i] * twice)), softcap);
    } else {
#pragma unroll
      for (int i = 0; i < 128; ++i) {
        // a bias of -inf is a way to switch an entry off; 0 * inf in the sums would be NaN
        const float u = d[i] * scale;
        d[i] = u < kUnset ? kUnset : u;
      }
    }
  }
};

}  // namespace
}  // namespace pyunlearn
