// Every CPU kernel on memory that ends where its arrays end, with awkward sizes, strides and alignments, for the
// sanitizers; the sums against plain loops. Prints the number of calls; exit code 1 at a wrong number.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "bf16_products.h"
#include "cpu/parallel.h"
#include "cpu/variant.h"
#include "kl_divergence.h"
#include "log_likelihood.h"
#include "token_statistics.h"

using namespace pyunlearn;

namespace {

int calls = 0;
uint32_t state = 1;

uint32_t draw() { return state = state * 1664525u + 1013904223u; }
void fail(const char* what) {
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}
void done(const char* why) {
  if (why) fail(why);
  ++calls;
}

size_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// rows x columns of numbers of size 0.25 to 4, in memory of its own that begins `offset` elements late and ends with
// the last row.
struct Matrix {
  Dtype dtype;
  int64_t rows, columns, stride, offset;
  std::vector<uint8_t> memory;
  Matrix(Dtype t, int64_t r, int64_t c, int64_t more = 0)
      : dtype(t), rows(r), columns(c), stride(c + more), offset(more ? 1 : 0),
        memory(bytes_of(t) * (offset + (r - 1) * stride + c)) {
    for (int64_t i = 0; i < (int64_t)(memory.size() / bytes_of(t)); ++i) {
      const uint32_t bits = draw(), sign = bits >> 31, exponent = bits >> 8 & 3;
      if (t == Dtype::float16) put(i, (uint16_t)(sign << 15 | (13 + exponent) << 10 | (bits >> 12 & 1023)));
      else {
        const float x = std::ldexp(1.f + (float)(bits >> 12 & 127) / 128, (int)exponent - 2) * (sign ? -1.f : 1.f);
        if (t == Dtype::float64) put(i, (double)x);
        else if (t == Dtype::float32) put(i, x);
        else {
          uint32_t wide;
          std::memcpy(&wide, &x, 4);
          put(i, (uint16_t)(wide >> 16));
        }
      }
    }
  }
  template <class T> void put(int64_t i, T x) { std::memcpy(memory.data() + i * sizeof(T), &x, sizeof(T)); }
#ifdef BROKEN  // for the test that the sanitizers see something
  void shorten() { memory.resize(memory.size() - 1), memory.shrink_to_fit(); }
#endif
  void* data() { return memory.data() + offset * bytes_of(dtype); }
  double at(int64_t r, int64_t c) {  // of float32 and float64
    const uint8_t* p = (uint8_t*)data() + (r * stride + c) * bytes_of(dtype);
    float x;
    double y;
    if (dtype == Dtype::float64) return std::memcpy(&y, p, 8), y;
    return std::memcpy(&x, p, 4), x;
  }
  MatrixOut out() { return {data(), dtype, stride}; }
};

template <class real> std::vector<real> filled(int64_t n, real x) { return std::vector<real>(n, x); }

struct Block {
  Matrix x, bias;
  std::vector<int64_t> targets;
  LogitBlock block;
  Block(Dtype dtype, int64_t rows, int64_t columns, int64_t more, bool headed)
      : x(dtype, rows, columns, more), bias(dtype, 1, columns), targets(rows) {
    for (int64_t r = 0; r < rows; ++r) targets[r] = r % 7 == 3 ? -100 : (int64_t)(draw() % columns) + 5;
    if (rows > 4) targets[4] = INT64_MAX;
    block = {x.data(),
             dtype,
             x.stride,
             rows,
             columns,
             5,
             headed ? bias.data() : nullptr,
             dtype,
             headed ? 0.5 : 1.0,
             headed ? 3.0 : 0.0,
             targets.data()};
  }
};

template <class real> void check_sums(Block& b, const std::vector<real>& maximum, const std::vector<real>& sum) {
  if (b.x.dtype != Dtype::float32 && b.x.dtype != Dtype::float64) return;
  for (int64_t r = 0; r < b.block.rows; ++r) {
    double total = 0;
    for (int64_t c = 0; c < b.block.columns; ++c) {
      double z = b.x.at(r, c);
      if (b.block.bias) z = 3 * std::tanh(0.5 * (z + b.bias.at(0, c)) / 3);
      total += std::exp(z);
    }
    if (!(std::fabs(std::log(total) - (double)maximum[r] - std::log((double)sum[r])) < 1e-4)) fail("a sum");
  }
}

template <class real>
void rows(Dtype dtype, int64_t n, int64_t columns, int64_t more, bool headed, int threads) {
  Block b(dtype, n, columns, more, headed), other(dtype, n, columns, more, headed);
  auto maximum = filled<real>(n, -INFINITY), sum = filled<real>(n, 0), target = filled<real>(n, 0);
  auto top = filled<real>(n, 0), value = filled<real>(n, -1), coefficients = filled<real>(n, 0.5);
  coefficients[0] = 0;
  Matrix kept(dtype, n, columns, more), out(dtype, n, columns);
  done(log_likelihood_statistics_cpu({b.block, maximum.data(), sum.data(), target.data(), kept.out(), top.data()},
                                     threads));
  check_sums(b, maximum, sum);
  GradientArguments g{b.block, false,    maximum.data(), sum.data(), value.data(), coefficients.data(),
                      nullptr, out.out()};
  done(log_likelihood_gradient_cpu(g, threads));
  g.block_maximum = top.data();
  done(log_likelihood_gradient_cpu(g, threads));
  g.is_kept = true, g.block.data = kept.data(), g.block.stride = kept.stride, g.out = kept.out();
  done(log_likelihood_gradient_cpu(g, threads));

  auto first = filled<real>(n, 0), second = filled<real>(n, 0);
  std::vector<int64_t> rank(n, 0);
  std::fill(maximum.begin(), maximum.end(), -INFINITY), std::fill(sum.begin(), sum.end(), 0);
  done(token_statistics_cpu(
      {b.block, value.data(), maximum.data(), sum.data(), first.data(), second.data(), target.data(), rank.data()},
      threads));
  check_sums(b, maximum, sum);

  auto maximum2 = filled<real>(n, -INFINITY), sum2 = filled<real>(n, 0), cross = filled<real>(n, 0);
  std::fill(maximum.begin(), maximum.end(), -INFINITY), std::fill(sum.begin(), sum.end(), 0);
  const LogitPair pair{b.block, other.block, 1.0};
  done(kl_statistics_cpu({pair, maximum.data(), sum.data(), maximum2.data(), sum2.data(), cross.data()}, threads));
  check_sums(b, maximum, sum);
  done(kl_gradient_cpu({pair, maximum.data(), sum.data(), maximum2.data(), sum2.data(), coefficients.data(), out.out()},
                       threads));

  Matrix hidden(dtype, n, columns, more), weight(dtype, 11, columns, more);
  std::vector<double> product(n), size(n);
  done(target_products_cpu({hidden.data(), weight.data(), dtype, n, columns, 11, hidden.stride, weight.stride,
                            b.targets.data(), product.data(), size.data()},
                           threads));
  for (int64_t r = 0; r < n; ++r)
    if (!(std::fabs(product[r]) <= size[r] * (1 + 1e-9))) fail("a target's product");
}

float wide(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// out (m, n) = a (m, k) times b (n, k) transposed; then a gradient's, out (m, n) = a (m, k) times b (k, n)
void products(int64_t m, int64_t n, int64_t k, int64_t more, int threads) {
  const char* which = bf16_products();
  if (!which) return;
  Matrix a(Dtype::bfloat16, m, k, more), b(Dtype::bfloat16, n, k, more), out(Dtype::float32, m, n, more);
  auto *p = (uint16_t*)a.data(), *q = (uint16_t*)b.data();
  done(bf16_product_cpu({p, q, a.stride, b.stride, (float*)out.data(), out.stride, m, n, k}, threads));
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < n; ++c) {
      double exact = 0;
      for (int64_t i = 0; i < k; ++i) exact += (double)wide(p[r * a.stride + i]) * wide(q[c * b.stride + i]);
      if (!(std::fabs(out.at(r, c) - exact) < 1e-3 * std::sqrt((double)k))) fail("a bf16 product");
    }
  if (std::strcmp(which, "amx_bf16")) return;
  for (int form = 0; form < 4; ++form) {
    const bool transposed = form & 1, rounds = form & 2;
    Matrix left(Dtype::bfloat16, transposed ? k : m, transposed ? m : k, more), right(Dtype::bfloat16, k, n, more);
    Matrix to(rounds ? Dtype::bfloat16 : Dtype::float32, m, n, more);
    done(bf16_gradient_cpu({(uint16_t*)left.data(), (uint16_t*)right.data(), left.stride, right.stride, transposed,
                            to.data(), to.stride, rounds, !rounds, m, n, k},
                           threads));
  }
}

}  // namespace

int main() {
#ifdef BROKEN
  int count = 0;
  parallel_rows(64, 1 << 20, 4, [&](int64_t begin, int64_t end) { count += (int)(end - begin); });
  Block b(Dtype::float32, 5, 17, 0, false);
  b.x.shorten(), b.block.data = b.x.data();
  std::vector<float> maximum(5), sum(5), target(5);
  done(log_likelihood_statistics_cpu({b.block, maximum.data(), sum.data(), target.data(), {}, nullptr}, 1));
#endif
  for (int threads : {1, 4})
    for (int64_t more : {0, 3}) {
      // the second is enough for several threads
      for (auto [n, columns] : {std::pair<int64_t, int64_t>{3, 1}, {70, 515}, {5, 17}, {9, 64}, {6, 1003}})
        for (bool headed : {false, true}) {
          rows<double>(Dtype::float64, n, columns, more, headed, threads);
          for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
            rows<float>(dtype, n, columns, more, headed, threads);
        }
      for (auto [m, n, k] :
           {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {33, 50, 70}, {70, 300, 576}, {17, 515, 33}})
        products(m, n, k, more, threads);
    }
  std::printf("%s, %s: %d calls\n", cpu_kernels().name, bf16_products() ? bf16_products() : "none", calls);
}
