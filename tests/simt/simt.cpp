// Scheduler of the SIMT emulator; see include/simt.h.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The scheduler itself is compiled without sanitisers, for speed, and tells them of every change of stack.
#include <sanitizer/common_interface_defs.h>
extern "C" void __asan_unpoison_memory_region(void const volatile* address, size_t size);

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#else
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 4096;

enum class State { kReady, kBlockBarrier, kWarp, kDone };

#if defined(__x86_64__)
using Context = void*;
void switch_context(Context* from, Context* to) { simt_switch(from, *to); }
#else
using Context = ucontext_t;
void switch_context(Context* from, Context* to) { swapcontext(from, to); }
#endif

struct Fiber {
  char* stack = nullptr;  // lowest usable byte
  Context context{};
  void* fake_stack = nullptr;
  Dim3 index;
  unsigned linear = 0;
  State state = State::kReady;
  Site site;
  unsigned mask = 0;
  uint64_t value = 0;
  int source = -1;
  uint64_t result = 0;
};

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

struct SharedBlock {
  Site site;
  void* memory;
  size_t bytes;
};

struct Machine {
  uint64_t seed = 0;
  uint64_t random_state = 0;
  std::vector<Fiber> fibers;  // kept between launches with their stacks
  unsigned threads = 0;
  Fiber* current = nullptr;
  Context scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  Dim3 grid, block, block_id;
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::vector<SharedBlock> shared;
  size_t dynamic_shared = 0;
  std::string error;
  unsigned at_barrier = 0;
};

Machine& machine() {
  static Machine m;
  return m;
}

uint64_t next_random() {  // splitmix64
  uint64_t z = (machine().random_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <typename T>
void shuffle_order(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

void yield_to_scheduler(bool finished) {
  Machine& m = machine();
  Fiber* self = m.current;
  __sanitizer_start_switch_fiber(finished ? nullptr : &self->fake_stack, m.scheduler_bottom, m.scheduler_size);
  switch_context(&self->context, &m.scheduler);
  __sanitizer_finish_switch_fiber(self->fake_stack, &m.scheduler_bottom, &m.scheduler_size);
}

void fiber_main() {
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_bottom, &m.scheduler_size);
  (*m.body)();
  m.current->state = State::kDone;
  yield_to_scheduler(true);
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for a fiber's stack");
    mprotect(memory, kGuard, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + kGuard;
  }
  __asan_unpoison_memory_region(fiber.stack, kStack);
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // fiber_main finds the stack as after a call: 8 bytes off 16-byte alignment
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
  fiber.fake_stack = nullptr;
  fiber.state = State::kReady;
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber.stack, kStack);
  switch_context(&m.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
  m.current = nullptr;
}

std::string where(const Site& site) {
  std::ostringstream out;
  const char* slash = std::strrchr(site.file, '/');
  out << site.what << " at " << (slash ? slash + 1 : site.file) << ":" << site.line;
  return out.str();
}

std::string thread_name(const Fiber& fiber) {
  std::ostringstream out;
  out << "thread (" << fiber.index.x << "," << fiber.index.y << "," << fiber.index.z << ")";
  return out.str();
}

std::string location() {
  Machine& m = machine();
  std::ostringstream out;
  out << "; kernel " << m.kernel << ", block (" << m.block_id.x << "," << m.block_id.y << "," << m.block_id.z << "), seed "
      << m.seed;
  return out.str();
}

// Called on a fiber: remembers the error and leaves the kernel; the launch throws it.
void fail(const std::string& message) {
  machine().error = "simt: " + message + location();
  for (;;) yield_to_scheduler(false);
}

std::string describe_stuck() {
  Machine& m = machine();
  std::ostringstream out;
  const Fiber* waiting = nullptr;
  for (unsigned i = 0; i < m.threads && !waiting; ++i)
    if (m.fibers[i].state != State::kDone) waiting = &m.fibers[i];
  const bool barrier = waiting->state == State::kBlockBarrier;
  out << "simt: divergent " << (barrier ? "barrier" : "warp operation") << ": " << thread_name(*waiting) << " waits in "
      << where(waiting->site);
  if (!barrier) out << " with mask 0x" << std::hex << waiting->mask << std::dec;
  const unsigned warp = waiting->linear / 32;
  for (unsigned i = 0; i < m.threads; ++i) {
    const Fiber& other = m.fibers[i];
    if (!barrier && (other.linear / 32 != warp || !(waiting->mask >> (other.linear % 32) & 1))) continue;
    const bool same =
        other.state == waiting->state && same_site(other.site, waiting->site) && (barrier || other.mask == waiting->mask);
    if (same) continue;
    out << " but " << thread_name(other);
    if (other.state == State::kDone) {
      out << " has left the kernel";
    } else {
      out << " waits in " << where(other.site);
      if (other.state == State::kWarp) out << " with mask 0x" << std::hex << other.mask << std::dec;
    }
    return out.str() + location();
  }
  out << " for lanes that do not exist";
  return out.str() + location();
}

void free_shared() {
  for (SharedBlock& block : machine().shared) std::free(block.memory);
  machine().shared.clear();
}

void run_block() {
  Machine& m = machine();
  m.at_barrier = 0;
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.linear = i;
    fiber.index = Dim3(i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y));
    prepare(fiber);
  }
  // Even seeds: every ready thread makes one step per round. Odd seeds: one warp runs as far ahead of the others as the
  // barriers let it, then the next; a barrier that is missing between a read and the next write shows then.
  const bool race = m.seed % 2 != 0;
  std::vector<unsigned> warps((m.threads + 31) / 32);
  std::iota(warps.begin(), warps.end(), 0u);
  shuffle_order(warps);
  std::vector<unsigned> order;
  for (;;) {
    order.clear();
    for (unsigned warp : warps) {
      for (unsigned i = warp * 32; i < std::min(m.threads, warp * 32 + 32); ++i)
        if (m.fibers[i].state == State::kReady) order.push_back(i);
      if (race && !order.empty()) break;
    }
    if (order.empty()) {
      const bool finished = std::all_of(m.fibers.begin(), m.fibers.begin() + m.threads,
                                        [](const Fiber& fiber) { return fiber.state == State::kDone; });
      if (finished) break;
      m.error = describe_stuck();
    }
    shuffle_order(order);
    for (unsigned i : order) {
      if (!m.error.empty()) break;
      resume(m.fibers[i]);
    }
    if (!m.error.empty()) {
      free_shared();
      throw std::runtime_error(std::exchange(m.error, ""));
    }
  }
  free_shared();
}

