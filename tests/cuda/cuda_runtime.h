// A CUDA kernel's source, compiled by a C++ compiler and run on the CPU: every thread of a block is
// a fibre, which yields where the threads of a GPU would wait for one another. Blocks run one after
// another, the last first. Stands in for <cuda_runtime.h> where a test puts this folder first.
//
// It knows what our kernels use: shared memory, __syncthreads, shuffles of whole warps, launches
// through cudaLaunchKernelEx. A wait that cannot end aborts with a message; so does a shuffle of
// part of a warp. It shows wrong indices, wrong algebra and missing barriers of some kinds, not
// what hardware alone decides: memory order between blocks, alignment, speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 17;

struct Warp {
  uint64_t slots[2][kWarp];
  int64_t arrived;
  int idle;  // turns since a lane got on
};

struct Fibre {
  std::vector<char> stack;
  jmp_buf at;
  ucontext_t start;
  int64_t shuffles, barriers;
  bool begun, done;
};

inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline int64_t at_barrier, idle;
inline int current, threads, finished;
inline jmp_buf scheduler;
inline ucontext_t home;
inline const std::function<void()>* body;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated CUDA, block %u thread %u: %s\n", blockIdx.x, threadIdx.x, why);
  std::abort();
}

inline void enter() {
  (*body)();
  fibres[current].done = true;
  _longjmp(scheduler, 1);
}

inline void resume(int index) {
  current = index;
  threadIdx = dim3(index);
  Fibre& fibre = fibres[index];
  if (fibre.begun) _longjmp(fibre.at, 1);
  fibre.begun = true;
  setcontext(&fibre.start);
}

// On to another thread that has not ended: of the same warp while that gets on, so that a warp runs
// ahead of the others as far as barriers let it.
inline void yield() {
  if (++idle > 4 * threads) fail("threads wait for one another without end");
  if (_setjmp(fibres[current].at)) return;
  int next = current;
  Warp& warp = warps[current / kWarp];
  if (++warp.idle > kWarp) {
    warp.idle = 0;
    next = (current / kWarp + 1) * kWarp - 1;  // the next warp's first lane comes behind it
  }
  do next = (next + 1) % threads;
  while (fibres[next].done);
  if (next / kWarp != current / kWarp && warp.idle) {  // behind the last lane: the first again
    next = current / kWarp * kWarp;
    while (fibres[next].done) ++next;
  }
  resume(next);
}

template <class Ready>
void wait(const Ready& ready) {
  idle = warps[current / kWarp].idle = 0;  // this arrival was progress
  while (!ready()) yield();
}

// Runs the threads of one block to their ends.
inline void run_block() {
  for (Warp& warp : warps) warp.arrived = warp.idle = 0;
  at_barrier = idle = 0;
  for (Fibre& fibre : fibres) {
    fibre.shuffles = fibre.barriers = 0;
    fibre.begun = fibre.done = false;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.data();
    fibre.start.uc_stack.ss_size = fibre.stack.size();
    fibre.start.uc_link = &home;
    makecontext(&fibre.start, enter, 0);
  }
  static volatile int index;  // survives the jumps
  finished = 0;
  _setjmp(scheduler);
  idle = 0;
  for (index = 0; index < threads; index = index + 1)
    if (!fibres[index].done) resume(index);
}

inline void run_grid(dim3 grid, dim3 block, const std::function<void()>& call) {
  gridDim = grid, blockDim = block, threads = int(block.x), body = &call;
  if (threads % kWarp) fail("a block of whole warps is expected");
  fibres.resize(threads);
  warps.resize(threads / kWarp);
  for (Fibre& fibre : fibres) fibre.stack.resize(kStack);
  for (unsigned b = grid.x; b-- > 0;) {
    blockIdx = dim3(b);
    run_block();
  }
}

// What lane `from` of this warp gave; all lanes must come. The two halves of the slots alternate,
// so that a lane which is late can still read.
template <class T>
T exchange(unsigned mask, T mine, int from) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) fail("a shuffle of part of a warp");
  Fibre& fibre = fibres[current];
  Warp& warp = warps[current / kWarp];
  const int64_t turn = fibre.shuffles++;
  std::memcpy(&warp.slots[turn % 2][current % kWarp], &mine, sizeof(T));
  ++warp.arrived;
  wait([&warp, turn] { return warp.arrived >= kWarp * (turn + 1); });
  T theirs;
  std::memcpy(&theirs, &warp.slots[turn % 2][from], sizeof(T));
  return theirs;
}

}  // namespace emulated

inline void __syncthreads() {
  const int64_t turn = emulated::fibres[emulated::current].barriers++;
  ++emulated::at_barrier;
  emulated::wait([turn] { return emulated::at_barrier >= emulated::threads * (turn + 1); });
}

template <class T>
T __ldcg(const T* x) {
  return *x;
}

template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return emulated::exchange(mask, x, lane % 32);
}

template <class T>
T __shfl_down_sync(unsigned mask, T x, int step) {
  const int lane = emulated::current % 32;
  return emulated::exchange(mask, x, lane + step < 32 ? lane + step : lane);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return emulated::exchange(mask, x, (emulated::current % 32) ^ bits);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

constexpr int cudaLaunchAttributeCooperative = 1, cudaDevAttrMultiProcessorCount = 2;
struct cudaLaunchAttribute {
  int id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// A small GPU, so that its blocks must take several pieces of work each.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 2;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulated::run_grid(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
