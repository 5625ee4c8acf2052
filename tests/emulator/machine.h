// The parts of the emulated machine: threads (fibers), collectives, barriers, products and stores under way, blocks,
// clusters. Included by emulator.cpp alone.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr uint32_t kWindow = 48;  // where shared memory begins: 16-byte aligned and no better

[[noreturn]] void misuse(const std::string& what) { throw std::runtime_error("emulator: " + what); }
void require(bool fine, const char* what) {
  if (!fine) misuse(what);
}

struct Fiber;

struct Waiting { std::vector<Fiber*> fibers; };

// A collective of `size` threads. Values go through two slots in turn, so a fast thread cannot overwrite what a slow
// one has yet to read.
struct Collective {
  int size = 0, arrived = 0, generation = 0;
  int place = 0;  // the line of source at which those who arrived did so
  std::vector<uint64_t> slots[2];
  Waiting waiting;
  bool any[2] = {false, false};
};

struct Mbarrier {
  bool there = false;
  int count = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  Waiting waiting;
};

struct Product {
  uint64_t a, b;
  bool accumulate;
  float (*to_float)(uint16_t);
  float* d[128];
};

struct Warpgroup {
  struct Group {
    std::vector<Product> products;
    int commits = 0;
    bool eager = false, done = false;
  };
  std::deque<Group> groups;
  Waiting waiting;
};

struct Block {
  std::vector<uint8_t> shared;
  std::unordered_map<uint32_t, Mbarrier> barriers;
  std::vector<Collective> warps;
  std::vector<Warpgroup> warpgroups;
  Collective all, named[16];
};

struct Store {
  TensorMap map;
  int column, row;
  uint32_t from;
  Block* block;
  bool done = false;
};

struct Fiber {
  ucontext_t context;
  Here here;
  Block* block = nullptr;
  bool finished = false;
  const char* waits_for = "";
  size_t products_issued = 0, groups_committed = 0;
  std::vector<std::shared_ptr<Store>> stores;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Collective all;
};

}  // namespace
}  // namespace emulator
