// How ppo_loss and value_loss sum over a GPU in one cooperative launch: every block walks over its
// sequences and leaves its sums; behind the grid's barrier the first block adds them up, in their
// order. No atomics, no counter that someone must have zeroed, equal bits for equal grids.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "kernels.h"
#include "loss.h"

namespace tppo {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kItems = 4;         // tokens of a thread in flight
constexpr int kBlocksPerSm = 2;   // resident at once, by __launch_bounds__: what the barrier needs
constexpr int kMaxBlocks = 1024;  // rows of the workspace

// Element i of a column; kFloats: all columns are fp32, and nothing is asked.
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

// Launches a kernel of (batch, parts) over as many blocks as are of use and fit on the device.
template <typename Batch>
const char* launch_over(void (*kernel)(Batch, double*), Batch batch, int64_t B, double* parts,
                        void* stream) {
  int device = 0, processors = 1;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t room = std::min(kMaxBlocks, kBlocksPerSm * processors);
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min(B, room)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, batch, parts);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tppo
