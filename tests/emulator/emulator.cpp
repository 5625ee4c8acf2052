#include <sys/mman.h>

#include "machine.h"
#include "products.h"

namespace emulator {
namespace {

Machine the_machine;
Cluster* cluster = nullptr;
Fiber* current = nullptr;
ucontext_t scheduler;
std::vector<Fiber*> ready;
std::vector<std::function<void()>> copies;  // under way
enum class Copies { early, any, late } copies_are = Copies::any;
int late_warp = -1;
const std::function<void()>* kernel = nullptr;
std::string failure;
uint64_t random_state = 1;

uint64_t draw() {  // xorshift
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state;
}

void sleep_in(Waiting& w, const char* what) {
  current->waits_for = what;
  w.fibers.push_back(current);
  Fiber* me = current;
  swapcontext(&me->context, &scheduler);
}
void wake(Waiting& w) {
  ready.insert(ready.end(), w.fibers.begin(), w.fibers.end());
  w.fibers.clear();
}

void complete(Collective& c) {
  c.arrived = 0;
  ++c.generation;
  c.any[c.generation & 1] = false;
  wake(c.waiting);
}
void arrive_and_wait(Collective& c, const char* what) {
  const int generation = c.generation;
  if (++c.arrived == c.size) complete(c);
  else
    while (c.generation == generation) sleep_in(c.waiting, what);
}
void leave(Collective& c) {  // a thread that has ended counts as arrived
  if (--c.size > 0 && c.arrived == c.size) complete(c);
}

void enter() {
  try {
    (*kernel)();
  } catch (const std::exception& e) {
    if (failure.empty()) failure = e.what();
  }
  current->finished = true;
  Block& block = *current->block;
  --block.running;
  if (failure.empty() && !current->stores.empty()) failure = "a thread ends while a store may still read shared memory";
  leave(block.warps[current->here.in_block / 32]);
  leave(block.all);
  leave(cluster->all);
  swapcontext(&current->context, &scheduler);
}

Mbarrier& barrier_of(Block& block, uint32_t at) {
  Mbarrier& b = block.barriers[at];
  require(b.there, "a barrier that was never initialised");
  return b;
}
void settle(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.count;
  b.phase ^= 1;
  wake(b.waiting);
}

// f(row, column, address in shared memory) for each element of the box that is in the matrix. Whole pieces of 16 bytes
// are written, beyond the last column too.
template <class F> void for_box(const Store& s, F&& f) {
  const TensorMap& m = s.map;
  const uint64_t columns = (m.columns + 7) / 8 * 8;
  for (uint32_t r = 0; r < m.box_rows; ++r)
    for (uint32_t c = 0; c < m.box_columns; ++c) {
      const uint64_t row = s.row + r, column = s.column + c;
      if (row < m.rows && column < columns) f(row, column, swizzled(s.from + r * m.box_columns * 2 + c * 2, m.swizzle));
    }
}
void read_store(const std::shared_ptr<Store>& store) {
  Store& s = *store;
  if (std::exchange(s.was_read, true)) return;
  for_box(s, [&](uint64_t, uint64_t, uint32_t at) {
    uint16_t x;
    std::memcpy(&x, memory_of(s.block->copied, at, 2), 2);
    s.values.push_back(x);
  });
  copies.push_back([store] {
    const uint16_t* x = store->values.data();
    for_box(*store, [&](uint64_t row, uint64_t column, uint32_t) {
      std::memcpy(store->map.data + row * store->map.pitch + column * 2, x++, 2);
    });
  });
}

Collective& my_warp() { return current->block->warps[current->here.in_block / 32]; }
Warpgroup& my_warpgroup() { return current->block->warpgroups[current->here.in_block / 128]; }

// One warp, for a while: it runs only where nothing else is drawn in several attempts. In a purely random order all
// threads advance alike, and none is ever as late as on a GPU.
bool is_late(const Fiber* fiber) { return (fiber - cluster->fibers.data()) / 32 == late_warp; }

void step() {  // one thing that can happen next
  if (draw() % 4096 == 0) late_warp = (int)(draw() % (cluster->fibers.size() / 32 + 1));
  uint64_t pick = draw() % (ready.size() + copies.size());
  if (copies_are == Copies::early && !copies.empty() && draw() & 1) pick = ready.size() + draw() % copies.size();
  if (copies_are == Copies::late && !ready.empty()) pick = draw() % ready.size();
  for (int i = 0; i < 12 && pick < ready.size() && is_late(ready[pick]); ++i) pick = draw() % ready.size();
  if (pick < ready.size()) {
    Fiber* next = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    current = next;
    swapcontext(&scheduler, &next->context);
  } else {
    const size_t at = pick - ready.size();
    const std::function<void()> copy = std::move(copies[at]);
    copies[at] = std::move(copies.back());
    copies.pop_back();
    copy();
  }
}

char* stacks(size_t count) {  // kept from launch to launch
  static char* memory = nullptr;
  static size_t size = 0;
  if (count * kStack > size) {
    if (memory) munmap(memory, size);
    size = count * kStack;
    memory = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) misuse("no memory for stacks");
  }
  return memory;
}

void run_cluster(Dim grid, Dim block, size_t shared, unsigned first, int size) {
  const int threads = block.x * block.y * block.z;
  Cluster c;
  c.blocks.resize(size);
  c.fibers.resize((size_t)size * threads);
  c.all.size = size * threads;
  char* memory = stacks(c.fibers.size());
  for (int b = 0; b < size; ++b) {
    Block& each = c.blocks[b];
    each.shared.assign(shared, 0xFF);
    each.copied = each.shared;
    each.running = threads;
    each.warps.resize((threads + 31) / 32);
    each.warpgroups.resize((threads + 127) / 128);
    each.all.size = threads;
    for (int t = 0; t < threads; ++t) {
      ++each.warps[t / 32].size;
      Fiber& f = c.fibers[(size_t)b * threads + t];
      f.block = &each;
      f.here = {
          Dim(t % block.x, t / block.x % block.y, t / (block.x * block.y)), Dim(first + b, 0, 0), block, grid, t, b};
    }
  }
  cluster = &c;
  ready.clear();
  copies.clear();
  copies_are = (Copies)(draw() % 3);
  late_warp = (int)(draw() % (c.fibers.size() / 32 + 1));
  for (size_t i = 0; i < c.fibers.size(); ++i) {
    Fiber& f = c.fibers[i];
    getcontext(&f.context);
    f.context.uc_stack = {memory + i * kStack, 0, kStack};
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    ready.push_back(&f);
  }
  while (!ready.empty() || !copies.empty()) {
    step();
    if (!failure.empty()) break;
  }
  std::string stuck;
  for (const Fiber& f : c.fibers)
    if (!f.finished && failure.empty()) {
      if (stuck.size() < 1000)
        stuck += " block " + std::to_string(f.here.block.x) + " thread " + std::to_string(f.here.in_block) + ": " +
                 f.waits_for + ";";
    }
  cluster = nullptr;
  current = nullptr;
  if (!failure.empty()) misuse(std::exchange(failure, std::string()));
  if (!stuck.empty()) misuse("threads wait for ever:" + stuck);
}

}  // namespace

