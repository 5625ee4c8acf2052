// What both kernels of bf16_products.h share: some columns of b, laid out so that a vector holds one pair of
// neighbouring numbers of 16 columns. Included by files with AVX-512 flags only.
#pragma once
#include "../bf16_products.h"
#include "avx512_tools.h"
#include "parallel.h"

namespace pyunlearn {
namespace {

constexpr int kVectors = 4;     // of 16 columns: a panel
constexpr int64_t kPanel = 16 * kVectors;
// pairs at most that are summed before they are added to the others: 80 KiB of panel, and short sums err less
constexpr int64_t kDepth = 320;
constexpr int64_t kStep = 16;    // pairs that are packed at a time, and that one AMX instruction takes

using Packed = uint32_t[kDepth][16];  // of 16 columns, a row for each pair

// The pairs of a product in parts of about equal length, each a whole number of steps and at most kDepth long.
struct Parts {
  int64_t pairs, count, depth;
  explicit Parts(int64_t width) : pairs((width + 1) / 2), count(pairs > kDepth ? (pairs + kDepth - 1) / kDepth : 1) {
    depth = ((pairs + count - 1) / count + kStep - 1) / kStep * kStep;
  }
  int64_t length(int64_t part) const { return pairs - part * depth < depth ? pairs - part * depth : depth; }
};

// packed[vector][k] = pair first + k of each of its 16 columns, in whole steps; what is beyond the columns or the width
// is zero.
inline void pack(const Bf16Product& p, int64_t first_column, int64_t columns, int64_t first, int64_t pairs,
                 Packed* packed) {
  for (int vector = 0; vector < kVectors; ++vector)
    for (int64_t k = 0; k < pairs; k += kStep) {
      __m512i x[16];
      for (int j = 0; j < 16; ++j) {
        const int64_t column = 16 * vector + j, at = 2 * (first + k);
        x[j] = column < columns
                   ? _mm512_maskz_loadu_epi16(first32(p.width - at), p.b + (first_column + column) * p.b_stride + at)
                   : _mm512_setzero_si512();
      }
      transpose(x);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(packed[vector][k + i], x[i]);
    }
}

// f(first column, columns, memory for the panel) for each panel.
template <class F> void parallel_panels(const Bf16Product& p, int threads, F&& f) {
  static thread_local AlignedMemory<Packed> memory;
  const int64_t panels = (p.columns + kPanel - 1) / kPanel;
  MemoryOfThreads<Packed> packed(memory, kVectors, panels, threads);
  parallel_rows(panels, p.rows * p.width, threads, [&](int64_t begin, int64_t end) {
    Packed* mine = packed.next();
    for (int64_t i = begin; i < end; ++i)
      f(i * kPanel, p.columns - i * kPanel < kPanel ? p.columns - i * kPanel : kPanel, mine);
  });
}

}  // namespace
}  // namespace pyunlearn
