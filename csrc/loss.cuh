// How ppo_loss and value_loss sum over a GPU in one cooperative launch: every block walks over its
// parts of sequences and leaves its sums; behind the grid's barrier the first block adds them up,
// in their order: no atomics, no counter to be zeroed before, equal bits for equal grids.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <atomic>

#include "kernels.h"
#include "loss.h"

namespace tppo {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kItems = 4;         // tokens of a thread in flight
constexpr int kBlocksPerSm = 2;   // resident at once at least, by __launch_bounds__
constexpr int kMaxBlocks = 1024;  // rows of the workspace

// Element i of a column; kFloats: all columns are fp32, so that no type is tested.
template <bool kFloats>
__device__ __forceinline__ float read(const Column& x, int64_t first, int64_t t) {
  const int64_t i = first + t * x.step;
  return kFloats ? static_cast<const float*>(x.data)[i] : element(x, i);
}

template <bool kMaximum>
__device__ __forceinline__ double join(double a, double b) {
  return kMaximum ? (a > b ? a : b) : a + b;
}

template <bool kMaximum>
__device__ __forceinline__ double warp_join(double x) {
  for (int offset = 16; offset > 0; offset /= 2)
    x = join<kMaximum>(x, __shfl_down_sync(~0u, x, offset));
  return x;
}

// The sum over a block, in every thread of it.
__device__ __forceinline__ double block_total(double x, double* shared) {
  x = warp_join<false>(x);
  __syncthreads();  // of the total before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared[w];
  return total;
}

// The tokens [first, last) of a sequence that are one of its parts: whole turns of a block, so that
// a short sequence is its first part alone.
struct Range {
  int64_t first, last;
};

__device__ __forceinline__ Range range_of(int64_t count, int part, int parts) {
  constexpr int64_t kTurn = kThreads * kItems;
  const int64_t each = (count + parts * kTurn - 1) / (parts * kTurn) * kTurn;
  const int64_t first = each * part < count ? each * part : count;
  return {first, first + each < count ? first + each : count};
}

// The valid tokens of a whole sequence, in every thread of the block.
__device__ __forceinline__ double count_tokens(const uint8_t* mask, int64_t count,
                                               double* shared) {
  if (!mask) return double(count);
  int64_t own = 0;
  const int64_t ahead = -reinterpret_cast<intptr_t>(mask) & 15;
  const int64_t lead = ahead < count ? ahead : count, fours = (count - lead) / 16;
  for (int64_t i = threadIdx.x; i < fours; i += kThreads) {
    const uint4 bytes = reinterpret_cast<const uint4*>(mask + lead)[i];
    for (const uint32_t x : {bytes.x, bytes.y, bytes.z, bytes.w})  // the bytes that are not 0
      own += __popc((((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u);
  }
  if (threadIdx.x < lead) own += mask[threadIdx.x] != 0;
  const int64_t rest = lead + fours * 16 + threadIdx.x;
  if (rest < count) own += mask[rest] != 0;
  return block_total(double(own), shared);
}

// parts [grid, kSums] is written, and read behind the barrier; column kMaximum of the sums is a
// maximum. Returns true in the one thread that then has the sums of the whole grid, in `totals`.
template <int kSums, int kMaximum>
__device__ bool grid_totals(const double (&sums)[kSums], double* parts, double* totals) {
  __shared__ double warps[kSums][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const double x = k == kMaximum ? warp_join<true>(sums[k]) : warp_join<false>(sums[k]);
    if (lane == 0) warps[k][warp] = x;
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    const int k = threadIdx.x;
    double x = warps[k][0];
    for (int w = 1; w < kWarps; ++w)
      x = k == kMaximum ? join<true>(x, warps[k][w]) : join<false>(x, warps[k][w]);
    parts[int64_t(blockIdx.x) * kSums + k] = x;
  }
  cooperative_groups::this_grid().sync();
  if (blockIdx.x != 0) return false;
  for (int k = warp; k < kSums; k += kWarps) {
    double x = 0;
    for (int block = lane; block < int(gridDim.x); block += 32) {
      const double part = __ldcg(parts + int64_t(block) * kSums + k);
      x = k == kMaximum ? join<true>(x, part) : join<false>(x, part);
    }
    x = k == kMaximum ? warp_join<true>(x) : warp_join<false>(x);
    if (lane == 0) totals[k] = x;
  }
  __syncthreads();
  return threadIdx.x == 0;
}

// How many blocks of a kernel are resident on the current device at once; asked once a device.
template <auto kKernel>
cudaError_t resident_blocks(int* blocks) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, processors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  *blocks = device < kDevices ? known[device].load() : 0;
  if (*blocks) return cudaSuccess;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, kThreads, 0);
  *blocks = processors * each;
  if (device < kDevices) known[device].store(*blocks);
  return error;
}

// Launches a kernel of (batch, parts of a sequence, sums of blocks) over as many blocks as are of
// use and resident together, which the grid's barrier needs. Sequences of few are split, if they
// can be, so that every block has a part.
template <auto kKernel, typename Batch>
const char* launch_over(const Batch& batch, bool divisible, double* sums, void* stream) {
  int resident = 0;
  cudaError_t error = resident_blocks<kKernel>(&resident);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (resident == 0) return "no block of the loss's kernel fits on this device";
  const int64_t B = batch.layout.B, most = std::min(kMaxBlocks, resident);
  const int64_t longest = batch.layout.offsets ? batch.layout.N : batch.layout.T;  // at most
  const int64_t turns = (longest + kThreads * kItems - 1) / (kThreads * kItems);
  const int parts = divisible && B > 0 ? int(std::max<int64_t>(1, std::min(most / B, turns))) : 1;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min(B * parts, most)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kKernel, batch, parts, sums);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tppo
