// The kernel of bf16_products.h with AVX512-BF16: a packed panel of b stays in the level-2 cache while all rows of a go
// past it, six at a time, in 24 registers of sums. Each step takes a pair of bfloat16 numbers of every operand.
#if defined(__AVX512BF16__)
#include <cstring>

#include "bf16_panel.h"

namespace pyunlearn {
namespace avx512bf16 {
namespace {

constexpr int kRows = 6;

// `Rows` rows of out from row r on: += if there are earlier pairs, = otherwise.
template <int Rows>
void tile(const Bf16Product& p, int64_t r, int64_t first_column, int64_t columns, int64_t first, int64_t pairs,
          const Packed* packed) {
  __m512 sum[Rows][kVectors];
  float* out = p.out + r * p.out_stride + first_column;
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_ps();
  const uint16_t* a = p.a + r * p.a_stride;
  // the last pair of an odd width is half there
  const int64_t whole = 2 * (first + pairs) <= p.width ? pairs : pairs - 1;
  const auto step = [&](int64_t k, auto&& pair_of_row) {
    __m512bh b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = (__m512bh)_mm512_load_si512(packed[v][k]);
    for (int i = 0; i < Rows; ++i) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair_of_row(a + i * p.a_stride)));
      for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], both, b[v]);
    }
  };
  for (int64_t k = 0; k < whole; ++k)
    step(k, [&](const uint16_t* row) {
      uint32_t both;
      std::memcpy(&both, row + 2 * (first + k), 4);
      return both;
    });
  if (whole < pairs) step(whole, [&](const uint16_t* row) { return uint32_t{row[2 * (first + whole)]}; });
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + i * p.out_stride + 16 * v;
      const __m512 before = first ? _mm512_maskz_loadu_ps(first16(columns - 16 * v), to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, first16(columns - 16 * v), _mm512_add_ps(before, sum[i][v]));
    }
}

void columns_of(const Bf16Product& p, int64_t first_column, int64_t columns, Packed* packed) {
  const Parts parts(p.width);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t first = part * parts.depth, pairs = parts.length(part);
    pack(p, first_column, columns, first, pairs, packed);
    int64_t r = 0;
    for (; r + kRows <= p.rows; r += kRows) tile<kRows>(p, r, first_column, columns, first, pairs, packed);
    for (; r + 4 <= p.rows; r += 4) tile<4>(p, r, first_column, columns, first, pairs, packed);
    for (; r < p.rows; ++r) tile<1>(p, r, first_column, columns, first, pairs, packed);
  }
}

}  // namespace

void product(const Bf16Product& p, int threads) {
  parallel_panels(p, threads,
                  [&](int64_t first, int64_t columns, Packed* packed) { columns_of(p, first, columns, packed); });
}

}  // namespace avx512bf16
}  // namespace pyunlearn
#endif
