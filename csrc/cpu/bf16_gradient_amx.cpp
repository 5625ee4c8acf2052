// The products of a gradient of bf16_products.h with AMX. b runs along the sums, so pairs of its rows are interleaved;
// if a does too, that is turned afterwards.
#if defined(__AMX_BF16__)
#include "../bf16_products.h"
#include "amx_tiles.h"
#include "avx512_tools.h"
#include "parallel.h"

namespace pyunlearn {
namespace amx {
namespace {

constexpr int64_t kDepth = 1024;                     // of the sums, before they are added to float32 numbers
// of a that a thread lays out at a time: 256 KiB, which the level-2 cache holds beside a stripe of b
constexpr int64_t kPanelNumbers = int64_t{1} << 17;

// Columns `first` .. first + 31 of rows r .. r + 31 in pairs: pairs[half][i] holds, of 16 columns, rows r + 2 i and r +
// 2 i + 1. What is beyond is zero.
inline void pairs_of(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, int64_t r, int64_t first,
                     __m512i (&pairs)[2][16]) {
  alignas(64) static const uint16_t order[2][32] = {{0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
                                                    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i lower = _mm512_load_si512(order[0]), upper = _mm512_load_si512(order[1]);
  const __mmask32 which = first32(columns - first);
  const auto row = [&](int64_t i) {
    return i < rows ? _mm512_maskz_loadu_epi16(which, from + i * stride + first) : _mm512_setzero_si512();
  };
  for (int i = 0; i < 16; ++i) {
    const __m512i even = row(r + 2 * i), odd = row(r + 2 * i + 1);
    pairs[0][i] = _mm512_permutex2var_epi16(even, lower, odd);
    pairs[1][i] = _mm512_permutex2var_epi16(even, upper, odd);
  }
}

// Columns `first` .. first + 31 of a matrix as a stripe (amx_tiles.h). Turned: they are the tiles' rows.
template <bool Turned>
void lay_out_columns(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, int64_t first, uint16_t* to) {
  for (int64_t r = 0; r < rows; r += kSide, to += 2 * kTile) {
    __m512i pairs[2][16];
    pairs_of(from, stride, rows, columns, r, first, pairs);
    for (int half = 0; half < 2; ++half) {
      if (Turned) transpose(pairs[half]);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + half * kTile + i * 32, pairs[half][i]);
    }
  }
}

// Sums of 32 rows and 32 columns, as far as there are so many, into out.
void put(const float (&sums)[kSide][kSide], const Bf16Gradient& p, int64_t row, int64_t column) {
  const int64_t rows = p.rows - row, columns = p.columns - column, at = row * p.out_stride + column;
  if (!p.rounds) return put_sums(sums, static_cast<float*>(p.out) + at, p.out_stride, rows, columns, p.adds);
  uint16_t* to = static_cast<uint16_t*>(p.out) + at;
  for (int64_t i = 0; i < rows && i < kSide; ++i, to += p.out_stride)
    _mm512_mask_storeu_epi16(to, first32(columns),
                             (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums[i] + 16), _mm512_load_ps(sums[i])));
}

void gradient_of(const Bf16Gradient& p, int threads) {  // all of its depth at a time
  static thread_local AlignedMemory<uint16_t> memory;
  const int64_t steps = (p.depth + kSide - 1) / kSide, stripe = steps * 2 * kTile;
  const int64_t across = (p.columns + kSide - 1) / kSide, down = (p.rows + kSide - 1) / kSide;
  uint16_t* b = memory.room(across * stripe);
  parallel_rows(across, stripe, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      lay_out_columns<false>(p.b, p.b_stride, p.depth, p.columns, i * kSide, b + i * stripe);
  });

  const int64_t fit = kPanelNumbers / (stripe + 1), many = fit < 1 ? 1 : fit > 4 ? 4 : fit;  // stripes of a in a panel
  static thread_local AlignedMemory<uint16_t> panel_memory;
  const int64_t panels = (down + many - 1) / many;
  MemoryOfThreads<uint16_t> memory_of_panels(panel_memory, many * stripe, panels, threads);
  parallel_rows(panels, many * kSide * p.columns * p.depth, threads, [&](int64_t begin, int64_t end) {
    uint16_t* a = memory_of_panels.next();
    const Tiles tiles;
    for (int64_t i = begin * many; i < end * many && i < down; i += many) {
      const int64_t here = down - i < many ? down - i : many;
      for (int64_t s = 0; s < here; ++s) {
        if (p.transposed) lay_out_columns<true>(p.a, p.a_stride, p.depth, p.rows, (i + s) * kSide, a + s * stripe);
        else lay_out_rows(p.a, p.a_stride, p.rows, p.depth, (i + s) * kSide, a + s * stripe);
      }
      written();
      for (int64_t c = 0; c < across; ++c)
        for (int64_t s = 0; s < here; ++s) {
          sum_tiles(a + s * stripe, b + c * stripe, b + c * stripe + kTile, 2 * kTile, steps);
          alignas(64) float sums[kSide][kSide];
          store_tiles(sums[0], 32);
          put(sums, p, (i + s) * kSide, c * kSide);
        }
    }
  });
}

}  // namespace

void gradient(const Bf16Gradient& p, int threads) {
  if (p.rounds || p.depth <= kDepth) return gradient_of(p, threads);
  Bf16Gradient some = p;
  for (int64_t r = 0; r < p.depth; r += kDepth) {
    some.depth = p.depth - r < kDepth ? p.depth - r : kDepth;
    gradient_of(some, threads);
    some.a += p.transposed ? kDepth * p.a_stride : kDepth, some.b += kDepth * p.b_stride, some.adds = true;
  }
}

}  // namespace amx
}  // namespace pyunlearn
#endif
