#pragma once
#include "cuda_runtime.h"

struct __half {
  _Float16 value;
  operator float() const { return value; }
};
struct __half2 { __half x, y; };

inline __half __float2half_rn(float x) { return {(_Float16)x}; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 x) { return {(float)x.x, (float)x.y}; }
