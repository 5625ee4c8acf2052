// The kernel of bf16_products.h with AMX tiles: 32 rows of a past 32 columns of a packed panel of b, in four tiles of sums.
#if defined(__AMX_BF16__)
#include <cstring>

#include "bf16_panel.h"

namespace pyunlearn {
namespace amx {
namespace {

constexpr int64_t kRows = 32;
constexpr int64_t kNumbers = 2 * kStep;  // of a row, in one tile

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 32 rows as the tiles read them.
struct Rows {
  const uint16_t* data;
  int64_t stride;  // numbers
};

// The compiler does not know that loading a tile reads memory, and might write later what stands before.
inline void written() { __asm__ volatile("" ::: "memory"); }

// A tile reads whole steps of whole rows; what lacks for that is zero in a copy.
Rows whole_rows(const Bf16Product& p, int64_t r, int64_t first, int64_t pairs, uint16_t* copy) {
  const int64_t rows = p.rows - r < kRows ? p.rows - r : kRows, steps = (pairs + kStep - 1) / kStep, stride = steps * kNumbers;
  const uint16_t* from = p.a + r * p.a_stride + 2 * first;
  if (rows == kRows && 2 * first + stride <= p.width) return {from, p.a_stride};
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t k = 0; k < stride; k += kNumbers)
      _mm512_store_si512(copy + i * stride + k, i < rows ? _mm512_maskz_loadu_epi16(numbers(p.width - 2 * first - k), from + i * p.a_stride + k)
                                                         : _mm512_setzero_si512());
  written();
  return {copy, stride};
}

// Adds a tile of sums that was stored aside, or writes it.
void put(const float (&sums)[16][16], float* out, int64_t stride, int64_t rows, __mmask16 columns, bool add) {
  for (int64_t i = 0; i < rows && i < 16; ++i) {
    const __m512 sum = _mm512_load_ps(sums[i]), before = add ? _mm512_maskz_loadu_ps(columns, out + i * stride) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(out + i * stride, columns, _mm512_add_ps(before, sum));
  }
}

#define PYUNLEARN_PUT(tile, below, right)                                                                                            \
  if (whole) {                                                                                                                       \
    _tile_stored(tile, out + below * 16 * p.out_stride + right * 16, p.out_stride * 4);                                              \
  } else {                                                                                                                           \
    alignas(64) float sums[16][16];                                                                                                  \
    _tile_stored(tile, sums, 64);                                                                                                    \
    put(sums, out + below * 16 * p.out_stride + right * 16, p.out_stride, p.rows - r - below * 16, lanes(columns, vector + right), first > 0); \
  }

// Columns 16 vector .. 16 vector + 31 of the panel, for 32 rows from r on: += if there are earlier pairs, = otherwise.
void block(const Bf16Product& p, const Rows& a, int64_t r, int64_t first_column, int64_t columns, int vector, int64_t first, int64_t pairs,
           const Packed* packed) {
  constexpr int64_t b_stride = sizeof(Packed);
  const int64_t a_stride = 2 * a.stride;
  const uint16_t* below = a.data + 16 * a.stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < pairs; k += kStep) {
    _tile_loadd(6, packed[k][vector], b_stride);
    _tile_loadd(4, a.data + 2 * k, a_stride);
    _tile_loadd(7, packed[k][vector + 1], b_stride);
    _tile_loadd(5, below + 2 * k, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  float* out = p.out + r * p.out_stride + first_column + 16 * vector;
  const bool whole = !first && r + kRows <= p.rows && 16 * (vector + 2) <= columns;
  PYUNLEARN_PUT(0, 0, 0)
  PYUNLEARN_PUT(1, 0, 1)
  PYUNLEARN_PUT(2, 1, 0)
  PYUNLEARN_PUT(3, 1, 1)
}

}  // namespace

void columns_of(const Bf16Product& p, int64_t first_column, int64_t end_column) {
  static thread_local std::unique_ptr<uint16_t[]> memory(new uint16_t[kRows * 2 * kDepth + 32]);
  uint16_t* copy = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  Packed* packed = panel_of_thread();
  static const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  const int64_t columns = end_column - first_column;
  const Parts parts(p.width);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t first = part * parts.depth, pairs = parts.length(part);
    pack(p, first_column, columns, first, pairs, packed);
    written();
    for (int64_t r = 0; r < p.rows; r += kRows) {
      const Rows a = whole_rows(p, r, first, pairs, copy);
      for (int vector = 0; vector < kVectors && 16 * vector < columns; vector += 2)
        block(p, a, r, first_column, columns, vector, first, pairs, packed);
    }
  }
  _tile_release();
}

}  // namespace amx
}  // namespace pyunlearn
#endif