// Waits until every lane of mask is in the same operation, then computes each lane's result.
uint64_t warp_operation(const Site& site, unsigned mask, uint64_t value, int source) {
  Machine& m = machine();
  Fiber* self = m.current;
  const unsigned lane = self->linear % 32;
  if (!(mask >> lane & 1)) fail(thread_name(*self) + " calls " + where(site) + " with a mask that lacks its own lane");
  if (source >= 0 && !(mask >> source & 1))
    fail(thread_name(*self) + " reads lane " + std::to_string(source) + " in " + where(site) + ", which is not in the mask");
  self->state = State::kWarp;
  self->site = site;
  self->mask = mask;
  self->value = value;
  self->source = source;
  Fiber* warp = &m.fibers[self->linear / 32 * 32];
  const unsigned lanes = std::min(32u, m.threads - self->linear / 32 * 32);
  bool complete = true;
  for (unsigned i = 0; i < 32 && complete; ++i) {
    if (!(mask >> i & 1)) continue;
    complete = i < lanes && warp[i].state == State::kWarp && warp[i].mask == mask && same_site(warp[i].site, site);
  }
  if (!complete) {
    yield_to_scheduler(false);
    return self->result;
  }
  uint64_t votes = 0;
  for (unsigned i = 0; i < lanes; ++i)
    if ((mask >> i & 1) && warp[i].value != 0) votes |= uint64_t{1} << i;
  for (unsigned i = 0; i < lanes; ++i)
    if (mask >> i & 1) warp[i].result = warp[i].source < 0 ? votes : warp[warp[i].source].value;
  for (unsigned i = 0; i < lanes; ++i)
    if (mask >> i & 1) warp[i].state = State::kReady;
  return self->result;
}

}  // namespace

void set_seed(uint64_t seed) { machine().seed = seed; }

void launch(const char* name, Dim3 grid, Dim3 block, size_t dynamic_shared, const std::function<void()>& body) {
  Machine& m = machine();
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || dynamic_shared > 48 * 1024) {
    std::ostringstream out;
    out << "simt: invalid configuration of kernel " << name << ": grid (" << grid.x << "," << grid.y << "," << grid.z << "), block ("
        << block.x << "," << block.y << "," << block.z << "), " << dynamic_shared << " bytes of shared memory";
    throw std::runtime_error(out.str());
  }
  m.kernel = name;
  m.grid = grid;
  m.block = block;
  m.threads = static_cast<unsigned>(threads);
  m.dynamic_shared = dynamic_shared;
  m.body = &body;
  m.random_state = m.seed;
  if (m.fibers.size() < m.threads) m.fibers.resize(m.threads);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  shuffle_order(blocks);
  for (uint64_t b : blocks) {
    m.block_id = Dim3(b % grid.x, b / grid.x % grid.y, b / (uint64_t{grid.x} * grid.y));
    run_block();
  }
}

const Dim3& thread_index() { return machine().current->index; }
const Dim3& block_index() { return machine().block_id; }
const Dim3& block_dim() { return machine().block; }
const Dim3& grid_dim() { return machine().grid; }
unsigned lane_id() { return machine().current->linear % 32; }

void* shared_memory(const Site& site, size_t bytes) {
  Machine& m = machine();
  for (SharedBlock& block : m.shared)
    if (same_site(block.site, site) && std::strcmp(block.site.what, site.what) == 0) return block.memory;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);  // NaN in every float format
  m.shared.push_back({site, memory, bytes});
  return memory;
}

void* dynamic_shared_memory() { return shared_memory({"", 0, "dynamic"}, machine().dynamic_shared); }

void sync_block(const Site& site) {
  Machine& m = machine();
  Fiber* self = m.current;
  self->state = State::kBlockBarrier;
  self->site = site;
  if (++m.at_barrier < m.threads) return yield_to_scheduler(false);
  for (unsigned i = 0; i < m.threads; ++i)
    if (!same_site(m.fibers[i].site, site)) return yield_to_scheduler(false);  // reported as divergent
  for (unsigned i = 0; i < m.threads; ++i) m.fibers[i].state = State::kReady;
  m.at_barrier = 0;
}

void sync_warp(const Site& site, unsigned mask) { warp_operation(site, mask, 0, -1); }

unsigned ballot(const Site& site, unsigned mask, bool predicate) {
  return static_cast<unsigned>(warp_operation(site, mask, predicate, -1));
}

uint64_t shuffle(const Site& site, unsigned mask, uint64_t value, int source_lane) {
  return warp_operation(site, mask, value, source_lane);
}

}  // namespace simt

extern "C" __attribute__((visibility("default"))) void acefast_simt_set_seed(uint64_t seed) { simt::set_seed(seed); }
