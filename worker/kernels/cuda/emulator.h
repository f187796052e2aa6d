// The kernels as C++ on a processor, for tests where there is no GPU: the threads of a block are fibers that take turns.
//
// A fiber runs until it meets the others at a barrier or in a warp's exchange. That all of a block meet at the same barriers is checked:
// what may hang on a GPU ends the process here. Shared memory begins full of NaN, so that nothing is read before it is written.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

namespace emulator {

struct Index {
  unsigned x, y, z;
};

enum class Meeting { none, warp, block, end };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Meeting meeting;
};

static thread_local Index thread_index, block_index, grid_size, block_size;
static thread_local std::vector<Fiber> fibers;
static thread_local std::vector<float> exchanged;
static thread_local ucontext_t scheduler;
static thread_local void (*body)(void*);
static thread_local void* body_arguments;
// A variable of unknown size in a kernel is this one.
static thread_local float* shared_memory;

static void meet(Meeting meeting) {
  Fiber& self = fibers[thread_index.x];
  self.meeting = meeting;
  swapcontext(&self.context, &scheduler);
}

static void start() {
  body(body_arguments);
  meet(Meeting::end);
}

static void fail(const char* problem) {
  fprintf(stderr, "emulated kernel: %s\n", problem);
  abort();
}

// Runs each fiber of a warp to its next meeting, until all of them wait for the rest of the block.
static Meeting run_warp(unsigned first, unsigned end) {
  while (true) {
    for (unsigned index = first; index < end; ++index) {
      thread_index = {index, 0, 0};
      swapcontext(&scheduler, &fibers[index].context);
      if (fibers[index].meeting != fibers[first].meeting) fail("threads of a warp went separate ways");
    }
    if (fibers[first].meeting != Meeting::warp) return fibers[first].meeting;
  }
}

static void run_block() {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  unsigned num = fibers.size();
  std::vector<bool> done((num + 31) / 32, false);
  bool running = true;
  while (running) {
    bool waiting = false, ended = false;
    for (unsigned first = 0; first < num; first += 32) {
      if (done[first / 32]) {
        ended = true;
        continue;
      }
      bool here = run_warp(first, first + 32 < num ? first + 32 : num) == Meeting::end;
      done[first / 32] = here;
      (here ? ended : waiting) = true;
    }
    if (waiting && ended) fail("a thread ended while others wait for it");
    running = waiting;
  }
}

template <class... Parameters, size_t... I>
void launch(void (*kernel)(Parameters...), std::index_sequence<I...>, const unsigned* shape, void** arguments) {
  // Keeps the arguments' values while the fibers run.
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> values;
  } call{kernel, {*static_cast<Parameters*>(arguments[I])...}};
  body = [](void* call) { std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->values); };
  body_arguments = &call;
  grid_size = {shape[0], shape[1], 1};
  block_size = {shape[2], 1, 1};
  fibers.resize(shape[2]);
  exchanged.resize(shape[2]);
  for (Fiber& fiber : fibers) fiber.stack.resize(64 * 1024);
  std::vector<float> shared(shape[3] / sizeof(float));
  shared_memory = shared.data();
  for (unsigned y = 0; y < shape[1]; ++y) {
    for (unsigned x = 0; x < shape[0]; ++x) {
      block_index = {x, y, 0};
      shared.assign(shared.size(), std::numeric_limits<float>::quiet_NaN());
      run_block();
    }
  }
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const unsigned* shape, void** arguments) {
  launch(kernel, std::index_sequence_for<Parameters...>{}, shape, arguments);
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define gridDim emulator::grid_size
#define blockDim emulator::block_size
#define SHARED_FLOATS(name) float* name = emulator::shared_memory
#define __syncthreads() emulator::meet(emulator::Meeting::block)

static inline float __shfl_xor_sync(unsigned, float value, int distance) {
  unsigned self = threadIdx.x;
  emulator::exchanged[self] = value;
  emulator::meet(emulator::Meeting::warp);
  float other = emulator::exchanged[self ^ distance];
  emulator::meet(emulator::Meeting::warp);
  return other;
}

static inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }

static inline float half_to_float(unsigned short bits) {
  _Float16 value;
  memcpy(&value, &bits, sizeof value);
  return (float)value;
}

static inline unsigned short float_to_half(float value) {
  _Float16 half = (_Float16)value;
  unsigned short bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}

static inline float bfloat_to_float(unsigned short bits) {
  unsigned wide = (unsigned)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

static inline unsigned short float_to_bfloat(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  // A NaN keeps its upper bits and stays one; else to nearest, ties to even.
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x40u);
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline unsigned char float_to_e4m3(float value) {
  unsigned char sign = std::signbit(value) ? 0x80 : 0;
  float size = fabsf(value);
  if (std::isnan(size)) return sign | 0x7f;
  if (size >= 448.0f) return sign | 0x7e;
  // The distance of two neighbours: 2^-9 up to 2^-6, and beyond it an eighth of the power of two below.
  int exponent = size < 0.015625f ? -6 : ilogbf(size);
  int steps = (int)nearbyintf(ldexpf(size, 3 - exponent));
  // Eight steps above the smallest power are the next one's first: the sum carries.
  return sign | (unsigned char)((exponent + 6) * 8 + steps);
}

static inline unsigned short floats_to_e4m3(float first, float second) {
  return (unsigned short)(float_to_e4m3(first) | float_to_e4m3(second) << 8);
}
