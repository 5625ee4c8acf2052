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
  bool there = false, published = false;  // published: to other blocks and to the copies
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

// What the threads write to shared memory, copies and products see only after a fence (the async proxy of PTX).
struct Block {
  std::vector<uint8_t> shared, copied;  // as the threads see it, and as copies and products do
  int running = 0;                      // threads that have not ended
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
  bool was_read = false;
  std::vector<uint16_t> values;  // between the read and the write
};

struct Fiber {
  ucontext_t context;
  Here here;
  Block* block = nullptr;
  bool finished = false;
  bool fenced = false;  // its accumulators, since it last waited for all products
  const char* waits_for = "";
  std::vector<std::pair<uint32_t, uint32_t>> unfenced;  // address and bytes of its writes to shared memory
  size_t products_issued = 0, groups_committed = 0;
  std::vector<std::shared_ptr<Store>> stores;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Collective all;
};

uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  if (row_bytes == 128) return address ^ ((address >> 7 & 7) << 4);
  if (row_bytes == 64) return address ^ ((address >> 7 & 3) << 4);
  misuse("only swizzles of 64 and 128 bytes are known");
}

uint8_t* memory_of(std::vector<uint8_t>& memory, uint32_t address, size_t bytes) {
  require(address >= kWindow && address - kWindow + bytes <= memory.size(), "shared memory out of bounds");
  return memory.data() + (address - kWindow);
}

}  // namespace
}  // namespace emulator
