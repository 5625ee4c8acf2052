// Matrix products of bfloat16 operands with a float32 result that was never rounded in between, for CPUs with AVX512-BF16.
//
//     out[r, j] = sum over k of a[r, k] * b[j, k]        r < rows, j < columns, k < width
//
// Sums are float32, a few hundred pairs of k at a time, always in the same order. The instruction takes denormal bfloat16 numbers for zero. Torch has no such product on the CPU: its own
// rounds the result to bfloat16, and float32 products of widened operands cost twice the time where there is no AMX.
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

// Whether this machine has AVX512-BF16, and PYUNLEARN_CPU does not forbid it. False where AMX is there too: torch's own way is faster then.
bool bf16_products_serve();

// Returns null, or a sentence that says what it cannot do.
const char* bf16_product_cpu(const Bf16Product&, int threads);

}  // namespace pyunlearn
