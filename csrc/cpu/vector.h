// Vectors of floats or doubles, exp and tanh on them, the narrow types, and how a row of logits is read in tiles: what
// the row kernels are made of. Included once per instruction set by variant.h, inside no namespace.
//
// Nothing inline from outside the variant's namespace (std:: templates and <cmath> included) may be used here: the
// linker keeps one copy of such a function, and the portable variant could be given the AVX-512 one.
#pragma once
#include "../log_likelihood.h"

#define PYUNLEARN_INLINE inline __attribute__((always_inline))
#define PYUNLEARN_NOINLINE __attribute__((noinline))

namespace pyunlearn {
namespace PYUNLEARN_VARIANT {

constexpr int64_t kTile = 512;  // columns at a time: short enough for sums of real, and in L1 between the steps
constexpr int64_t kRowBytes = 32768;  // a row of transformed logits up to this size is kept between its two passes

template <class real> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(PYUNLEARN_VECTOR_BYTES)));
  typedef uint32_t B __attribute__((vector_size(PYUNLEARN_VECTOR_BYTES)));
  static constexpr Dtype dtype = Dtype::float32;
  static constexpr float magic = 0x1.8p23f, low = -88, high = 88;
  // the high part times any exponent is exact
  static constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
  static constexpr int mantissa = 23;
  static constexpr uint32_t exponent_bias = 127;
  static constexpr int terms = 5;
  // Chebyshev fit of (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, from the highest power down.
  static constexpr float polynomial[terms] = {0x1.6d117cp-10f, 0x1.120be2p-7f, 0x1.555518p-5f, 0x1.5554dcp-3f, 0.5f};
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(PYUNLEARN_VECTOR_BYTES)));
  typedef uint64_t B __attribute__((vector_size(PYUNLEARN_VECTOR_BYTES)));
  static constexpr Dtype dtype = Dtype::float64;
  static constexpr double magic = 0x1.8p52, low = -709, high = 709;
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr int mantissa = 52;
  static constexpr uint64_t exponent_bias = 1023;
  static constexpr int terms = 10;
  static constexpr double polynomial[terms] = {
      0x1.af390ba7e6f47p-26, 0x1.2891d4ffbb0f9p-22, 0x1.71de0d85293b8p-19, 0x1.a019b8ca26fcfp-16, 0x1.a01a01a7cebcdp-13,
      0x1.6c16c1789d1d7p-10, 0x1.11111111109a6p-7,  0x1.5555555553d37p-5,  0x1.5555555555556p-3,  0.5};
};
template <class real> using V = typename Lanes<real>::V;
template <class real> constexpr int64_t kLanes = PYUNLEARN_VECTOR_BYTES / sizeof(real);
template <class real> constexpr int64_t kRow = kRowBytes / sizeof(real);
template <class real> constexpr real kInfinity = static_cast<real>(__builtin_inf());

template <class real> struct Scratch { alignas(64) real row[kRow<real>] = {}, tile[kTile] = {}; };

