// A GPU for the tests, slow and strict: every thread of a cluster is a coroutine, and what runs next is drawn at
// random.
//
// What the hardware leaves open is drawn too: when each quarter of a bulk load lands; when a bulk store reads shared
// memory, and when it writes; when a warpgroup's product reads shared memory (when all its warps have issued it, or not
// before somebody waits for it); whether copies are early, late, or anything between; a warp that runs late. Copies and
// products see what a thread wrote to shared memory only after its fence. A missing barrier or fence therefore gives
// wrong numbers for some seed, and threads that wait for each other for ever are reported with what they wait for, as
// are products without a fence, and blocks that end before their copies. Products are cut as the tensor cores cut them
// (products.h). Register limits and caches are not emulated.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  Dim(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct Here {  // what the running thread knows of itself
  Dim thread, block, block_size, grid_size;
  int in_block;  // its number in the thread block
  int cluster_rank;  // the block's number in its cluster
};

// One process-wide machine: options, read at each launch.
struct Machine {
  int processors = 4;
  unsigned seed = 0;
  int capability = 9;  // major
};
Machine& machine();

const Here& here();

// Runs kernel() once for every thread. shared: bytes of dynamic shared memory of a block. Throws std::runtime_error on
// a deadlock or a misuse.
void run(Dim grid, Dim block, size_t shared, int cluster, const std::function<void()>& kernel);

struct Configuration {
  Dim grid, block;
  size_t shared;
  Configuration(Dim g, Dim b, size_t s = 0, void* = nullptr) : grid(g), block(b), shared(s) {}
  template <class Kernel, class... Arguments> void launch(Kernel kernel, Arguments... arguments) const {
    // clusters of two where dynamic shared memory is used
    run(grid, block, shared, shared ? 2 : 1, [&] { kernel(arguments...); });
  }
};

// Collectives of a warp, a block, a cluster
constexpr unsigned kAllLanes = ~0u;
void sync_warp();
uint64_t from_lane(uint64_t value, int lane);  // every lane gets the value of its own choice of lane
bool any_in_warp(bool value);
void sync_block(int place);  // place: a line of source, the same for all of them, as the instruction wants it
bool any_in_block(bool value, int place);
void sync_cluster();
void named_barrier(int id, int threads, bool wait);

// Shared memory: addresses are 32-bit numbers, as in the shared window of a block
uint32_t dynamic_shared();  // where it begins
void fence_for_copies();  // copies see what this thread wrote
void store_matrices(uint32_t to, const uint32_t (&q)[4]);

// Barriers in shared memory (mbarrier)
void barrier_init(uint32_t at, uint32_t count);
void barrier_init_done();
void barrier_arrive(uint32_t at, int rank, uint32_t expected_bytes);
void barrier_wait(uint32_t at, uint32_t parity);

struct TensorMap {  // what the 128 bytes of a CUtensorMap hold here
  uint8_t* data;
  uint64_t rows, columns, pitch;  // pitch in bytes; elements of two bytes
  uint32_t box_rows, box_columns, swizzle;  // swizzle: bytes of a row of the pattern
};
void load_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier, unsigned blocks);
void store_tile(const TensorMap& map, int column, int row, uint32_t from);
void store_wait(int left);

// d += a b for the warpgroup's 64 x 256 accumulators (d = a b unless accumulate); a and b are descriptors; to_float:
// the operands' type
// d[c] += a . b[c] for c < 8 in the arithmetic of the tensor cores; a (16,), b (16, 8)
void add_products_of_8(float* d, const float* a, const float* b);
void multiply(float (&d)[128], uint64_t a, uint64_t b, bool accumulate, float (*to_float)(uint16_t));
void multiply_fence();
void multiply_commit();
void multiply_wait(int left);

}  // namespace emulator
