// csrc/cuda/hopper/ptx.cuh on the emulator: the same functions, instruction by instruction.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pyunlearn {
namespace {

inline uint32_t shared_address(uint32_t p) { return p; }
inline uint32_t cluster_rank() { return emulator::here().cluster_rank; }
inline void cluster_sync() { emulator::sync_cluster(); }
inline void barrier_init(uint32_t bar, uint32_t count) { emulator::barrier_init(bar, count); }
inline void barrier_init_done() { emulator::barrier_init_done(); }
inline void barrier_expect(uint32_t bar, uint32_t bytes) { emulator::barrier_arrive(bar, -1, bytes); }
inline void barrier_wait(uint32_t bar, uint32_t parity) { emulator::barrier_wait(bar, parity); }
inline void barrier_arrive(uint32_t bar, uint32_t cta) { emulator::barrier_arrive(bar, cta, 0); }
template <int Threads> void named_sync(int id) { emulator::named_barrier(id, Threads, true); }
template <int Threads> void named_arrive(int id) { emulator::named_barrier(id, Threads, false); }

inline emulator::TensorMap map_at(const CUtensorMap* map) {
  emulator::TensorMap m;
  std::memcpy(&m, map, sizeof m);
  return m;
}
inline void load_tile(uint32_t to, const CUtensorMap* map, int k, int row, uint32_t bar) {
  emulator::load_tile(to, map_at(map), k, row, bar, 0);
}
inline void load_tile_to_both(uint32_t to, const CUtensorMap* map, int k, int row, uint32_t bar) {
  emulator::load_tile(to, map_at(map), k, row, bar, 3);
}
inline void store_tile(const CUtensorMap* map, int col, int row, uint32_t from) {
  emulator::store_tile(map_at(map), col, row, from);
}
template <int Left> void store_wait() { emulator::store_wait(Left); }

inline void wgmma_fence() { emulator::multiply_fence(); }
inline void wgmma_commit() { emulator::multiply_commit(); }
template <int Left> void wgmma_wait() { emulator::multiply_wait(Left); }
template <int Depth> uint64_t operand(uint32_t address) {  // as in the original
  return (uint64_t)((address & 0x3FFFF) >> 4) | 1ull << 16 | (uint64_t)(8 * Depth * 2 >> 4) << 32 |
         (Depth == 64 ? 1ull : 2ull) << 62;
}
template <class T> void wgmma(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  emulator::multiply(d, a, b, accumulate, [](uint16_t x) { return (float)bits_as<T>(x); });
}
inline void settle(float (&)[128]) {}
template <int> void give_registers() {}
template <int> void take_registers() {}

inline float exp2_mufu(float x) { return emulated_ex2(x); }
inline float reciprocal_mufu(float x) { return emulated_rcp(x); }

template <class T> uint32_t pack(float low, float high);
template <>
inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}
template <>
inline uint32_t pack<__half>(float low, float high) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}
template <class T> float2 unpack(uint32_t both) {
  struct Two { T x, y; };
  const Two two = bits_as<Two>(both);
  return {(float)two.x, (float)two.y};
}
inline void store_matrices(uint32_t to, const uint32_t (&q)[4]) { emulator::store_matrices(to, q); }
inline void fence_for_copies() { emulator::fence_for_copies(); }

}  // namespace
}  // namespace pyunlearn