template <class real> PYUNLEARN_INLINE V<real> load(const real* p) {
  V<real> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class real> PYUNLEARN_INLINE void store(real* p, V<real> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class real> PYUNLEARN_INLINE V<real> splat(real x) { return V<real>{} + x; }

// t = n ln 2 + r with |r| <= ln 2 / 2, s = 2^n, q = e^r - 1: so e^t = s + s q, and e^t - 1 = s q + (s - 1) keeps its
// digits near t = 0. Below low s is 0, exactly (e^t is never subnormal), above high e^t is e^high, and a NaN passes
// through q.
template <class real> PYUNLEARN_INLINE void split_exp(V<real> t, V<real>& s, V<real>& q) {
  using L = Lanes<real>;
  using B = typename L::B;
  const V<real> low = splat(L::low), high = splat(L::high);
  t = low > t ? low : t;  // in this order a comparison with NaN keeps the NaN
  t = high < t ? high : t;
  const V<real> k = t * static_cast<real>(1.4426950408889634) + L::magic;  // n, rounded into the low bits of k
  const V<real> n = k - L::magic;
  const V<real> r = (t - n * L::ln2_high) - n * L::ln2_low;
  V<real> p = splat(L::polynomial[0]);
  for (int i = 1; i < L::terms; ++i) p = p * r + L::polynomial[i];
  q = (p * r) * r + r;
  B bits;
  __builtin_memcpy(&bits, &k, sizeof bits);
  bits = (bits + L::exponent_bias) << L::mantissa;
  __builtin_memcpy(&s, &bits, sizeof bits);
}

template <class real> PYUNLEARN_INLINE V<real> tanh_lanes(V<real> y) {
  const V<real> a = y < 0 ? -y : y;
  V<real> s, q;
  split_exp<real>(a * -2, s, q);
  const V<real> m = s * q + (s - 1);  // expm1(-2 |y|)
  const V<real> t = m / (m + 2);  // -tanh |y|
  return y < 0 ? t : -t;
}

// ---- narrow types ----

PYUNLEARN_INLINE uint32_t bits_of(float x) {
  uint32_t b;
  __builtin_memcpy(&b, &x, sizeof b);
  return b;
}
PYUNLEARN_INLINE float float_of(uint32_t b) {
  float x;
  __builtin_memcpy(&x, &b, sizeof x);
  return x;
}
PYUNLEARN_INLINE float from_bfloat16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
PYUNLEARN_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t b = bits_of(x), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16, quiet = (b >> 16) | 0x40;
  return static_cast<uint16_t>((b & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}
PYUNLEARN_INLINE float from_float16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fff, sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23);
  const uint32_t small = 0u - (magnitude < 0x400);  // a mask: GCC would turn a choice into a branch and not vectorise
  return float_of((subnormal & small) | (normal & ~small) | sign);
}
PYUNLEARN_INLINE uint16_t to_float16(float x) {
  const uint32_t b = bits_of(x), a = b & 0x7fffffff;
  const uint32_t normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;  // rounds up into infinity by itself
  // 0.5f's last place is the subnormals' unit
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);
  uint32_t h = a < (113u << 23) ? subnormal : normal;
  h = a >= (143u << 23) ? 0x7c00u : h;
  h = a > 0x7f800000 ? 0x7e00u : h;
  return static_cast<uint16_t>(h | ((b >> 16) & 0x8000));
}

PYUNLEARN_NOINLINE void widen(Dtype dtype, const void* from, int64_t n, float* __restrict to) {
  const uint16_t* __restrict h = static_cast<const uint16_t*>(from);
  if (dtype == Dtype::bfloat16)
    for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(h[i]);
  else if (dtype == Dtype::float16)
    for (int64_t i = 0; i < n; ++i) to[i] = from_float16(h[i]);
  else __builtin_memcpy(to, from, n * sizeof *to);
}
PYUNLEARN_NOINLINE void narrow(Dtype dtype, const float* __restrict from, int64_t n, void* to) {
  uint16_t* __restrict h = static_cast<uint16_t*>(to);
  if (dtype == Dtype::bfloat16)
    for (int64_t i = 0; i < n; ++i) h[i] = to_bfloat16(from[i]);
  else if (dtype == Dtype::float16)
    for (int64_t i = 0; i < n; ++i) h[i] = to_float16(from[i]);
  else __builtin_memcpy(to, from, n * sizeof *from);
}
PYUNLEARN_INLINE void widen(Dtype, const void* from, int64_t n, double* to) {
  __builtin_memcpy(to, from, n * sizeof *to);
}
PYUNLEARN_INLINE void narrow(Dtype, const double* from, int64_t n, void* to) {
  __builtin_memcpy(to, from, n * sizeof *from);
}

PYUNLEARN_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
PYUNLEARN_INLINE char* at(const void* data, Dtype dtype, int64_t index) {
  return const_cast<char*>(static_cast<const char*>(data)) + index * size_of(dtype);
}

// Vector loops read and write whole vectors. A tile whose width is not a multiple of the lanes must therefore lie in
// scratch memory.
template <class real>
PYUNLEARN_INLINE bool is_whole(Dtype dtype, int64_t n) {
  return dtype == Lanes<real>::dtype && n % kLanes<real> == 0;
}

// ---- steps on one tile; not inlined, so that a recomputed block gets its bits from the very code that the kept one
// came from ----

template <class real> PYUNLEARN_NOINLINE void transform(real* x, const real* bias, int64_t n, real scale, real cap) {
  for (int64_t i = 0; i < n; i += kLanes<real>) {
    V<real> u = (load(x + i) + load(bias + i)) * scale;
    if (cap > 0) u = tanh_lanes<real>(u / cap) * cap;
    store(x + i, u);
  }
}

