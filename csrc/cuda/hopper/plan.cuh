// Sizes of the tiles and of the shared memory, and how the work is dealt out to the clusters.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pyunlearn {
namespace {

constexpr int kRows = 128, kColumns = 256, kCluster = 2, kThreads = 384;
constexpr int kGroup = 6;       // row pairs swept together over the vocabulary
constexpr int kShallow = 1536;  // up to this d, k-steps of 32 columns instead of 64 (see Pipeline)
constexpr uint32_t kBytesOut = 64 * 64 * 2;  // one staged store of a tile: 64 rows x 64 columns
constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.69314718055994530942;
// reference exponent of a sum to which nothing was added; also the logit of a column beyond v
constexpr float kUnset = -1e30f;

// all_statistics: with entropy, variance and rank; kept_statistics: with every exponential written out for the backward
// pass
enum class Task { statistics, all_statistics, kept_statistics, gradient };

__host__ __device__ constexpr bool writes_tiles(Task task) {
  return task == Task::gradient || task == Task::kept_statistics;
}

// The ring of shared-memory stages, each Depth columns of hidden and weight. With few k-steps per tile the epilogue
// weighs more, and shorter steps with one warpgroup a few steps ahead of the other hide more of it; with many, the
// longer rows of the loads weigh more.
template <Task task, int Depth> struct Pipeline {
  static constexpr int stages = Depth == 64 ? 4 : writes_tiles(task) ? 8 : 9;
  static constexpr int lead = Depth == 64 ? 0 : 4;  // steps by which warpgroup 0 leads
  static constexpr uint32_t h_bytes = kRows * Depth * 2, w_bytes = kColumns * Depth * 2,
                            stage_bytes = h_bytes + w_bytes;
  static constexpr uint32_t staging = stages * stage_bytes, full = staging + (writes_tiles(task) ? 4 * kBytesOut : 0);
  static constexpr uint32_t empty = full + stages * 8, bytes = empty + stages * 8;
  static constexpr uint32_t shared = bytes + 1024;  // slack to align the base
};

struct Plan {
  int n, v, first;  // first: the vocabulary entry of column 0
  int k_steps, v_tiles, pairs, clusters, group;
};

// Statistics: row pairs come in groups whose size divides the number of clusters.
__host__ __device__ inline int pairs_in_group(const Plan& plan, int first_pair) {
  int size = plan.pairs - first_pair;
  if (size >= plan.group) return plan.group;
  while (plan.clusters % size) --size;
  return size;
}

// The work of one cluster, as items: vocabulary tiles tile, tile + step, ... of one row pair. The producer and the
// consumers step through identical copies. All clusters work on a few row pairs at a time, so that hidden stays in L2
// and clusters next to each other read the same weight tile at about the same time. Statistics: a cluster keeps one
// pair for a whole group, so its running sums stay in registers, and no cluster is idle. Gradient: nothing is carried
// from tile to tile, so tiles are dealt one by one. `only`: null, or one int that says whether there is anything to do
// and then one for each row pair.
template <Task task> struct Walk {
  const Plan& plan;
  const int cluster;
  int pair = 0, tile = 0, step = 0;
  int first_pair = 0, size = 0, turn = 0;
  int64_t index;
  const int* only;

  __device__ Walk(const Plan& p, int c, const int* chosen) : plan(p), cluster(c), index(c), only(chosen) {
    if (only && !*only++) index = (int64_t)plan.pairs * plan.v_tiles;
  }

  __device__ bool next() {
    if constexpr (task == Task::gradient) {
      do
        if (!next_tile()) return false;
      while (only && !only[pair]);
      return true;
    } else {
      first_pair += size;
      if (first_pair >= plan.pairs) return false;
      size = pairs_in_group(plan, first_pair);
      step = plan.clusters / size;
      pair = first_pair + cluster % size;
      tile = (cluster / size + turn) % step;
      turn += step - plan.v_tiles % step;  // those that get one tile more are others in the next group
      return true;
    }
  }

  __device__ bool next_tile() {
    if (index >= (int64_t)plan.pairs * plan.v_tiles) return false;
    const int64_t per_group = (int64_t)plan.group * plan.v_tiles;
    first_pair = (int)(index / per_group) * plan.group;
    size = min(plan.group, plan.pairs - first_pair);
    const int within = (int)(index % per_group);
    pair = first_pair + within % size;
    tile = within / size;
    step = plan.v_tiles;
    index += plan.clusters;
    return true;
  }
};

// How many clusters took part in a row's statistics.
__device__ inline int splits_of(const Plan& plan, int pair) {
  const int regular = plan.pairs / plan.group * plan.group;
  int size = plan.group;
  if (pair >= regular)
    for (int p = regular; p + (size = pairs_in_group(plan, p)) <= pair;) p += size;
  return plan.clusters / size;
}

}  // namespace
}  // namespace pyunlearn
