// The emulated GPU: blocks in sequence, the threads of a block as fibers that change hands at barriers and shuffles,
// warp by warp.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
// Without the sanitizer there is nobody to tell.
static void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

// Ends of the section that holds the __shared__ arrays; null where no kernel has one.
extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

namespace emulation {
namespace {

constexpr std::size_t kStack = 64 * 1024;
constexpr unsigned kLanes = 32;

struct Fiber {
  enum State { ready, at_barrier, in_warp, done };
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  void* fake_stack = nullptr;  // AddressSanitizer's
  uint3 index{};
  State state = done;
  int line = 0;                      // where it waits
  unsigned mask = 0;                 // whom it waits for in its warp
  std::uint64_t brought = 0;         // to the exchange
  std::uint64_t received[kLanes]{};  // from it
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running = nullptr;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;
const std::function<void()>* body = nullptr;
Order turn_order = Order::ascending;
std::mt19937 shuffler;

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*body)();
  running->state = Fiber::done;
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);
  setcontext(&scheduler);
}

void start(Fiber& fiber, uint3 index) {
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStack);  // frames of the thread that used it before
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.fake_stack = nullptr;
  fiber.index = index;
  fiber.state = Fiber::ready;
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void wait(Fiber::State state, int line) {
  Fiber& self = *running;
  self.state = state;
  self.line = line;
  __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

// 0xff bytes are a NaN in every floating type and -1 in every integer: a value read before it was written shows.
// The section also holds the sanitizer's red zones, hence the byte loop without instrumentation.
__attribute__((no_sanitize("address", "undefined"))) void poison_static_shared() {
  if (!__start_emulated_shared) return;
  for (volatile char* at = __start_emulated_shared; at != __stop_emulated_shared; ++at) *at = static_cast<char>(0xff);
}

void release_barrier(unsigned threads) {
  unsigned waiting = 0, finished = 0;
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == Fiber::done) ++finished;
    if (fiber.state == Fiber::in_warp) {
      fail("line %d: thread %u waits for lanes %#x of its warp, which never come", fiber.line, i, fiber.mask);
    }
    if (fiber.state != Fiber::at_barrier) continue;
    ++waiting;
    if (!first) first = &fiber;
    if (fiber.line != first->line)
      fail("threads of one block wait at different barriers, lines %d and %d", first->line, fiber.line);
  }
  if (finished)
    fail("line %d: %u threads wait at a barrier that %u others have left behind", first->line, waiting, finished);
  for (unsigned i = 0; i < threads; ++i) fibers[i]->state = Fiber::ready;
}

// `count` numbers from `first` on, in the order in which they take turns.
std::vector<unsigned> turns(unsigned first, unsigned count) {
  std::vector<unsigned> result(count);
  for (unsigned i = 0; i < count; ++i) result[i] = first + (turn_order == Order::descending ? count - 1 - i : i);
  if (turn_order == Order::shuffled) std::shuffle(result.begin(), result.end(), shuffler);
  return result;
}

// Each thread of a warp that can go on goes on once; whether there was any.
bool run_warp(unsigned warp, unsigned threads) {
  bool progress = false;
  const unsigned first = warp * kLanes;
  for (const unsigned i : turns(first, std::min(kLanes, threads - first))) {
    if (fibers[i]->state != Fiber::ready) continue;
    progress = true;
    resume(*fibers[i]);
  }
  return progress;
}

// A warp goes on through its exchanges until a barrier holds it, so that it overtakes the others where none does. If
// shuffled it may also be stopped between two exchanges.
void run_block(unsigned threads) {
  while (true) {
    bool progress = false;
    for (const unsigned warp : turns(0, (threads + kLanes - 1) / kLanes)) {
      const bool far = turn_order != Order::shuffled || shuffler() % 2;
      while (run_warp(warp, threads)) {
        progress = true;
        if (!far) break;
      }
    }
    if (progress) continue;
    if (std::all_of(fibers.begin(), fibers.begin() + threads, [](auto& f) { return f->state == Fiber::done; })) return;
    release_barrier(threads);
  }
}

}  // namespace

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fputs("emulated CUDA: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::_Exit(3);
}

void set_order(Order order, unsigned seed) {
  turn_order = order;
  shuffler.seed(seed);
}

void block_barrier(int line) { wait(Fiber::at_barrier, line); }

const std::uint64_t* warp_exchange(unsigned mask, std::uint64_t value, int line) {
  Fiber& self = *running;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned thread = self.index.x + blockDim.x * (self.index.y + blockDim.y * self.index.z);
  const unsigned base = thread / kLanes * kLanes, present = std::min(kLanes, threads - base);
  if (!(mask >> (thread - base) & 1)) fail("line %d: lane %u is not in its own mask %#x", line, thread - base, mask);
  // On the device a full mask also names the lanes that a short last warp does not have.
  if (present < kLanes) mask &= (1u << present) - 1;
  self.brought = value;
  self.mask = mask;
  self.line = line;
  self.state = Fiber::in_warp;
  bool complete = true;
  for (unsigned i = 0; i < present; ++i) {
    const Fiber& other = *fibers[base + i];
    if (!(mask >> i & 1)) continue;
    if (other.state == Fiber::done) fail("line %d: lane %u of mask %#x has already returned", line, i, mask);
    complete = complete && other.state == Fiber::in_warp;
    if (other.state != Fiber::in_warp) continue;
    if (other.mask != mask || other.line != line) {
      fail("lanes of one warp meet in different exchanges: line %d mask %#x, line %d mask %#x", line, mask, other.line,
           other.mask);
    }
  }
  if (complete) {
    for (unsigned i = 0; i < present; ++i) {
      if (!(mask >> i & 1)) continue;
      Fiber& other = *fibers[base + i];
      for (unsigned j = 0; j < kLanes; ++j)
        other.received[j] = mask >> j & 1 ? fibers[base + j]->brought : ~std::uint64_t(0);
      other.state = Fiber::ready;
    }
  } else {
    wait(Fiber::in_warp, line);
  }
  return self.received;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  if (config.stream != reinterpret_cast<cudaStream_t>(kStream))
    fail("a kernel was launched on another stream than the caller's");
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::uint64_t threads = std::uint64_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        poison_static_shared();
        for (unsigned i = 0; i < threads; ++i) {
          start(*fibers[i], {i % block.x, i / block.x % block.y, i / block.x / block.y});
        }
        run_block(static_cast<unsigned>(threads));
      }
    }
  }
  return cudaSuccess;
}

}  // namespace emulation