Machine& machine() { return the_machine; }
const Here& here() { return current->here; }

void run(Dim grid, Dim block, size_t shared, int size, const std::function<void()>& body) {
  kernel = &body;
  random_state = the_machine.seed * 0x9E3779B97F4A7C15ull + 1;
  require(shared <= 227 << 10, "more shared memory than a block may have");
  require(grid.x % size == 0, "a grid that is no multiple of its clusters");
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += size) {
      if (grid.y > 1) require(size == 1, "a cluster in a grid of two dimensions");
      const std::function<void()> at_y = [&] {
        current->here.block.y = y;
        body();
      };
      kernel = &at_y;
      run_cluster(grid, block, shared, x, size);
    }
}

void sync_warp() { arrive_and_wait(my_warp(), "its warp"); }

uint64_t from_lane(uint64_t value, int lane) {
  Collective& w = my_warp();
  auto& slots = w.slots[w.generation & 1];
  slots.resize(32);
  slots[current->here.in_block % 32] = value;
  arrive_and_wait(w, "a shuffle of its warp");
  return slots[lane];
}

static bool any_in(Collective& c, bool value, const char* what) {
  bool& any = c.any[c.generation & 1];
  any |= value;
  arrive_and_wait(c, what);
  return any;
}
bool any_in_warp(bool value) { return any_in(my_warp(), value, "a vote of its warp"); }
static Collective& block_at(int place) {
  Collective& c = current->block->all;
  require(c.arrived == 0 || c.place == place, "threads of one block meet at two different barriers");
  c.place = place;
  return c;
}
void sync_block(int place) { arrive_and_wait(block_at(place), "its block"); }
bool any_in_block(bool value, int place) { return any_in(block_at(place), value, "a vote of its block"); }
void sync_cluster() { arrive_and_wait(cluster->all, "its cluster"); }

