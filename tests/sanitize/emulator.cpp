// Every kernel of csrc/cuda once or twice on the emulator, on small shapes whose memory ends where the arrays end, for
// the sanitizers. Prints the number of calls; exit code 1 at a result that is not finite.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "hopper.h"
#include "kept_backward.h"
#include "kl_divergence.h"
#include "log_likelihood.h"
#include "token_statistics.h"

using namespace pyunlearn;

extern "C" void set_machine(int processors, unsigned seed);

namespace {

int calls = 0;
void done(const char* why) {
  if (why) std::fprintf(stderr, "refused: %s\n", why), std::exit(1);
  ++calls;
}

struct Aligned {  // 16-byte aligned, exactly as long as asked for
  void* p;
  explicit Aligned(size_t bytes) : p(std::aligned_alloc(16, (bytes + 15) / 16 * 16)) { std::memset(p, 0, bytes); }
  ~Aligned() { std::free(p); }
  Aligned(const Aligned&) = delete;
};

uint16_t bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (uint16_t)(bits >> 16);
}

void fill(void* p, int64_t n, float size) {
  static uint32_t state = 1;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    ((uint16_t*)p)[i] = bf16(size * ((float)(state >> 8) / (1 << 23) - 1.f));
  }
}

void hopper(int64_t n, int64_t d, int64_t v, bool headed) {
  const int64_t stride = (v + 7) / 8 * 8;
  Aligned hidden(n * d * 2), weight(v * d * 2), bias(v * 2), kept(n * stride * 2), g(n * stride * 2);
  Aligned workspace(hopper_workspace_bytes(n)), scaled(n * d * 2), product(n * d * 4);
  std::vector<float> like(n), maximum(n), total(n), entropy(n), variance(n), factor(n), c(n, 0.5f);
  std::vector<int64_t> targets(n), rank(n);
  fill(hidden.p, n * d, 1.f), fill(weight.p, v * d, 1.f), fill(bias.p, v, 1.f);
  for (int64_t i = 0; i < n; ++i) targets[i] = i * v / n;
  const HopperInput in{hidden.p,
                       weight.p,
                       Dtype::bfloat16,
                       n,
                       d,
                       v,
                       d,
                       d,
                       headed ? bias.p : nullptr,
                       Dtype::bfloat16,
                       headed ? 0.5 : 1.0,
                       headed ? 3.0 : 0.0,
                       targets.data()};
  done(hopper_statistics(
      in, {like.data(), maximum.data(), total.data(), entropy.data(), variance.data(), rank.data(), nullptr},
      workspace.p, nullptr));
  done(hopper_statistics(in, {like.data(), maximum.data(), total.data(), nullptr, nullptr, nullptr, nullptr},
                         workspace.p, nullptr));
  done(hopper_gradient(in, 0, c.data(), like.data(), maximum.data(), total.data(), g.p, stride, nullptr));
  done(hopper_statistics_kept(in, like.data(), maximum.data(), total.data(), kept.p, stride, factor.data(), workspace.p,
                              nullptr));
  const KeptRows rows{n, d, in.scale, c.data(), factor.data()};
  done(kept_scale_rows(rows, {hidden.p, Dtype::bfloat16, d}, {scaled.p, Dtype::bfloat16, d}, nullptr));
  done(kept_scale_rows(rows, {product.p, Dtype::float32, d}, {scaled.p, Dtype::bfloat16, d}, nullptr));
  for (const auto* all : {&like, &maximum, &total, &entropy, &variance, &factor})
    for (float x : *all)
      if (!std::isfinite(x)) std::fprintf(stderr, "a result is not finite\n"), std::exit(1);
}

void portable(int64_t n, int64_t v, bool headed) {
  std::vector<float> x(n * v), y(n * v), bias(v), out(n * v), kept(n * v), maximum(n, -INFINITY), sum(n), target(n);
  std::vector<float> top(n), maximum2(n, -INFINITY), sum2(n), cross(n), c(n, 0.5f), value(n, -1.f), first(n), second(n);
  std::vector<int64_t> targets(n), rank(n);
  std::vector<double> product(n), size(n);
  for (int64_t i = 0; i < n * v; ++i) x[i] = std::sin((float)i), y[i] = std::cos((float)i);
  for (int64_t i = 0; i < n; ++i) targets[i] = i % v;
  const double scale = headed ? 0.5 : 1.0, softcap = headed ? 3.0 : 0.0;
  const void* b = headed ? bias.data() : nullptr;
  const LogitBlock block{x.data(), Dtype::float32, v, n, v, 0, b, Dtype::float32, scale, softcap, targets.data()};
  LogitBlock other = block;
  other.data = y.data();
  const MatrixOut to{out.data(), Dtype::float32, v}, cache{kept.data(), Dtype::float32, v};
  done(log_likelihood_statistics_cuda({block, maximum.data(), sum.data(), target.data(), cache, top.data()}, nullptr));
  done(log_likelihood_gradient_cuda({block, false, maximum.data(), sum.data(), value.data(), c.data(), top.data(), to},
                                    nullptr));
  std::vector<float> maximum3(n, -INFINITY), sum3(n);
  done(token_statistics_cuda(
      {block, value.data(), maximum3.data(), sum3.data(), first.data(), second.data(), target.data(), rank.data()},
      nullptr));
  const LogitPair pair{block, other, 0.0};
  maximum.assign(n, -INFINITY), sum.assign(n, 0.f);
  done(kl_statistics_cuda({pair, maximum.data(), sum.data(), maximum2.data(), sum2.data(), cross.data()}, nullptr));
  done(kl_gradient_cuda({pair, maximum.data(), sum.data(), maximum2.data(), sum2.data(), c.data(), to}, nullptr));
  done(target_products_cuda(
      {x.data(), y.data(), Dtype::float32, n, v, n, v, v, targets.data(), product.data(), size.data()}, nullptr));
}

}  // namespace

int main() try {
  set_machine(4, 1);
  for (bool headed : {false, true}) {
    hopper(20, 72, 300, headed);
    portable(3, 37, headed);
    portable(2, 2005, headed);
  }
  hopper(130, 1544, 259, false);
  std::printf("%d calls\n", calls);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
