// Runs the unchanged CUDA sources on a CPU, for tests: found before CUDA's own header, it gives a
// C++ compiler what the kernels use of the language and of the runtime.
//
// A block is one fiber a thread. A fiber runs from one shuffle or barrier to the next, in an order
// that the tests choose: up, down, or random and new at each step. So a missing barrier changes
// results, and one that not all threads reach, or a shuffle with a lane that has left, aborts.
// Special functions are exact, or as far off as the PTX ISA allows, in a direction that the tests
// choose.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ static
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time; it finds what the last one left
#define CB_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emulator::dynamic_shared.get())

// What the tests choose.
#pragma GCC visibility push(default)
extern "C" {
inline int emulated_order = 0;  // of threads: 0 up, 1 down, else the seed of a random one
inline int emulated_error = 0;  // of special functions: 0 none, 1 up, 2 down, 3 either
inline int emulated_multiprocessors = 132;
inline int emulated_shared = 228 << 10;  // bytes a multiprocessor
inline int emulated_idle = 0;            // launches do nothing: for timing the host
inline long emulated_launches = 0;
}
#pragma GCC visibility pop

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum State { RUN, SHUFFLE, SYNC_WARP, SYNC_BLOCK, DONE };
struct Fiber {
  static constexpr size_t STACK = 64 << 10;
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t context;
  jmp_buf at;
  bool started;
  State state;
  unsigned shuffles;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline jmp_buf scheduler_at;
inline int current;
inline std::function<void()> body;
inline std::unique_ptr<char[]> dynamic_shared;  // a new one, of NaN, for each block
inline std::vector<uint64_t> exchanged[2];      // one for each of two shuffles that may overlap

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u, %u, thread %d)\n", what, blockIdx.x,
               blockIdx.y, current);
  std::abort();
}

// Switching: without the system calls of swapcontext, which cost more than the kernels; but the
// sanitizer follows only those.
#if defined(__SANITIZE_ADDRESS__)
inline const void* scheduler_stack;
inline size_t scheduler_size;
inline void to_scheduler(Fiber& f) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(f.state == DONE ? nullptr : &fake, scheduler_stack,
                                 scheduler_size);
  swapcontext(&f.context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
inline void to_fiber(Fiber& f) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack.get(), Fiber::STACK);
  swapcontext(&scheduler, &f.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
inline void on_entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
}
#else
inline void to_scheduler(Fiber& f) {
  if (_setjmp(f.at) == 0) _longjmp(scheduler_at, 1);
}
inline void to_fiber(Fiber& f) {
  if (_setjmp(scheduler_at)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.context);
}
inline void on_entry() {}
#endif

inline void wait(State state) {
  fibers[current].state = state;
  to_scheduler(fibers[current]);
}
inline void entry() {
  on_entry();
  body();
  fibers[current].state = DONE;
  to_scheduler(fibers[current]);
}

// Threads [from, to) go on where all that live wait for the same.
inline bool release(State state, size_t from, size_t to) {
  size_t waiting = 0, done = 0;
  for (size_t i = from; i < to; ++i) {
    waiting += fibers[i].state == state, done += fibers[i].state == DONE;
  }
  if (waiting == 0 || waiting + done < to - from) return false;
  if (done) fail("a shuffle or barrier for all after a thread has left");
  for (size_t i = from; i < to; ++i)
    if (fibers[i].state == state) fibers[i].state = RUN;
  return true;
}

inline void run_block(std::mt19937& random, size_t shared) {
  const size_t n = blockDim.x;
  if (fibers.size() < n) fibers.resize(n);
  dynamic_shared.reset(new char[shared]);
  std::memset(dynamic_shared.get(), 0xff, shared);
  for (auto& slots : exchanged) slots.assign(n, 0);
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = fibers[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = Fiber::STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
    f.started = false, f.state = RUN, f.shuffles = 0;
  }
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (emulated_order == 1) std::reverse(order.begin(), order.end());
  for (bool moved = true; moved;) {
    if (emulated_order > 1) std::shuffle(order.begin(), order.end(), random);
    for (int i : order)
      if (fibers[i].state == RUN) {
        threadIdx.x = current = i;
        to_fiber(fibers[i]);
      }
    moved = release(SYNC_BLOCK, 0, n);
    for (size_t w = 0; w < n; w += 32)
      for (State state : {SHUFFLE, SYNC_WARP}) moved |= release(state, w, std::min(w + 32, n));
  }
  for (size_t i = 0; i < n; ++i)
    if (fibers[i].state != DONE) current = int(i), fail("a barrier that not all threads reach");
}

