// The kernel of bf16_products.h with AMX: the rows of a are laid out in tiles once, the columns of b panel by panel.
#if defined(__AMX_BF16__)
#include "amx_tiles.h"
#include "bf16_panel.h"

namespace pyunlearn {
namespace amx {
namespace {

constexpr int64_t kMostNumbers = int64_t{1} << 21;  // of a that are laid out at a time: 4 MiB

int64_t steps_of(int64_t pairs) { return (pairs + kStep - 1) / kStep; }

// `rows` rows and `columns` columns of out, 32 of each at most, from `steps` steps of both operands: += to what is
// there, or =.
void block(const uint16_t* a, const Packed& left, const Packed& right, int64_t steps, float* out, int64_t stride,
           int64_t rows, int64_t columns, bool add) {
  sum_tiles(a, reinterpret_cast<const uint16_t*>(left), reinterpret_cast<const uint16_t*>(right), kTile, steps);
  if (!add && rows >= kSide && columns >= kSide) return store_tiles(out, stride);
  alignas(64) float sums[kSide][kSide];
  store_tiles(sums[0], kSide);
  put_sums(sums, out, stride, rows, columns, add);
}

// Columns first .. first + columns - 1, a panel at most, of rows that are laid out in `a`.
void columns_of(const Bf16Product& p, const uint16_t* a, int64_t first, int64_t columns, Packed* packed) {
  const Tiles tiles;
  const Parts parts(p.width);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t before = part * parts.depth, pairs = parts.length(part);
    pack(p, first, columns, before, pairs, packed);
    written();
    for (int64_t r = 0; r < p.rows; r += kSide) {
      const uint16_t* rows = a + r / kSide * steps_of(parts.pairs) * 2 * kTile + before / kStep * 2 * kTile;
      for (int v = 0; 16 * v < columns; v += 2)
        block(rows, packed[v], packed[v + 1], steps_of(pairs), p.out + r * p.out_stride + first + 16 * v, p.out_stride,
              p.rows - r, columns - 16 * v, before > 0);
    }
  }
}

void product_of(const Bf16Product& p, int threads) {  // as many rows as are laid out at a time
  const int64_t steps = steps_of((p.width + 1) / 2), blocks = (p.rows + kSide - 1) / kSide, size = steps * 2 * kTile;
  static thread_local AlignedMemory<uint16_t> memory;
  uint16_t* a = memory.room(blocks * size);
  parallel_rows(blocks, size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) lay_out_rows(p.a, p.a_stride, p.rows, p.width, i * kSide, a + i * size);
  });
  parallel_panels(p, threads,
                  [&](int64_t first, int64_t columns, Packed* packed) { columns_of(p, a, first, columns, packed); });
}

}  // namespace

void product(const Bf16Product& p, int threads) {
  const int64_t blocks = kMostNumbers / (steps_of((p.width + 1) / 2) * 2 * kTile + 1),
                most = kSide * (blocks > 1 ? blocks : 1);
  for (int64_t r = 0; r < p.rows; r += most) {
    Bf16Product some = p;
    some.a += r * p.a_stride, some.out += r * p.out_stride, some.rows = p.rows - r < most ? p.rows - r : most;
    product_of(some, threads);
  }
}

}  // namespace amx
}  // namespace pyunlearn
#endif