template <class real> PYUNLEARN_NOINLINE real maximum(const real* z, int64_t n, real m) {
  V<real> top = splat(m);
  for (int64_t i = 0; i < n; i += kLanes<real>) {
    const V<real> x = load(z + i);
    top = x > top ? x : top;  // passes over NaN, which the sum reports
  }
  for (int64_t i = 0; i < kLanes<real>; ++i) m = top[i] > m ? top[i] : m;
  return m;
}

// Four sums side by side: a row's largest term is 1, and the fewer small ones are added to it one by one, the less is
// rounded off them.
template <bool writes, bool capped, class real>
PYUNLEARN_INLINE double exp_loop(const real* z, int64_t n, real reference, real cap, real* out) {
  V<real> sum[4] = {};
  const real inverse = capped ? 1 / cap : 0;
  const auto one = [&](int64_t i, V<real>& to) __attribute__((always_inline)) {
    const V<real> x = load(z + i);
    V<real> s, q;
    split_exp<real>(x - reference, s, q);
    V<real> e = s * q + s;
    to += e;
    if (capped) e *= 1 - (x * inverse) * (x * inverse);
    if (writes) store(out + i, e);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes<real> <= n; i += 4 * kLanes<real>)
    for (int k = 0; k < 4; ++k) one(i + k * kLanes<real>, sum[k]);
  for (; i < n; i += kLanes<real>) one(i, sum[i / kLanes<real> % 4]);
  double total = 0;
  for (int k = 0; k < 4; ++k)
    for (int64_t j = 0; j < kLanes<real>; ++j) total += sum[k][j];
  return total;
}
// out, unless null, becomes exp(z - reference) dz/du; returns the sum of exp(z - reference). out may be z.
template <class real>
PYUNLEARN_NOINLINE double exponentials(const real* z, int64_t n, real reference, real cap, real* out) {
  if (!out) return exp_loop<false, false>(z, n, reference, cap, out);
  return cap > 0 ? exp_loop<true, true>(z, n, reference, cap, out) : exp_loop<true, false>(z, n, reference, cap, out);
}

template <class real> PYUNLEARN_NOINLINE void multiply(const real* x, int64_t n, real factor, real* out) {
  for (int64_t i = 0; i < n; i += kLanes<real>) store(out + i, load(x + i) * factor);
}

// n elements of a stored row as real: in place if they can be read there, else copied to buffer and filled up with
// -inf.
template <class real> PYUNLEARN_INLINE const real* read(Dtype dtype, const char* from, int64_t n, real* buffer) {
  if (is_whole<real>(dtype, n)) return reinterpret_cast<const real*>(from);
  widen(dtype, from, n, buffer);
  for (int64_t i = n; i % kLanes<real>; ++i) buffer[i] = -kInfinity<real>;
  return buffer;
}

// The logits z of columns [begin, begin + n) of row r.
template <class real>
const real* logits(const LogitBlock& b, const real* bias, int64_t r, int64_t begin, int64_t n, real* buffer) {
  const char* from = at(b.data, b.dtype, r * b.stride + begin);
  if (!bias) return read(b.dtype, from, n, buffer);
  widen(b.dtype, from, n, buffer);
  transform(buffer, bias + begin, n, static_cast<real>(b.scale), static_cast<real>(b.softcap));
  for (int64_t i = n; i % kLanes<real>; ++i) buffer[i] = -kInfinity<real>;
  return buffer;
}

// exp(z - m) with m = -inf would be NaN where every z is -inf: there z itself serves, which leaves zeros (and NaN where
// z is NaN).
template <class real> PYUNLEARN_INLINE real reference_of(real m) { return m == -kInfinity<real> ? 0 : m; }

template <class real> PYUNLEARN_INLINE real& row_value(const void* values, int64_t r) {
  return static_cast<real*>(const_cast<void*>(values))[r];
}

template <class F> PYUNLEARN_INLINE void for_tiles(int64_t columns, F&& f) {
  for (int64_t begin = 0; begin < columns; begin += kTile) f(begin, columns - begin < kTile ? columns - begin : kTile);
}

// The target's column within the block, or -1.
PYUNLEARN_INLINE int64_t target_column(const LogitBlock& b, int64_t r) {
  const int64_t target = b.targets[r];  // any 64-bit value: compared before it is subtracted from
  return target >= b.first_column && target - b.first_column < b.columns ? target - b.first_column : -1;
}

}  // namespace PYUNLEARN_VARIANT
}  // namespace pyunlearn
