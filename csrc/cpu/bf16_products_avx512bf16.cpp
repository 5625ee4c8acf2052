// The kernel of bf16_products.h: a panel of 64 columns of b is packed once and stays in the level-2 cache while all rows of a go past it, six at a
// time, in 24 registers of sums. Each step takes a pair of bfloat16 numbers of every operand.
#if defined(__AVX512BF16__)
#include "../bf16_products.h"

#include <immintrin.h>

#include <cstring>
#include <memory>

namespace pyunlearn {
namespace avx512bf16 {
namespace {

constexpr int kVectors = 4, kRows = 6;
constexpr int64_t kDepth = 320;  // pairs at most that are summed before they are added to the others: 80 KiB of packed panel, and short sums err less

using Packed = uint32_t[kVectors][16];  // one pair of each column

uint32_t pair(const uint16_t* row, int64_t at, int64_t width) {
  uint32_t both = row[at];
  if (at + 1 < width) both |= uint32_t{row[at + 1]} << 16;
  return both;
}

// packed[k][column] = pair k of that column, from pair `first` on; columns beyond `columns` are zero.
void pack(const Bf16Product& p, int64_t first_column, int64_t columns, int64_t first, int64_t pairs, Packed* packed) {
  for (int64_t j = 0; j < kVectors * 16; ++j) {
    const int vector = static_cast<int>(j / 16), lane = static_cast<int>(j % 16);
    if (j >= columns) {
      for (int64_t k = 0; k < pairs; ++k) packed[k][vector][lane] = 0;
      continue;
    }
    const uint16_t* row = p.b + (first_column + j) * p.b_stride;
    const int64_t whole = 2 * (first + pairs) <= p.width ? pairs : pairs - 1;  // the last pair of an odd width is half there
    for (int64_t k = 0; k < whole; ++k) std::memcpy(&packed[k][vector][lane], row + 2 * (first + k), 4);
    if (whole < pairs) packed[whole][vector][lane] = pair(row, 2 * (first + whole), p.width);
  }
}

__mmask16 lanes(int64_t columns, int vector) {
  const int64_t left = columns - 16 * vector;
  return left >= 16 ? __mmask16(0xffff) : left <= 0 ? __mmask16(0) : __mmask16((1u << left) - 1);
}

// `Rows` rows of out from row r on: += if there are earlier pairs, = otherwise.
template <int Rows> void tile(const Bf16Product& p, int64_t r, int64_t first_column, int64_t columns, int64_t first, int64_t pairs, const Packed* packed) {
  __m512 sum[Rows][kVectors];
  float* out = p.out + r * p.out_stride + first_column;
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_ps();
  const uint16_t* a = p.a + r * p.a_stride;
  const int64_t whole = 2 * (first + pairs) <= p.width ? pairs : pairs - 1;
  const auto step = [&](int64_t k, auto&& pair_of_row) {
    __m512bh b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = (__m512bh)_mm512_loadu_si512(packed[k][v]);
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
  if (whole < pairs) step(whole, [&](const uint16_t* row) { return pair(row, 2 * (first + whole), p.width); });
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + i * p.out_stride + 16 * v;
      const __m512 before = first ? _mm512_maskz_loadu_ps(lanes(columns, v), to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, lanes(columns, v), _mm512_add_ps(before, sum[i][v]));
    }
}

}  // namespace

extern const int64_t panel;
const int64_t panel = 16 * kVectors;

void columns_of(const Bf16Product& p, int64_t first_column, int64_t end_column) {
  static thread_local std::unique_ptr<Packed[]> memory(new Packed[kDepth + 1]);
  Packed* packed = reinterpret_cast<Packed*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  const int64_t columns = end_column - first_column, all = (p.width + 1) / 2;
  const int64_t parts = all > kDepth ? (all + kDepth - 1) / kDepth : 1, depth = (all + parts - 1) / parts;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * depth, pairs = all - first < depth ? all - first : depth;
    pack(p, first_column, columns, first, pairs, packed);
    int64_t r = 0;
    for (; r + kRows <= p.rows; r += kRows) tile<kRows>(p, r, first_column, columns, first, pairs, packed);
    for (; r + 4 <= p.rows; r += 4) tile<4>(p, r, first_column, columns, first, pairs, packed);
    for (; r < p.rows; ++r) tile<1>(p, r, first_column, columns, first, pairs, packed);
  }
}

}  // namespace avx512bf16
}  // namespace pyunlearn
#endif
