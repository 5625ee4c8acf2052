#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const { return bits_as<float>((uint32_t)bits << 16); }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {(uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