void named_barrier(int id, int threads, bool wait) {
  Collective& c = current->block->named[id];
  require(c.arrived == 0 || c.size == threads, "a named barrier with two different counts");
  c.size = threads;
  if (wait) arrive_and_wait(c, "a named barrier");
  else if (++c.arrived == c.size) complete(c);
}

uint32_t dynamic_shared() { return kWindow; }
void fence_for_copies() {
  Block& block = *current->block;
  for (const auto& [at, bytes] : current->unfenced)
    std::memcpy(memory_of(block.copied, at, bytes), memory_of(block.shared, at, bytes), bytes);
  current->unfenced.clear();
}

void store_matrices(uint32_t to, const uint32_t (&q)[4]) {
  const int lane = current->here.in_block % 32;
  require(to % 16 == 0, "a matrix row that is not 16-byte aligned");
  for (int m = 0; m < 4; ++m) {
    const uint32_t row = (uint32_t)from_lane(to, 8 * m + lane / 4);
    std::memcpy(memory_of(current->block->shared, row + lane % 4 * 4, 4), &q[m], 4);
    current->unfenced.emplace_back(row + lane % 4 * 4, 4);
  }
  sync_warp();
}

void barrier_init(uint32_t at, uint32_t count) {
  require(at % 8 == 0, "a barrier that is not 8-byte aligned");
  memory_of(current->block->shared, at, 8);
  Mbarrier& b = current->block->barriers[at];
  b.there = true, b.count = b.pending = (int)count;
}
void barrier_init_done() {
  for (auto& [at, barrier] : current->block->barriers) barrier.published = true;
}
void barrier_arrive(uint32_t at, int rank, uint32_t expected_bytes) {
  Block& block = rank < 0 ? *current->block : cluster->blocks.at(rank);
  require(block.running > 0, "an arrival at a block that has ended");
  Mbarrier& b = barrier_of(block, at);
  require(b.published || &block == current->block, "an arrival at a barrier that was not published to its cluster");
  require(b.pending > 0, "more arrivals than the barrier expects");
  b.bytes += expected_bytes;
  --b.pending;
  settle(b);
}
void barrier_wait(uint32_t at, uint32_t parity) {
  Mbarrier& b = barrier_of(*current->block, at);
  while (b.phase == parity)
    sleep_in(b.waiting, parity ? "a barrier in shared memory, odd phase" : "a barrier in shared memory, even phase");
}

