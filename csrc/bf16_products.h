// Matrix products of bfloat16 operands with a float32 result that was never rounded in between, for CPUs with AMX or
// AVX512-BF16.
//
//     out[r, j] = sum over k of a[r, k] * b[j, k]        r < rows, j < columns, k < width
//
// Sums are float32, a few hundred pairs of k at a time, always in the same order. The instructions take denormal
// numbers for zero. Torch has no such product on the CPU: its own rounds the result to bfloat16, and float32 products
// of widened operands take about twice as long.
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

// "amx_bf16" or "avx512_bf16", whichever this machine has and the system permits; null: neither. PYUNLEARN_CPU=avx512
// leaves AMX out, narrower ones both.
const char* bf16_products();

// Returns null, or a sentence that says what it cannot do.
const char* bf16_product_cpu(const Bf16Product&, int threads);

// The products of a gradient, whose sums run along the rows of b:
//
//     out[j, c] = sum over r of a[j, r] * b[r, c], or a[r, j] if it is transposed
//
// for j < rows, c < columns, r < depth.
//
// Sums are float32, of 1024 numbers at a time, or of all of them if the result is rounded. With AMX alone ("amx_bf16"):
// torch's own are as fast elsewhere.
struct Bf16Gradient {
  const uint16_t *a, *b;  // (rows, depth), or (depth, rows) if it is transposed; (depth, columns)
  int64_t a_stride, b_stride;
  bool transposed;
  void* out;  // (rows, columns): bfloat16 if `rounds`, otherwise float32, to which it is added if `adds`
  int64_t out_stride;
  bool rounds, adds;
  int64_t rows, columns, depth;
};

const char* bf16_gradient_cpu(const Bf16Gradient&, int threads);

}  // namespace pyunlearn
