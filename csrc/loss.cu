#include "loss.cuh"

namespace tppo {
namespace {

__device__ __forceinline__ void store(const Slopes& x, int64_t i, float value) {
  if (x.dtype == kFp32) static_cast<float*>(x.out)[i] = value;
  if (x.dtype == kBf16) static_cast<uint16_t*>(x.out)[i] = to_bf16(value);
  if (x.dtype == kFp16) static_cast<uint16_t*>(x.out)[i] = to_fp16(value);
}

// Both gradients in one launch; 8 B an element in fp32.
__global__ void __launch_bounds__(kThreads)
    loss_bwd_kernel(Slopes a, Slopes b, const float* grad_loss, const float* scale) {
  const float factor = *grad_loss * *scale;
  const int64_t first = int64_t(blockIdx.x) * kThreads * kItems + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int64_t i = first + j * kThreads;
    if (i < a.count) store(a, i, times(a.slopes[i], factor));
    if (i < b.count) store(b, i, times(b.slopes[i], factor));
  }
}

}  // namespace

const char* loss_bwd_cuda(const Slopes& a, const Slopes& b, const float* grad_loss,
                          const float* scale, void* stream) {
  constexpr int64_t kTile = kThreads * kItems;
  const int64_t blocks = (std::max(a.count, b.count) + kTile - 1) / kTile;
  if (blocks == 0) return nullptr;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, loss_bwd_kernel, a, b, grad_loss, scale);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tppo
