// Four tiles of sums, 32 rows by 32 columns, from operands that were laid out for AMX: a tile is 1 KiB in one piece,
// since tiles whose rows lie apart load at half the speed. Included by files with AVX-512 and AMX flags only.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "avx512_tools.h"

namespace pyunlearn {
namespace {

constexpr int64_t kTile = 512;  // numbers of bfloat16
constexpr int64_t kSide = 32;   // of a block of sums, and numbers of a step along them

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A thread's tiles, as long as this lives.
struct Tiles {
  Tiles() {
    static const TileConfiguration configuration;
    _tile_loadconfig(&configuration);
  }
  ~Tiles() { _tile_release(); }
};

// The compiler does not know that loading a tile reads memory, and might write later what stands before.
inline void written() { __asm__ volatile("" ::: "memory"); }

// Rows `first` .. first + 31 of a matrix as a stripe: for each step along the sums the tile of the upper 16 and that of
// the lower 16. What is beyond the rows or the columns is zero.
inline void lay_out_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, int64_t first,
                         uint16_t* to) {
  for (int64_t k = 0; k < columns; k += kSide, to += 2 * kTile)
    for (int64_t i = 0; i < kSide; ++i)
      _mm512_store_si512(to + i * kSide, first + i < rows ? _mm512_maskz_loadu_epi16(first32(columns - k),
                                                                                     from + (first + i) * stride + k)
                                                          : _mm512_setzero_si512());
}

// a: a stripe of 32 rows. left, right: a tile for each step, `apart` numbers apart, of 16 columns (16 pairs of numbers
// each).
inline void sum_tiles(const uint16_t* a, const uint16_t* left, const uint16_t* right, int64_t apart, int64_t steps) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, left + s * apart, 64);
    _tile_loadd(4, a + s * 2 * kTile, 64);
    _tile_loadd(7, right + s * apart, 64);
    _tile_loadd(5, a + s * 2 * kTile + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Writes the four tiles.
inline void store_tiles(float* out, int64_t stride) {
  _tile_stored(0, out, stride * 4);
  _tile_stored(1, out + 16, stride * 4);
  _tile_stored(2, out + 16 * stride, stride * 4);
  _tile_stored(3, out + 16 * stride + 16, stride * 4);
}

// Writes sums that were stored aside, as far as there are so many rows and columns, or adds them.
inline void put_sums(const float (&sums)[kSide][kSide], float* out, int64_t stride, int64_t rows, int64_t columns,
                     bool add) {
  for (int64_t i = 0; i < rows && i < kSide; ++i)
    for (int half = 0; half < 2; ++half) {
      float* to = out + i * stride + 16 * half;
      const __mmask16 which = first16(columns - 16 * half);
      const __m512 before = add ? _mm512_maskz_loadu_ps(which, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, which, _mm512_add_ps(before, _mm512_load_ps(sums[i] + 16 * half)));
    }
}

}  // namespace
}  // namespace pyunlearn
