// One CTA: two consumer warpgroups (64 rows x 256 vocabulary columns each, accumulators in registers) and one producer
// warpgroup (one thread that starts the loads; its spare warps take the exact target dot products). Two CTAs form a
// cluster: they own 128 rows each of a 256-row pair and share every weight tile, each loading one half of it for both
// (multicast).
#pragma once
#include "epilogue.cuh"

namespace pyunlearn {
namespace {

struct Pointers {
  const void *h, *w;
  int64_t ld_h, ld_w;
  int d;
  const int64_t* target;
  const float* threshold;  // all statistics: the logit to exceed to be counted; null: the target's
  Head head;
  float2* partial;       // statistics: [first tile][row] reference exponent (base 2) and sum
  float4* partial_more;  // all statistics: first and second moment, and count of columns above the target
  float* target_tile;    // statistics: target logit as the WGMMA summed it
  float* target_exact;   // statistics: target logit as an fp32 dot product
  // gradient; without coefficients, in place of -coefficient * scale, 1: the softmax, less 1 at the target
  const float *coefficients, *log_likelihood, *maximum, *total;
  const int* only;  // gradient: null, or which row pairs to do (Walk)
  int* repair;      // kept statistics: the row pairs whose exponentials left the range, written in the form of only
  __nv_bfloat16* kept;
  int64_t ld_kept;

  // For rows whose target is in the vocabulary: the others have neither a threshold nor a rank. Not below what stands
  // for -inf, so that columns beyond v and impossible tokens never count.
  __device__ __forceinline__ float threshold_of(int row) const {
    return fmaxf(threshold ? threshold[row] : target_exact[row], kUnset);
  }
};

template <Task task, int Depth>
__device__ __forceinline__ void produce(const CUtensorMap& map_h, const CUtensorMap& map_w, const Plan& plan,
                                        uint32_t base, uint32_t rank, int cluster, const int* only) {
  using Ring = Pipeline<task, Depth>;
  int stage = 0;
  uint32_t phase = 0;
  for (Walk<task> walk(plan, cluster, only); walk.next();) {
    const int row = (walk.pair * kCluster + rank) * kRows;
    for (int tile = walk.tile; tile < plan.v_tiles; tile += walk.step)
      for (int k = 0; k < plan.k_steps; ++k) {
        const uint32_t h = base + stage * Ring::stage_bytes, w = h + Ring::h_bytes, bar = base + Ring::full + 8 * stage;
        barrier_wait(base + Ring::empty + 8 * stage, phase ^ 1);
        // its own hidden tile, its half of the weight tile and the other CTA's half
        barrier_expect(bar, Ring::stage_bytes);
        load_tile(h, &map_h, k * Depth, row, bar);
        load_tile_to_both(w + rank * (Ring::w_bytes / 2), &map_w, k * Depth, tile * kColumns + rank * (kColumns / 2),
                          bar);
        if (++stage == Ring::stages) stage = 0, phase ^= 1;
      }
  }
}

// Target logits as fp32 dot products, one warp per row. WGMMA's sums carry a truncation error that grows with d (2e-5
// at d = 4096); the finish kernel swaps these in.
template <class T>
__device__ __forceinline__ void exact_targets(const Pointers& at, const Plan& plan, int warp, int warps) {
  const int lane = threadIdx.x & 31;
  for (int64_t row = warp; row < plan.n; row += warps) {
    const int64_t target = at.target[row];
    if (target < 0 || target >= plan.v) continue;
    const uint4 *h = (const uint4*)((const T*)at.h + row * at.ld_h),
                *w = (const uint4*)((const T*)at.w + target * at.ld_w);
    float even = 0.f, odd = 0.f;
    for (int i = lane; i < at.d / 8; i += 32) {
      const uint4 a = h[i], b = w[i];
      const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 p = unpack<T>(x[e]), q = unpack<T>(y[e]);
        even = fmaf(p.x, q.x, even);
        odd = fmaf(p.y, q.y, odd);
      }
    }
    even += odd;
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) even += __shfl_xor_sync(~0u, even, offset);
    if (lane == 0) at.target_exact[row] = at.head.template exact<T>(even, (int)target);
  }
}

