// The kernel of bf16_products.h with AMX tiles: 32 rows of a past 32 columns of b, in four tiles of sums. Both operands are laid out anew, a tile after
// the other, for tiles whose rows lie apart load at half the speed.
#if defined(__AMX_BF16__)
#include "bf16_panel.h"
#include "parallel.h"

namespace pyunlearn {
namespace amx {
namespace {

constexpr int64_t kRows = 32;
constexpr int64_t kNumbers = 2 * kStep;                // of a row, in one tile
constexpr int64_t kTile = 16 * kNumbers;               // numbers of a tile
constexpr int64_t kMostNumbers = int64_t{1} << 21;     // of a that are laid out at a time: 4 MiB

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler does not know that loading a tile reads memory, and might write later what stands before.
inline void written() { __asm__ volatile("" ::: "memory"); }

int64_t steps_of(int64_t pairs) { return (pairs + kStep - 1) / kStep; }

// Rows r .. r + 31 of a: for each step the tile of the upper 16 and that of the lower 16. What is beyond the rows or the width is zero.
void pack_rows(const Bf16Product& p, int64_t r, uint16_t* to) {
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t k = 0; k < p.width; k += kNumbers)
      _mm512_store_si512(to + k / kNumbers * 2 * kTile + i * kNumbers,
                         r + i < p.rows ? _mm512_maskz_loadu_epi16(numbers(p.width - k), p.a + (r + i) * p.a_stride + k) : _mm512_setzero_si512());
}

// Writes a tile of sums that was stored aside, or adds it.
void put(const float (&sums)[16][16], float* out, int64_t stride, int64_t rows, __mmask16 columns, bool add) {
  for (int64_t i = 0; i < rows && i < 16; ++i) {
    const __m512 sum = _mm512_load_ps(sums[i]), before = add ? _mm512_maskz_loadu_ps(columns, out + i * stride) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(out + i * stride, columns, _mm512_add_ps(before, sum));
  }
}

// `rows` rows and `columns` columns of out, 32 of each at most, from `steps` steps of both operands: += to what is there, or =.
void block(const uint16_t* a, const Packed& b, const Packed& b_right, int64_t steps, float* out, int64_t stride, int64_t rows, int64_t columns, bool add) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, b + s * kStep, 64);
    _tile_loadd(4, a + s * 2 * kTile, 64);
    _tile_loadd(7, b_right + s * kStep, 64);
    _tile_loadd(5, a + s * 2 * kTile + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  if (!add && rows >= kRows && columns >= 32) {
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + 16, stride * 4);
    _tile_stored(2, out + 16 * stride, stride * 4);
    _tile_stored(3, out + 16 * stride + 16, stride * 4);
    return;
  }
  alignas(64) float sums[4][16][16];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (int i = 0; i < 4; ++i) put(sums[i], out + i / 2 * 16 * stride + i % 2 * 16, stride, rows - i / 2 * 16, lanes(columns, i % 2), add);
}

// Columns first .. first + columns - 1, a panel at most, of rows that are laid out in `a`.
void columns_of(const Bf16Product& p, const uint16_t* a, int64_t first, int64_t columns) {
  static const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  Packed* packed = panel_of_thread();
  const Parts parts(p.width);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t before = part * parts.depth, pairs = parts.length(part);
    pack(p, first, columns, before, pairs, packed);
    written();
    for (int64_t r = 0; r < p.rows; r += kRows) {
      const uint16_t* rows = a + r / kRows * steps_of(parts.pairs) * 2 * kTile + before / kStep * 2 * kTile;
      for (int v = 0; 16 * v < columns; v += 2)
        block(rows, packed[v], packed[v + 1], steps_of(pairs), p.out + r * p.out_stride + first + 16 * v, p.out_stride, p.rows - r, columns - 16 * v, before > 0);
    }
  }
  _tile_release();
}

void product_of(const Bf16Product& p, int threads) {  // as many rows as are laid out at a time
  const int64_t steps = steps_of((p.width + 1) / 2), blocks = (p.rows + kRows - 1) / kRows, size = steps * 2 * kTile;
  static thread_local AlignedMemory<uint16_t> memory;
  uint16_t* a = memory.room(blocks * size);
  parallel_rows(blocks, size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_rows(p, i * kRows, a + i * size);
  });
  parallel_panels(p, threads, [&](int64_t first, int64_t columns) { columns_of(p, a, first, columns); });
}

}  // namespace

void product(const Bf16Product& p, int threads) {
  const int64_t blocks = kMostNumbers / (steps_of((p.width + 1) / 2) * 2 * kTile + 1), most = kRows * (blocks > 1 ? blocks : 1);
  for (int64_t r = 0; r < p.rows; r += most) {
    Bf16Product some = p;
    some.a += r * p.a_stride, some.out += r * p.out_stride, some.rows = p.rows - r < most ? p.rows - r : most;
    product_of(some, threads);
  }
}

}  // namespace amx
}  // namespace pyunlearn
#endif
