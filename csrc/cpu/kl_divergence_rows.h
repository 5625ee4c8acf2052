// The row kernels of kl_divergence.h, on vectors.
#pragma once
#include "../kl_divergence.h"
#include "vector.h"

namespace pyunlearn {
namespace PYUNLEARN_VARIANT {

// The logits of both, from their raw products. bias pointers: as for every row kernel.
template <class real> struct PairRow {
  const LogitPair& pair;
  const real *bias, *reference_bias;
  int64_t row, target;
  real* scratch;  // 2 kTile of real

  PYUNLEARN_INLINE const real* model(int64_t begin, int64_t n) const {
    return logits(pair.model, bias, row, begin, n, scratch);
  }
  PYUNLEARN_INLINE const real* reference(int64_t begin, int64_t n) const {
    real* const mine = scratch + kTile;
    const real* y = logits(pair.reference, reference_bias, row, begin, n, mine);
    if (pair.target_shift == 0 || target < begin || target >= begin + n) return y;
    if (y != mine) __builtin_memcpy(mine, y, n * sizeof *y);
    mine[target - begin] -= static_cast<real>(pair.target_shift);
    return mine;
  }
};

struct Crossed { double sum = 0, reference_sum = 0, cross = 0; };

template <class real>
PYUNLEARN_NOINLINE void add_crossed(const real* z, const real* y, int64_t n, real m, real mq, Crossed& to) {
  V<real> sum{}, reference_sum{}, cross{};
  const V<real> none{};
  for (int64_t i = 0; i < n; i += kLanes<real>) {
    const V<real> tz = load(z + i) - m, ty = load(y + i) - mq;
    V<real> s, q;
    split_exp<real>(tz, s, q);
    sum += s * q + s;
    split_exp<real>(ty, s, q);
    const V<real> e = s * q + s;
    reference_sum += e;
    cross += e == none ? none : e * (ty - tz);  // 0 where the reference has no mass, whatever the model has
  }
  for (int64_t i = 0; i < kLanes<real>; ++i) {
    to.sum += sum[i];
    to.reference_sum += reference_sum[i];
    to.cross += cross[i];
  }
}

template <class real> void kl_statistics_row(const KlStatisticsArguments& a, const PairRow<real>& row) {
  const int64_t r = row.row, columns = a.pair.model.columns;
  real m = -kInfinity<real>, mq = -kInfinity<real>;
  for_tiles(columns, [&](int64_t begin, int64_t n) {
    m = maximum(row.model(begin, n), n, m);
    mq = maximum(row.reference(begin, n), n, mq);
  });
  real &top = row_value<real>(a.maximum, r), &reference_top = row_value<real>(a.reference_maximum, r);
  // about the new maxima at once: there is only one place where the old sums have to be moved
  const real now = m > top ? m : top, reference_now = mq > reference_top ? mq : reference_top;
  Crossed block;
  for_tiles(columns, [&](int64_t begin, int64_t n) {
    add_crossed(row.model(begin, n), row.reference(begin, n), n, reference_of(now), reference_of(reference_now), block);
  });
  real &sum = row_value<real>(a.sum, r), &reference_sum = row_value<real>(a.reference_sum, r),
       &cross = row_value<real>(a.cross, r);
  const double d = static_cast<double>(top) - reference_of(now),
               dq = static_cast<double>(reference_top) - reference_of(reference_now);
  const double e = top == -kInfinity<real> ? 0 : __builtin_exp(d);
  // as within a block
  const double eq = reference_top == -kInfinity<real> || dq < Lanes<real>::low ? 0 : __builtin_exp(dq);
  // cross may be infinite
  const double before = reference_sum == 0 || eq == 0 ? 0 : eq * (cross + (dq - d) * reference_sum);
  cross = static_cast<real>(before + block.cross);
  sum = static_cast<real>(e * sum + block.sum);
  reference_sum = static_cast<real>(eq * reference_sum + block.reference_sum);
  top = now;
  reference_top = reference_now;
}

// out = factor * p * slope - reference_factor * q * slope, with p = exp(z - m) and q = exp(y - mq); out may be z.
template <class real>
PYUNLEARN_NOINLINE void difference(const real* z, const real* y, int64_t n, real m, real mq, real factor,
                                   real reference_factor, real cap, real* out) {
  const real inverse = cap > 0 ? 1 / cap : 0;
  for (int64_t i = 0; i < n; i += kLanes<real>) {
    const V<real> x = load(z + i);
    V<real> s, q;
    split_exp<real>(x - m, s, q);
    V<real> g = (s * q + s) * factor;
    split_exp<real>(load(y + i) - mq, s, q);
    g -= (s * q + s) * reference_factor;
    if (cap > 0) g *= 1 - (x * inverse) * (x * inverse);
    store(out + i, g);
  }
}

template <class real>
void kl_gradient_row(const KlGradientArguments& a, const PairRow<real>& row, real* result_buffer) {
  const LogitBlock& b = a.pair.model;
  const int64_t r = row.row;
  char* const out = at(a.out.data, a.out.dtype, r * a.out.stride);
  const double coefficient = row_value<real>(a.coefficients, r) * b.scale;
  if (row_value<real>(a.coefficients, r) == 0) {
    __builtin_memset(out, 0, b.columns * size_of(a.out.dtype));
    return;
  }
  const real m = reference_of(row_value<real>(a.maximum, r)),
             mq = reference_of(row_value<real>(a.reference_maximum, r));
  const real factor = static_cast<real>(coefficient / row_value<real>(a.sum, r));
  const real reference_factor = static_cast<real>(coefficient / row_value<real>(a.reference_sum, r));
  for_tiles(b.columns, [&](int64_t begin, int64_t n) {
    char* const to = at(out, a.out.dtype, begin);
    const bool direct = is_whole<real>(a.out.dtype, n);
    real* const result = direct ? reinterpret_cast<real*>(to) : result_buffer;
    difference(row.model(begin, n), row.reference(begin, n), n, m, mq, factor, reference_factor,
               static_cast<real>(b.softcap), result);
    if (!direct) narrow(a.out.dtype, result, n, to);
  });
}

template <class real, class Arguments, class Row>
PYUNLEARN_INLINE void each_pair(const Arguments& a, const void* bias, const void* reference_bias, int64_t begin,
                                int64_t end, Row&& one) {
  alignas(64) real scratch[3 * kTile] = {};
  for (int64_t r = begin; r < end; ++r) {
    const PairRow<real> row{a.pair, static_cast<const real*>(bias), static_cast<const real*>(reference_bias),
                            r,      target_column(a.pair.model, r), scratch};
    one(row, scratch + 2 * kTile);
  }
}
template <class real>
void kl_statistics(const KlStatisticsArguments& a, const void* bias, const void* reference_bias, int64_t begin,
                   int64_t end) {
  each_pair<real>(a, bias, reference_bias, begin, end,
                  [&](const PairRow<real>& row, real*) { kl_statistics_row(a, row); });
}
template <class real>
void kl_gradient(const KlGradientArguments& a, const void* bias, const void* reference_bias, int64_t begin,
                 int64_t end) {
  each_pair<real>(a, bias, reference_bias, begin, end,
                  [&](const PairRow<real>& row, real* buffer) { kl_gradient_row(a, row, buffer); });
}

}  // namespace PYUNLEARN_VARIANT
}  // namespace pyunlearn