// The k-steps of one tile, into d. stage and phase: where this warpgroup is in the ring.
template <class T, Task task, int Depth>
__device__ __forceinline__ void multiply(float (&d)[128], int wg, const Plan& plan, uint32_t base, bool lead,
                                         int& stage, uint32_t& phase) {
  using Ring = Pipeline<task, Depth>;
  const int thread = threadIdx.x & 127;
  if (wg == 1 && lead) named_sync<256>(3);
  int last = 0;
  for (int k = 0; k < plan.k_steps; ++k) {
    barrier_wait(base + Ring::full + 8 * stage, phase);
    const uint32_t h = base + stage * Ring::stage_bytes;
    const uint64_t a = operand<Depth>(h + wg * (Ring::h_bytes / 2)), b = operand<Depth>(h + Ring::h_bytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Depth / 16; ++i) wgmma<T>(d, a + 2 * i, b + 2 * i, k | i);
    wgmma_commit();
    wgmma_wait<1>();  // the step before is done: hand its stage back to both producers
    if (k && thread < kCluster) barrier_arrive(base + Ring::empty + 8 * last, thread);
    last = stage;
    if (++stage == Ring::stages) stage = 0, phase ^= 1;
    if (wg == 0 && lead && k + 1 == Ring::lead) named_arrive<256>(3);
  }
  wgmma_wait<0>();
  if (thread < kCluster) barrier_arrive(base + Ring::empty + 8 * last, thread);
  settle(d);
}

// What a thread knows of the two rows it holds.
struct TwoRows {
  int row0, row1, target0, target1;  // target: its column, or -1
  bool live0, live1;

  __device__ TwoRows(const Pointers& at, const Plan& plan, int row)
      : row0(row), row1(row + 8), live0(row0 < plan.n), live1(row1 < plan.n) {
    const int64_t far0 = live0 ? at.target[row0] - plan.first : -1, far1 = live1 ? at.target[row1] - plan.first : -1;
    target0 = far0 >= 0 && far0 < plan.v ? (int)far0 : -1, target1 = far1 >= 0 && far1 < plan.v ? (int)far1 : -1;
  }
};

// From raw products to logits; columns beyond v get one that counts for nothing.
template <class T, Task task, bool Headed>
__device__ __forceinline__ void finish_logits(float (&d)[128], const Head& head, int tile_column, int my_column,
                                              int v) {
  if (Headed && (task != Task::all_statistics || !head.plain())) head.template apply<T>(d, tile_column + my_column, v);
  if (tile_column + kColumns > v) {
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (tile_column + 8 * (i / 2) + my_column + i % 2 >= v)
        d[4 * (i / 2) + i % 2] = d[4 * (i / 2) + 2 + i % 2] = kUnset;
  }
}

