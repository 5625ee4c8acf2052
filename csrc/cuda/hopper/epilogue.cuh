// What becomes of a finished tile of logits while it is still in registers: running sums, or tiles of 2-byte numbers on
// their way to memory.
#pragma once
#include "head.cuh"

namespace pyunlearn {
namespace {

// ---------------------------------------------------------------- sums

struct Row {  // running sums over this thread's columns of one row. y = logit * log2 e - reference
  float reference = kUnset;
  float sum = 0.f;  // of 2^y
  float first = 0.f;  // of 2^y y
  float second = 0.f;  // of 2^y y^2
  float above = 0.f;  // columns whose logit is above the threshold (exact in fp32 up to 2^24)
  float threshold = 0.f;
};

// Moves the sums to another reference. The bound stands for "nothing is left" and keeps the products finite.
template <Task task> __device__ __forceinline__ void move_reference(Row& row, float to) {
  const float shift = fmaxf(row.reference - to, -512.f), scale = exp2_mufu(shift);
  if constexpr (task == Task::all_statistics) {
    row.second = fmaf(shift, fmaf(shift, row.sum, 2.f * row.first), row.second) * scale;
    row.first = fmaf(shift, row.sum, row.first) * scale;
  }
  row.sum *= scale;
  row.reference = to;
}

template <Task task> __device__ __forceinline__ void merge_rows(Row& row, Row other) {
  const float top = fmaxf(row.reference, other.reference);
  move_reference<task>(row, top);
  move_reference<task>(other, top);
  row.sum += other.sum;
  if constexpr (task == Task::all_statistics)
    row.first += other.first, row.second += other.second, row.above += other.above;
}

template <Task task> __device__ __forceinline__ void merge_quad(Row& row) {  // over the four threads that share a row
#pragma unroll
  for (int offset = 1; offset < 4; offset <<= 1) {
    Row other;
    other.reference = __shfl_xor_sync(~0u, row.reference, offset);
    other.sum = __shfl_xor_sync(~0u, row.sum, offset);
    if constexpr (task == Task::all_statistics) {
      other.first = __shfl_xor_sync(~0u, row.first, offset);
      other.second = __shfl_xor_sync(~0u, row.second, offset);
      other.above = __shfl_xor_sync(~0u, row.above, offset);
    }
    merge_rows<task>(row, other);
  }
}

// Adds this thread's 64 columns of one row. The reference is the maximum of the first tile and moves only when a sum
// outgrows 2^100, so later tiles need no maximum: fp32 has the exponent range to spare, and what is far below the
// reference is negligible because the true maximum is at least the reference. For the variance the limit is 64 times
// the sum so far: then the mass before the tile is at least 1/64 of the mass after it, and the variance that it causes
// by being away from the new mass is as large as what rounding y^2 loses, times 1e5.
template <Task task, int Half>
__device__ __forceinline__ void add_row(const float (&d)[128], bool first_tile, Row& row) {
  constexpr bool all = task == Task::all_statistics;
  float sum = __int_as_float(0x7f800000), first = 0.f, second = 0.f, above = 0.f;
  if (!first_tile) {
    float part[4] = {0.f, 0.f, 0.f, 0.f}, one[2] = {0.f, 0.f}, two[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const float x = d[4 * (i / 2) + 2 * Half + i % 2], y = fmaf(x, kLog2e, -row.reference), e = exp2_mufu(y);
      part[i % 4] += e;
      if (all) one[i % 2] = fmaf(e, y, one[i % 2]), two[i % 2] = fmaf(e * y, y, two[i % 2]), above += x > row.threshold;
    }
    sum = row.sum + ((part[0] + part[1]) + (part[2] + part[3]));
    if (all) first = row.first + (one[0] + one[1]), second = row.second + (two[0] + two[1]);
  }
  const float limit = all ? fminf(64.f * row.sum, 0x1p100f) : 0x1p100f;
  if (!(sum < limit)) {  // first tile, a new scale, or NaN
    float top = kUnset;
#pragma unroll
    for (int i = 0; i < 64; ++i) top = fmaxf(top, d[4 * (i / 2) + 2 * Half + i % 2]);
    move_reference<task>(row, fmaxf(top * kLog2e, row.reference));
    float part[2] = {0.f, 0.f}, one = 0.f, two = 0.f;
    above = 0.f;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const float x = d[4 * (i / 2) + 2 * Half + i % 2], y = fmaf(x, kLog2e, -row.reference), e = exp2_mufu(y);
      part[i % 2] += e;
      if (all) one = fmaf(e, y, one), two = fmaf(e * y, y, two), above += x > row.threshold;
    }
    sum = row.sum + (part[0] + part[1]);
    if (all) first = row.first + one, second = row.second + two;
  }
  row.sum = sum;
  if (all) row.first = first, row.second = second, row.above += above;
}

// Adds `more`, the row's kept exponentials of this tile, if that is safe; otherwise the sum goes its own way, relative
// to a maximum.
template <int Half>
__device__ __forceinline__ void add_kept(const float (&d)[128], bool first_tile, float kept, float more, Row& row) {
  const float next = row.sum + more;
  if (row.reference == kept && next > 0x1p-60f && next < 0x1p100f) {
    row.sum = next;
  } else {
    if (first_tile) row.reference = kUnset;
    add_row<Task::kept_statistics, Half>(d, first_tile || row.reference == kept, row);
  }
}

// Stores the logit of column `at` (8 j + {0, 1} if this thread holds it; anything else otherwise).
template <int Half> __device__ __forceinline__ void pick_target(const float (&d)[128], unsigned at, float* out) {
  if (at >= kColumns || (at & 6)) return;
  float x = 0.f;
#pragma unroll
  for (int j = 0; j < 32; ++j)
    if (at >> 3 == j) x = at & 1 ? d[4 * j + 2 * Half + 1] : d[4 * j + 2 * Half];
  *out = x;
}

// ---------------------------------------------------------------- tiles

// The exponent that a row's kept exponentials are taken relative to. It must be known before the sweep; rows for which
// it turns out to be too far from the maximum are written again (hopper_kept.cu).
__device__ __forceinline__ float kept_reference(float target_logit) { return fmaxf(target_logit * kLog2e, 0.f); }

struct GradientRow {
  float factor = 0.f;  // -coefficient * scale / total
  float reference = 0.f;  // base 2
  float at_target = 0.f;  // what stands at the target
  unsigned at = kColumns;  // target column relative to this thread's, in the tile
};

// value(half, logit, column) for the two rows (half) that a thread holds; column is relative to this thread's first,
// known at compile time

template <bool Headed> struct KeptValue {
  const float reference0, reference1;
  const Head& head;
  float (&sum)[4];
  __device__ __forceinline__ float operator()(int half, float logit, int column) {
    const float e = exp2_mufu(fmaf(logit, kLog2e, -(half ? reference1 : reference0)));
    sum[2 * half + column % 2] += e;
    return Headed ? e * head.slope(logit) : e;
  }
};

template <bool Headed, bool HasTarget> struct GradientValue {
  const GradientRow &row0, &row1;
  const Head& head;
  __device__ __forceinline__ float operator()(int half, float logit, int column) {
    const GradientRow& row = half ? row1 : row0;
    const float g = row.factor * exp2_mufu(fmaf(logit, kLog2e, -row.reference));
    const float value = Headed ? g * head.slope(logit) : g;
    return HasTarget && row.at == (unsigned)column ? row.at_target : value;
  }
};

// Columns 64 Q .. 64 Q + 63 of the tile as T into a staging buffer (rows of 128 bytes, 128-byte swizzle).
template <class T, int Q, class Value>
__device__ __forceinline__ void stage(const float (&d)[128], uint32_t buffer, Value value) {
  const int lane = threadIdx.x & 31, matrix = lane >> 3;
  const int row = (threadIdx.x >> 5 & 3) * 16 + (matrix & 1) * 8 + (lane & 7);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t q[4];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int j = 8 * Q + 2 * i + b;
      const float e0 = value(0, d[4 * j], 8 * j), e1 = value(0, d[4 * j + 1], 8 * j + 1);
      const float e2 = value(1, d[4 * j + 2], 8 * j), e3 = value(1, d[4 * j + 3], 8 * j + 1);
      q[2 * b] = pack<T>(e0, e1);
      q[2 * b + 1] = pack<T>(e2, e3);
    }
    store_matrices(buffer + row * 128 + ((2 * i + (matrix >> 1)) ^ (row & 7)) * 16, q);
  }
}

// The same, and off to memory, two buffers of the warpgroup in turn.
template <class T, int Q, class Value>
__device__ __forceinline__ void write_quarter(const float (&d)[128], int wg, uint32_t buffers, const CUtensorMap* map,
                                              int column, int row, Value value) {
  const bool leader = (threadIdx.x & 127) == 0;
  const uint32_t buffer = buffers + (Q & 1) * kBytesOut;
  if (leader) store_wait<1>();
  named_sync<128>(1 + wg);
  stage<T, Q>(d, buffer, value);
  fence_for_copies();
  named_sync<128>(1 + wg);
  if (leader) store_tile(map, column + 64 * Q, row, buffer);
}

template <class T, class Value>
__device__ __forceinline__ void write_tile(const float (&d)[128], int wg, uint32_t buffers, const CUtensorMap* map,
                                           int column, int row, Value value) {
  write_quarter<T, 0>(d, wg, buffers, map, column, row, value);
  write_quarter<T, 1>(d, wg, buffers, map, column, row, value);
  write_quarter<T, 2>(d, wg, buffers, map, column, row, value);
  write_quarter<T, 3>(d, wg, buffers, map, column, row, value);
}

}  // namespace
}  // namespace pyunlearn
