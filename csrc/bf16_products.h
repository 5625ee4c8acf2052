// Matrix products of bfloat16 operands with a float32 result that was never rounded in between, for CPUs with AMX or AVX512-BF16.
//
//     out[r, j] = sum over k of a[r, k] * b[j, k]        r < rows, j < columns, k < width
//
// Sums are float32, a few hundred pairs of k at a time, always in the same order. The instructions take denormal bfloat16 numbers for zero. Torch has no
// such product on the CPU: its own rounds the result to bfloat16, and float32 products of widened operands take several times as long.
#pragma once
#include <cstdint>

namespace pyunlearn {

// Columns of a, b and out are contiguous; strides, between rows, in elements.
struct Bf16Product {
  const uint16_t *a, *b;  // (rows, width), (columns, width)
  int64_t a_stride, b_stride;
  float* out;  // (rows, columns)
  int64_t out_stride;
  int64_t rows, columns, width;
};

// "amx_bf16" or "avx512_bf16", whichever this machine has and the system permits; null: neither. PYUNLEARN_CPU=avx512 leaves AMX out, narrower ones both.
const char* bf16_products();

// Returns null, or a sentence that says what it cannot do.
const char* bf16_product_cpu(const Bf16Product&, int threads);

}  // namespace pyunlearn
