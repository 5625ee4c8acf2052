// The product of a warpgroup, with the rounding of the tensor cores. Included by emulator.cpp alone.
//
// NVIDIA does not document it. The model: sixteen products and the accumulator are aligned to the largest exponent
// among them; of each, what lies below 25 bits is cut; their sum is cut to float32's 24 bits. So the size of a sum
// comes out too small, by more the longer it is. For sums of unit variance an H100 was off by up to 1.1e-5 at 2304
// and 2.1e-5 at 4096; 2400 sums of this model by up to 0.8e-5 and 1.1e-5. (The method: Fasi et al., "Numerical behavior
// of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021.)
#pragma once
#include "machine.h"

namespace emulator {
namespace {

constexpr int kBits = 25;  // of the largest term, the leading one included
constexpr int kTileRows = 64, kTileColumns = 256, kTileDepth = 16;

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// d[c] += sum over k of a[k * stride_a] * b[k][c], for `columns` columns, a multiple of 8
inline void add_products(float* d, const float* a, int stride_a, const float* b, int columns) {
  int32_t top[kTileColumns], sum[kTileColumns];
  float inverse[kTileColumns];
  int32_t highest = 0;
  for (int c = 0; c < columns; ++c) top[c] = bits_of(d[c]) & 0x7fffffff;
  for (int k = 0; k < kTileDepth; ++k)
    for (int c = 0; c < columns; ++c) {
      const int32_t size = bits_of(a[k * stride_a] * b[k * columns + c]) & 0x7fffffff;
      top[c] = top[c] > size ? top[c] : size;
    }
  for (int c = 0; c < columns; ++c) highest = highest > top[c] ? highest : top[c];
  if (highest >= 0x7c000000) {  // NaN, infinity, or next to it
    for (int k = 0; k < kTileDepth; ++k)
      for (int c = 0; c < columns; ++c) d[c] += a[k * stride_a] * b[k * columns + c];
    return;
  }
  for (int c = 0; c < columns; ++c) {
    const int32_t exponent = (top[c] >> 23) - (kBits - 1);  // of the last bit that stays
    top[c] = exponent > 1 ? exponent : 1;
    inverse[c] = float_of((254 - top[c]) << 23);
    sum[c] = (int32_t)(d[c] * inverse[c]);
  }
  for (int k = 0; k < kTileDepth; ++k)
    for (int c = 0; c < columns; ++c) sum[c] += (int32_t)(a[k * stride_a] * b[k * columns + c] * inverse[c]);
  for (int c = 0; c < columns; ++c) {
    float x = (float)sum[c];
    const int32_t back = (int32_t)x, excess = (back < 0 ? -back : back) > (sum[c] < 0 ? -sum[c] : sum[c]);
    x = float_of(bits_of(x) - excess);  // rounded away from zero: the neighbour towards it
    d[c] = x * float_of(top[c] << 23);
  }
}

// One operand, rows x 16, as floats [16][rows]
void read_operand(Block& block, uint64_t descriptor, int rows, float (*to_float)(uint16_t), float* out) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, group = (descriptor >> 32 & 0x3FFF) << 4, mode = descriptor >> 62;
  require((descriptor >> 49 & 7) == 0, "a descriptor with a base offset");
  require(mode == 1 || mode == 2, "an operand without 128- or 64-byte swizzle");
  const uint32_t row_bytes = mode == 1 ? 128 : 64;
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < kTileDepth; ++k) {
      const uint32_t at = swizzled(start + r / 8 * group + r % 8 * row_bytes + k * 2, row_bytes);
      uint16_t x;
      std::memcpy(&x, memory_of(block.copied, at, 2), 2);
      out[k * rows + r] = to_float(x);
    }
}

void do_product(Block& block, const Product& p) {
  static float a[kTileDepth * kTileRows], b[kTileDepth * kTileColumns], d[kTileRows][kTileColumns];
  read_operand(block, p.a, kTileRows, p.to_float, a);
  read_operand(block, p.b, kTileColumns, p.to_float, b);
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 128; ++i)
      d[16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (t % 4) + i % 2] =
          p.accumulate ? p.d[t][i] : 0.f;
  for (int r = 0; r < kTileRows; ++r) add_products(d[r], a + r, kTileRows, b, kTileColumns);
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 128; ++i)
      p.d[t][i] = d[16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (t % 4) + i % 2];
}
void do_group(Block& block, Warpgroup::Group& group) {
  if (group.done) return;
  group.done = true;
  for (const Product& p : group.products) do_product(block, p);
  std::vector<Product>().swap(group.products);
}

}  // namespace
}  // namespace emulator