template <class V>
V shuffle(V value, int lane) {
  static_assert(sizeof(V) <= 8);
  Fiber& f = fibers[current];
  auto& slots = exchanged[f.shuffles++ % 2];
  std::memcpy(&slots[current], &value, sizeof(V));
  wait(SHUFFLE);
  if (lane < 0 || lane > 31) fail("a shuffle from no lane");
  std::memcpy(&value, &slots[(current & ~31) + lane], sizeof(V));
  return value;
}

// The result of a special function: subnormal numbers count as 0 (.ftz).
inline float off_by(double exact, double relative, double absolute = 0) {
  float y = float(exact);
  if (emulated_error && std::isfinite(y)) {
    uint32_t h;
    std::memcpy(&h, &y, 4);
    h = (h ^ h >> 15) * 2246822519u, h = (h ^ h >> 13) * 3266489917u, h ^= h >> 16;
    const double side = emulated_error == 1   ? 1
                        : emulated_error == 2 ? -1
                                              : double(h) / 2147483648.0 - 1;
    y = float(exact + side * (std::fabs(exact) * relative + absolute));
  }
  return std::fabs(y) < 0x1p-126f ? 0 : y;
}
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

}  // namespace emulator

// The special functions of csrc/cuda/math.cuh.
#define CBLOSS_SPECIAL_FUNCTIONS
namespace cbloss {
inline float ex2(float x) { return x == 0 ? 1 : emulator::off_by(std::exp2(double(x)), 0x1p-22); }
inline float rcp(float x) { return emulator::off_by(1 / double(emulator::flushed(x)), 0x1p-23); }
inline float rsqrt(float x) {
  return emulator::off_by(1 / std::sqrt(double(emulator::flushed(x))), 0x1p-22 * 0.536);  // 2^-22.9
}
inline float lg2(float x) {
  const double y = std::log2(double(emulator::flushed(x)));
  return x > 0.5f && x < 2 ? emulator::off_by(y, 0, 0x1p-22) : emulator::off_by(y, 0x1p-22);
}
inline float min(float a, float b) { return a != a ? a : b != b ? b : a < b ? a : b; }
inline float max(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
}  // namespace cbloss

inline void __syncthreads() { emulator::wait(emulator::SYNC_BLOCK); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::SYNC_WARP); }
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return emulator::shuffle(value, (emulator::current & 31) ^ mask);
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <class V>
V min(V a, V b) {
  return b < a ? b : a;
}
template <class V>
V max(V a, V b) {
  return a < b ? b : a;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Half types, rounded to nearest even.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    const uint32_t u = __float_as_uint(x);
    bits = x != x ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct __half {
  _Float16 value;
  __half() = default;
  __half(float x) : value(_Float16(x)) {}
  operator float() const { return float(value); }
};
template <class H>
struct alignas(4) Pair {
  H x, y;
};
using __nv_bfloat162 = Pair<__nv_bfloat16>;
using __half2 = Pair<__half>;
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline float __low2float(__half2 p) { return p.x; }
inline float __high2float(__half2 p) { return p.y; }
template <class H>
Pair<H> __hmax2(Pair<H> a, Pair<H> b) {  // the other where one is NaN
  return {std::fmax(float(a.x), float(b.x)), std::fmax(float(a.y), float(b.y))};
}

// The runtime.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  if (bytes > emulated_shared - 1024) emulator::fail("more shared memory than a block may have");
  static std::mutex mutex;
  static std::map<std::pair<void (*)(P...), int>, int> limits;  // of the devices emulated so far
  const std::lock_guard lock(mutex);
  int& limit = limits[{kernel, emulated_shared}];
  if (bytes < limit) emulator::fail("a limit that falls, below what another thread may launch");
  limit = bytes;
  return cudaSuccess;
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};
#define CUDART_VERSION 13000
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount                ? emulated_multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? emulated_shared
                                                                      : emulated_shared - 1024;
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... a) {
  ++emulated_launches;
  if (emulated_idle) return cudaSuccess;
  gridDim = config->gridDim, blockDim = config->blockDim;
  if (blockDim.x == 0 || blockDim.x > 1024 || gridDim.x == 0 || gridDim.y == 0 || gridDim.y > 65535)
    emulator::fail("a grid that no GPU takes");
  emulator::body = [&] { kernel(a...); };
  std::mt19937 random{unsigned(emulated_order)};
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      emulator::run_block(random, config->dynamicSmemBytes);
  return cudaSuccess;
}

// Of torch's: there are no streams and no devices to choose between.
struct DeviceGuardOpaque;
extern "C" {
inline __attribute__((used)) int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
inline __attribute__((used)) int aoti_torch_create_device_guard(int, DeviceGuardOpaque** guard) {
  *guard = nullptr;
  return 0;
}
}
#define CBLOSS_ARCHITECTURES "this CPU, emulated"
