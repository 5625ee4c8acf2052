// The row kernel of token_statistics.h, on vectors.
#pragma once
#include "../token_statistics.h"
#include "vector.h"

namespace pyunlearn {
namespace PYUNLEARN_VARIANT {

struct Moments { double sum = 0, first = 0, second = 0; };

// Adds the tile's moments about m, and counts what lies above the threshold.
template <class real>
PYUNLEARN_NOINLINE int64_t add_moments(const real* z, int64_t n, real m, real threshold, Moments& moments) {
  V<real> sum{}, first{}, second{}, above{};
  const V<real> one = splat<real>(1), none{}, low = splat(Lanes<real>::low);
  for (int64_t i = 0; i < n; i += kLanes<real>) {
    const V<real> x = load(z + i);
    V<real> t = x - m, s, q;
    t = low > t ? low : t;  // there exp is 0, and 0 times -inf would be NaN
    split_exp<real>(t, s, q);
    const V<real> e = s * q + s, et = e * t;
    sum += e;
    first += et;
    second += et * t;
    above += x > threshold ? one : none;  // at most kTile: exact
  }
  int64_t count = 0;
  for (int64_t i = 0; i < kLanes<real>; ++i) {
    moments.sum += sum[i];
    moments.first += first[i];
    moments.second += second[i];
    count += static_cast<int64_t>(above[i]);
  }
  return count;
}

// Moves moments about some maximum to one that lies -d above it.
PYUNLEARN_INLINE Moments moved(const Moments& a, double d) {
  if (d == -__builtin_inf()) return {};  // there was nothing yet
  const double e = __builtin_exp(d);
  return {e * a.sum, e * (a.first + d * a.sum), e * (a.second + 2 * d * a.first + d * d * a.sum)};
}

template <class real>
void token_statistics_row(const TokenStatisticsArguments& a, const real* bias, int64_t r, Scratch<real>& scratch) {
  const LogitBlock& b = a.block;
  const int64_t target = target_column(b, r);
  const real threshold = row_value<real>(a.threshold, r);
  int64_t above = 0;
  if (target >= 0) {
    const real z = *logits(b, bias, r, target, 1, scratch.tile);
    row_value<real>(a.target_logit, r) = z;
    above -= z > threshold;  // the target itself does not count
  }
  const bool fits = b.columns <= kRow<real>;
  real m = -kInfinity<real>;
  for_tiles(b.columns, [&](int64_t begin, int64_t n) {
    m = maximum(logits(b, bias, r, begin, n, scratch.row + (fits ? begin : 0)), n, m);
  });

  Moments block;
  for_tiles(b.columns, [&](int64_t begin, int64_t n) {
    const bool in_place = !bias && is_whole<real>(b.dtype, n);
    const real* z = fits && !in_place ? scratch.row + begin : logits(b, bias, r, begin, n, scratch.row);
    above += add_moments(z, n, reference_of(m), threshold, block);
  });

  a.rank[r] += above;
  real &top = row_value<real>(a.maximum, r), &sum = row_value<real>(a.sum, r), &first = row_value<real>(a.first, r);
  real& second = row_value<real>(a.second, r);
  const double before = top, now = m > before ? m : before;
  const Moments old = moved({sum, first, second}, before - now);
  const Moments add = m == -kInfinity<real> ? block : moved(block, m - now);  // without a maximum: zeros, or NaN
  if (now == -kInfinity<real>) {
    sum += static_cast<real>(block.sum);
    return;
  }
  sum = static_cast<real>(old.sum + add.sum);
  first = static_cast<real>(old.first + add.first);
  second = static_cast<real>(old.second + add.second);
  top = static_cast<real>(now);
}

template <class real>
void token_statistics(const TokenStatisticsArguments& a, const void* bias, int64_t begin, int64_t end) {
  Scratch<real> scratch;
  for (int64_t r = begin; r < end; ++r) token_statistics_row(a, static_cast<const real*>(bias), r, scratch);
}

}  // namespace PYUNLEARN_VARIANT
}  // namespace pyunlearn