template <class T, Task task, int Depth, bool Headed>
__device__ __forceinline__ void sum_rows(int wg, const CUtensorMap& map_out, const Pointers& at, const Plan& plan,
                                         uint32_t base, uint32_t rank, int cluster) {
  using Ring = Pipeline<task, Depth>;
  // with fewer steps warpgroup 0 could reach the barrier twice
  const bool lead = Ring::lead && plan.k_steps >= Ring::stages;
  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int my_row = wg * 64 + (thread >> 5) * 16 + (lane >> 2), my_column = (lane & 3) * 2;
  float d[128];
  int stage = 0;
  uint32_t phase = 0;
  for (Walk<task> walk(plan, cluster, nullptr); walk.next();) {
    const int block = (walk.pair * kCluster + rank) * kRows;
    const TwoRows rows(at, plan, block + my_row);
    Row sums0, sums1;
    if constexpr (task == Task::all_statistics) {
      if (rows.target0 >= 0) sums0.threshold = at.threshold_of(rows.row0);
      if (rows.target1 >= 0) sums1.threshold = at.threshold_of(rows.row1);
    }
    float kept0 = 0.f, kept1 = 0.f;
    if constexpr (task == Task::kept_statistics) {
      if (rows.target0 >= 0) kept0 = kept_reference(at.target_exact[rows.row0]);
      if (rows.target1 >= 0) kept1 = kept_reference(at.target_exact[rows.row1]);
      sums0.reference = kept0, sums1.reference = kept1;
    }
    for (int tile = walk.tile; tile < plan.v_tiles; tile += walk.step) {
      const bool first = tile == walk.tile;
      multiply<T, task, Depth>(d, wg, plan, base, lead, stage, phase);
      const int column = tile * kColumns;
      finish_logits<T, task, Headed>(d, at.head, column, my_column, plan.v);
      if (rows.target0 >= 0) pick_target<0>(d, rows.target0 - column - my_column, at.target_tile + rows.row0);
      if (rows.target1 >= 0) pick_target<1>(d, rows.target1 - column - my_column, at.target_tile + rows.row1);
      if constexpr (task == Task::kept_statistics) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        const uint32_t buffers = base + Ring::staging + wg * 2 * kBytesOut;
        write_tile<T>(d, wg, buffers, &map_out, column, block + wg * 64, KeptValue<Headed>{kept0, kept1, at.head, sum});
        add_kept<0>(d, first, kept0, sum[0] + sum[1], sums0);
        add_kept<1>(d, first, kept1, sum[2] + sum[3], sums1);
      } else {
        add_row<task, 0>(d, first, sums0);
        add_row<task, 1>(d, first, sums1);
      }
    }
    if (walk.tile >= plan.v_tiles) sums0.reference = sums1.reference = kUnset;  // no tile fell to this cluster
    merge_quad<task>(sums0);
    merge_quad<task>(sums1);
    if ((lane & 3) == 0) {
      const int64_t to = (int64_t)walk.tile * plan.n;
      if (rows.live0) at.partial[to + rows.row0] = make_float2(sums0.reference, sums0.sum);
      if (rows.live1) at.partial[to + rows.row1] = make_float2(sums1.reference, sums1.sum);
      if constexpr (task == Task::all_statistics) {
        if (rows.live0) at.partial_more[to + rows.row0] = make_float4(sums0.first, sums0.second, sums0.above, 0.f);
        if (rows.live1) at.partial_more[to + rows.row1] = make_float4(sums1.first, sums1.second, sums1.above, 0.f);
      }
    }
  }
  if (writes_tiles(task) && thread == 0) store_wait<0>();
}

// With coefficient 0, and for a row that is NaN and kept, everything stays 0, and the caller clears the accumulators,
// which may hold NaN. What the rounded
// product of the reference loses, however large the maximum is, goes into the factor.
__device__ __forceinline__ GradientRow gradient_row(const Pointers& at, bool live, int row) {
  GradientRow r;
  if (!live) return r;
  const float coefficient = at.coefficients ? at.coefficients[row] : 1.f;
  const float maximum = at.maximum[row];
  if (coefficient == 0.f || (!at.coefficients && maximum != maximum)) return r;
  r.reference = __fmul_rn(maximum, kLog2e);
  r.factor = (at.coefficients ? -coefficient * at.head.scale : 1.f) * exp2_mufu(-fmaf(maximum, kLog2e, -r.reference)) /
             at.total[row];
  return r;
}

// Where in this tile the row's target is, and what stands there: -expm1 keeps its digits when the target is nearly
// certain.
__device__ __forceinline__ void place_target(GradientRow& r, const Pointers& at, int row, int target, unsigned column) {
  r.at = target >= 0 && r.factor != 0.f ? column : kColumns;
  if (r.at >= kColumns) return;
  const float value = at.log_likelihood[row];
  const float slope = at.head.softcap != 0.f ? at.head.slope(value + logf(at.total[row]) + at.maximum[row]) : 1.f;
  r.at_target = (at.coefficients ? at.coefficients[row] * at.head.scale : -1.f) * -expm1f(value) * slope;
}