// Rows [begin, end) of a load's box.
static void land(Block& block, uint32_t to, const TensorMap& map, int column, int row, uint32_t begin, uint32_t end,
                 uint32_t barrier) {
  require(block.running > 0, "a load lands in a block that has ended");
  for (uint32_t r = begin; r < end; ++r)
    for (uint32_t c = 0; c < map.box_columns; ++c) {
      const int64_t from_row = (int64_t)row + r, from_column = (int64_t)column + c;
      uint16_t x = 0;
      if (from_row >= 0 && from_row < (int64_t)map.rows && from_column >= 0 && from_column < (int64_t)map.columns)
        std::memcpy(&x, map.data + from_row * map.pitch + from_column * 2, 2);
      const uint32_t at = swizzled(to + r * map.box_columns * 2 + c * 2, map.swizzle);
      for (auto* memory : {&block.shared, &block.copied}) std::memcpy(memory_of(*memory, at, 2), &x, 2);
    }
  Mbarrier& there = barrier_of(block, barrier);
  require(there.published, "a load for a barrier that was not published to the copies");
  there.bytes -= (end - begin) * map.box_columns * 2;
  settle(there);
}

void load_tile(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier, unsigned blocks) {
  require(to % 128 == 0, "a bulk copy to memory that is not 128-byte aligned");
  const int rank = current->here.cluster_rank;
  for (int b = 0; b < 2; ++b) {
    if (!(blocks >> b & 1) && !(blocks == 0 && b == rank)) continue;
    Block* block = &cluster->blocks.at(b);
    constexpr uint32_t kParts = 4;  // that land one by one, in any order
    for (uint32_t part = 0; part < kParts; ++part) {
      const uint32_t begin = map.box_rows * part / kParts, end = map.box_rows * (part + 1) / kParts;
      copies.push_back([=] { land(*block, to, map, column, row, begin, end, barrier); });
    }
  }
}

void store_tile(const TensorMap& map, int column, int row, uint32_t from) {
  require(from % 128 == 0, "a bulk copy from memory that is not 128-byte aligned");
  auto store = std::make_shared<Store>(Store{map, column, row, from, current->block, false, {}});
  current->stores.push_back(store);
  if (draw() & 1) copies.push_back([store] { read_store(store); });
}
void store_wait(int left) {
  auto& stores = current->stores;
  while ((int)stores.size() > left) {
    read_store(stores.front());
    stores.erase(stores.begin());
  }
}

void multiply(float (&d)[128], uint64_t a, uint64_t b, bool accumulate, float (*to_float)(uint16_t)) {
  require(current->fenced, "a product without a fence before it");
  Warpgroup& w = my_warpgroup();
  const size_t group = current->groups_committed, index = current->products_issued++;
  if (w.groups.size() <= group) w.groups.resize(group + 1), w.groups[group].eager = draw() & 1;
  auto& products = w.groups[group].products;
  if (products.size() <= index) products.push_back({a, b, accumulate, to_float, {}});
  Product& p = products[index];
  require(p.a == a && p.b == b && p.accumulate == accumulate, "a product on which its warps disagree");
  p.d[current->here.in_block % 128] = d;
}
void add_products_of_8(float* d, const float* a, const float* b) { add_products(d, a, 1, b, 8); }
void multiply_fence() { current->fenced = true; }
void multiply_commit() {
  Warpgroup& w = my_warpgroup();
  auto& group = w.groups.at(current->groups_committed++);
  current->products_issued = 0;
  if (++group.commits < 128) return;
  if (group.eager) {
    for (auto& each : w.groups)  // in order
      if (&each == &group) break;
      else do_group(*current->block, each);
    do_group(*current->block, group);
  }
  wake(w.waiting);
}
void multiply_wait(int left) {
  Warpgroup& w = my_warpgroup();
  if (left == 0) current->fenced = false;
  for (size_t g = 0; g + left < current->groups_committed; ++g) {
    while (w.groups[g].commits < 128) sleep_in(w.waiting, "the rest of its warpgroup, to multiply");
    do_group(*current->block, w.groups[g]);
  }
}

}  // namespace emulator
