// Four tiles of sums, 32 rows by 32 columns, from operands that were laid out for AMX: a tile is 1 KiB in one piece, since tiles whose rows lie apart
// load at half the speed. Included by files with AVX-512 and AMX flags only.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace pyunlearn {
namespace {

constexpr int64_t kTile = 512;  // numbers of bfloat16

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

// a: for each step the tile of the upper 16 rows (32 numbers each), then that of the lower 16. left, right: a tile for each step, `apart` numbers apart,
// of 16 columns (16 pairs of numbers each).
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

inline void store_tiles(float* out, int64_t stride) {
  _tile_stored(0, out, stride * 4);
  _tile_stored(1, out + 16, stride * 4);
  _tile_stored(2, out + 16 * stride, stride * 4);
  _tile_stored(3, out + 16 * stride + 16, stride * 4);
}

}  // namespace
}  // namespace pyunlearn