template <class T, int Depth, bool Headed>
__device__ __forceinline__ void write_gradient(int wg, const CUtensorMap& map_out, const Pointers& at, const Plan& plan,
                                               uint32_t base, uint32_t rank, int cluster) {
  constexpr Task task = Task::gradient;
  using Ring = Pipeline<task, Depth>;
  const bool lead = Ring::lead && plan.k_steps >= Ring::stages;
  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int my_row = wg * 64 + (thread >> 5) * 16 + (lane >> 2), my_column = (lane & 3) * 2;
  float d[128];
  int stage = 0;
  uint32_t phase = 0;
  for (Walk<task> walk(plan, cluster, at.only); walk.next();) {
    const int block = (walk.pair * kCluster + rank) * kRows, column = walk.tile * kColumns;
    const TwoRows rows(at, plan, block + my_row);
    GradientRow r0 = gradient_row(at, rows.live0, rows.row0), r1 = gradient_row(at, rows.live1, rows.row1);
    multiply<T, task, Depth>(d, wg, plan, base, lead, stage, phase);
    finish_logits<T, task, Headed>(d, at.head, column, my_column, plan.v);
    if (r0.factor == 0.f) {
#pragma unroll
      for (int i = 0; i < 64; ++i) d[4 * (i / 2) + i % 2] = 0.f;
    }
    if (r1.factor == 0.f) {
#pragma unroll
      for (int i = 0; i < 64; ++i) d[4 * (i / 2) + 2 + i % 2] = 0.f;
    }
    place_target(r0, at, rows.row0, rows.target0, rows.target0 - column - my_column);
    place_target(r1, at, rows.row1, rows.target1, rows.target1 - column - my_column);
    const uint32_t buffers = base + Ring::staging + wg * 2 * kBytesOut;
    if (__any_sync(~0u, r0.at < kColumns || r1.at < kColumns))
      write_tile<T>(d, wg, buffers, &map_out, column, block + wg * 64, GradientValue<Headed, true>{r0, r1, at.head});
    else
      write_tile<T>(d, wg, buffers, &map_out, column, block + wg * 64, GradientValue<Headed, false>{r0, r1, at.head});
  }
  if (thread == 0) store_wait<0>();
}

template <class T, Task task, int Depth, bool Headed>
__device__ __forceinline__ void consume(int wg, const CUtensorMap& map_out, const Pointers& at, const Plan& plan,
                                        uint32_t base, uint32_t rank, int cluster) {
  if constexpr (task == Task::gradient) write_gradient<T, Depth, Headed>(wg, map_out, at, plan, base, rank, cluster);
  else sum_rows<T, task, Depth, Headed>(wg, map_out, at, plan, base, rank, cluster);
}

template <class T, Task task, int Depth, bool Headed>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    logit_kernel(const __grid_constant__ CUtensorMap map_h, const __grid_constant__ CUtensorMap map_w,
                 const __grid_constant__ CUtensorMap map_out, const __grid_constant__ Pointers at,
                 const __grid_constant__ Plan plan) {
  extern __shared__ uint8_t memory[];
  using Ring = Pipeline<task, Depth>;
  const uint32_t base = (shared_address(memory) + 1023) & ~1023u, rank = cluster_rank();
  const int cluster = blockIdx.x / kCluster, warpgroup = threadIdx.x >> 7;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Ring::stages; ++i) {
      barrier_init(base + Ring::full + 8 * i, 1);
      // two consumer warpgroups in each CTA that this CTA's loads write to
      barrier_init(base + Ring::empty + 8 * i, 2 * kCluster);
    }
    barrier_init_done();
  }
  cluster_sync();

  if (warpgroup == 2) {
    give_registers<40>();
    const int warp = (threadIdx.x >> 5) - 8;
    if (warp == 0) {
      if ((threadIdx.x & 31) == 0) produce<task, Depth>(map_h, map_w, plan, base, rank, cluster, at.only);
      // the warps that the producer leaves idle; their 40 registers are too few for a tanh
    } else if (task == Task::statistics && !Headed) {
      exact_targets<T>(at, plan, blockIdx.x * 3 + warp - 1, gridDim.x * 3);
    }
    __syncwarp();
  } else {
    take_registers<232>();
    consume<T, task, Depth, Headed>(warpgroup, map_out, at, plan, base, rank, cluster);
  }
  cluster_sync();  // a CTA that left could still be signalled by its neighbour
}

}  // namespace
}  // namespace pyunlearn
