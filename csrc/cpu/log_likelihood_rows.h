// The row kernels of log_likelihood.h, on vectors.
#pragma once
#include "vector.h"

namespace pyunlearn {
namespace PYUNLEARN_VARIANT {

template <class real>
void statistics_row(const StatisticsArguments& a, const real* bias, int64_t r, Scratch<real>& scratch) {
  const LogitBlock& b = a.block;
  const int64_t target = target_column(b, r);
  // before kept overwrites it
  if (target >= 0) row_value<real>(a.target_logit, r) = *logits(b, bias, r, target, 1, scratch.tile);

  const bool fits = b.columns <= kRow<real>;
  real m = -kInfinity<real>;
  for_tiles(b.columns, [&](int64_t begin, int64_t n) {
    m = maximum(logits(b, bias, r, begin, n, scratch.row + (fits ? begin : 0)), n, m);
  });

  double sum = 0;
  for_tiles(b.columns, [&](int64_t begin, int64_t n) {
    const bool in_place = !bias && is_whole<real>(b.dtype, n);
    const real* z = fits && !in_place ? scratch.row + begin : logits(b, bias, r, begin, n, scratch.row);
    if (!a.kept.data) {
      sum += exponentials<real>(z, n, reference_of(m), 0, nullptr);
      return;
    }
    char* kept = at(a.kept.data, a.kept.dtype, r * a.kept.stride + begin);
    const bool direct = is_whole<real>(a.kept.dtype, n);
    sum += exponentials(z, n, reference_of(m), static_cast<real>(b.softcap),
                        direct ? reinterpret_cast<real*>(kept) : scratch.tile);
    if (!direct) narrow(a.kept.dtype, scratch.tile, n, kept);
  });

  if (a.block_maximum) row_value<real>(a.block_maximum, r) = m;
  real &maximum_so_far = row_value<real>(a.maximum, r), &sum_so_far = row_value<real>(a.sum, r);
  if (m == -kInfinity<real>) {
    sum_so_far += static_cast<real>(sum);  // 0, or NaN
    return;
  }
  const double before = maximum_so_far, now = m > before ? m : before;
  sum_so_far = static_cast<real>(sum_so_far * __builtin_exp(before - now) + sum * __builtin_exp(m - now));
  maximum_so_far = static_cast<real>(now);
}

template <class real>
void gradient_row(const GradientArguments& a, const real* bias, int64_t r, Scratch<real>& scratch) {
  const LogitBlock& b = a.block;
  char* const out = at(a.out.data, a.out.dtype, r * a.out.stride);
  const double coefficient = row_value<real>(a.coefficients, r) * b.scale;
  if (row_value<real>(a.coefficients, r) == 0) {
    __builtin_memset(out, 0, b.columns * size_of(a.out.dtype));
    return;
  }
  const double maximum = row_value<real>(a.maximum, r), sum = row_value<real>(a.sum, r);
  const real m = a.block_maximum ? row_value<real>(a.block_maximum, r) : row_value<real>(a.maximum, r);
  const real reference = reference_of(m);
  const real factor = static_cast<real>(-coefficient * (a.block_maximum ? __builtin_exp(m - maximum) : 1) / sum);
  const bool rounds = a.block_maximum && a.out.dtype != Lanes<real>::dtype;

  for_tiles(b.columns, [&](int64_t begin, int64_t n) {
    char* const to = at(out, a.out.dtype, begin);
    const bool direct = is_whole<real>(a.out.dtype, n);
    real* const result = direct ? reinterpret_cast<real*>(to) : scratch.tile;
    const real* e = result;
    if (a.is_kept) {
      e = read(b.dtype, at(b.data, b.dtype, r * b.stride + begin), n, scratch.row);
    } else {
      exponentials(logits(b, bias, r, begin, n, scratch.row), n, reference, static_cast<real>(b.softcap), result);
      if (rounds) {  // never direct; to serves as the narrow copy
        narrow(a.out.dtype, scratch.tile, n, to);
        widen(a.out.dtype, to, n, scratch.tile);
      }
    }
    multiply(e, n, factor, result);
    if (!direct) narrow(a.out.dtype, scratch.tile, n, to);
  });

  const int64_t target = target_column(b, r);
  if (target < 0) return;
  const double log_likelihood = row_value<real>(a.log_likelihood, r);
  const double tanh = b.softcap > 0 ? (log_likelihood + __builtin_log(sum) + maximum) / b.softcap : 0;
  const real at_target = static_cast<real>(coefficient * -__builtin_expm1(log_likelihood) * (1 - tanh * tanh));
  narrow(a.out.dtype, &at_target, 1, at(out, a.out.dtype, target));
}

template <class real>
void log_likelihood_statistics(const StatisticsArguments& a, const void* bias, int64_t begin, int64_t end) {
  Scratch<real> scratch;
  for (int64_t r = begin; r < end; ++r) statistics_row(a, static_cast<const real*>(bias), r, scratch);
}
template <class real>
void log_likelihood_gradient(const GradientArguments& a, const void* bias, int64_t begin, int64_t end) {
  Scratch<real> scratch;
  for (int64_t r = begin; r < end; ++r) gradient_row(a, static_cast<const real*>(bias), r, scratch);
}

}  // namespace PYUNLEARN_VARIANT
}  // namespace pyunlearn
