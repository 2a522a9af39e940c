// token_head on a GPU. Forward: one launch, hidden read once. Backward: two launches, hidden read
// once and its gradient written once; the second adds up the parts of weight's gradient in order.
// Compiled for K = 1 (values, rewards) and K = 3 (reward classes). Masked rows are not read. D is a
// multiple of a group of 16 bytes, and all rows begin at one.
#include <cuda_runtime.h>

#include "token_head.h"

namespace tppo {
namespace {

constexpr int kWarp = 32, kFwdThreads = 256, kBwdThreads = 128, kMergeThreads = 256;
constexpr int kRows = 4;  // of a thread in flight: 64 bytes of hidden

__device__ float element(const void* x, int64_t i, int dtype) {
  return head_value(dtype == kFp32 ? static_cast<const uint32_t*>(x)[i]
                                   : static_cast<const uint16_t*>(x)[i],
                    dtype);
}

__device__ void set_element(void* x, int64_t i, int dtype, float value) {
  const uint32_t bits = head_bits(value, dtype);
  if (dtype == kFp32)
    static_cast<uint32_t*>(x)[i] = bits;
  else
    static_cast<uint16_t*>(x)[i] = uint16_t(bits);
}

// Columns [d, d + kHeadColumns) of a row that begins at element `off`, 0 from D on.
template <int kDtype>
__device__ HeadGroup load_group(const void* x, int64_t off, int64_t d, int64_t D) {
  constexpr int kBytes = kDtype == kFp32 ? 4 : 2;
  if (d >= D) return HeadGroup{};
  return *reinterpret_cast<const HeadGroup*>(static_cast<const char*>(x) + (off + d) * kBytes);
}

// kRows adjacent rows: where each begins in hidden, and whether it is one and valid.
struct RowsInFlight {
  int64_t off[kRows];
  bool valid[kRows];

  __device__ RowsInFlight(const HeadInputs& in, int64_t first) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r;
      valid[r] = row < in.N && (!in.mask || in.mask[row]);
      off[r] = row * in.outer;
      if (in.inner > 1) {  // 32 bits: a division by 64 would cost more than the row's arithmetic
        const uint32_t batch = uint32_t(row) / uint32_t(in.inner);
        off[r] = batch * in.outer + (uint32_t(row) - batch * uint32_t(in.inner)) * in.stride;
      }
    }
  }

  template <int kDtype>
  __device__ void load(const HeadInputs& in, int64_t d, HeadGroup* x) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      x[r] = valid[r] ? load_group<kDtype>(in.hidden, off[r], d, in.D) : HeadGroup{};
  }
};

// A warp takes kRows rows; weight comes from the L1 cache, once for all of them.
template <int kDtype, int kWeight, int K>
__global__ void __launch_bounds__(kFwdThreads, K == 1 ? 3 : 1)
    token_head_fwd_kernel(HeadInputs in, float* out) {
  constexpr int kColumns = kHeadColumns<kDtype>;
  const int lane = threadIdx.x % kWarp;
  const int64_t first =
      (int64_t(blockIdx.x) * (kFwdThreads / kWarp) + threadIdx.x / kWarp) * kRows;
  const RowsInFlight rows(in, first);
  float sums[kRows][K] = {};
#pragma unroll 2
  for (int64_t d = lane * kColumns; d < in.D; d += kWarp * kColumns) {
    HeadGroup x[kRows];
    rows.load<kDtype>(in, d, x);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      HeadGroup w[kColumns / kHeadColumns<kWeight>];
#pragma unroll
      for (int part = 0; part < kColumns / kHeadColumns<kWeight>; ++part)
        w[part] = load_group<kWeight>(in.weight, k * in.D, d + part * kHeadColumns<kWeight>, in.D);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float weight = head_value_of<kWeight>(w[j / kHeadColumns<kWeight>],
                                                    j % kHeadColumns<kWeight>);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r][k] += head_value_of<kDtype>(x[r], j) * weight;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float sum = sums[r][k];
      for (int bits = kWarp / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
      if (in.bias) sum += element(in.bias, k, in.bias_dtype);
      if (lane == 0 && first + r < in.N) out[(first + r) * K + k] = rows.valid[r] ? sum : 0.f;
    }
}

// A block takes kBwdThreads groups of columns of every `parts`-th kRows rows. Weight and the sums
// of its gradient stay in registers; that of bias, which may cancel, is added up in fp64 and left
// in two parts. parts_out [parts, K D + 2 K] or null; dx or null.
template <int kDtype, int K>
__global__ void __launch_bounds__(kBwdThreads)
    token_head_bwd_kernel(HeadInputs in, const float* grad, int parts, void* dx,
                          float* parts_out) {
  constexpr int kColumns = kHeadColumns<kDtype>;
  const int part = blockIdx.x % parts;
  const int64_t d = (int64_t(blockIdx.x / parts) * kBwdThreads + threadIdx.x) * kColumns;
  float weight[K][kColumns], sums[K][kColumns] = {};
  double bias[K] = {};
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      weight[k][j] = d < in.D ? element(in.weight, k * in.D + d + j, in.weight_dtype) : 0.f;
  for (int64_t first = int64_t(part) * kRows; first < in.N; first += int64_t(parts) * kRows) {
    const RowsInFlight rows(in, first);
    HeadGroup x[kRows];
    if (parts_out) rows.load<kDtype>(in, d, x);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float out[kColumns] = {};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float g = rows.valid[r] ? grad[(first + r) * K + k] : 0.f;
        if (d == 0) bias[k] += g;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          out[j] += g * weight[k][j];
          if (parts_out) sums[k][j] += g * head_value_of<kDtype>(x[r], j);
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (!rows.valid[r]) out[j] = 0.f;  // 0 times a weight that is not finite
      if (dx && first + r < in.N && d < in.D)
        static_cast<HeadGroup*>(dx)[((first + r) * in.D + d) / kColumns] = head_group<kDtype>(out);
    }
  }
  if (!parts_out) return;
  float* own = parts_out + part * (K * in.D + 2 * K);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      if (d < in.D) own[k * in.D + d + j] = sums[k][j];
    if (d == 0) {
      own[K * in.D + k] = float(bias[k]);
      own[K * in.D + K + k] = float(bias[k] - float(bias[k]));
    }
  }
}

// The sums of all parts: of weight's gradient, K D numbers, and behind it of that of bias.
__global__ void __launch_bounds__(kMergeThreads)
    token_head_merge_kernel(HeadInputs in, int parts, const float* parts_in, void* dweight,
                            void* dbias) {
  constexpr int kSlices = kMergeThreads / kWarp;
  __shared__ double shared[kSlices][kWarp];
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t count = in.K * in.D, size = count + in.K;
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane;
  double sum = 0;
  if (column < size)
    for (int part = slice; part < parts; part += kSlices) {
      const float* own = parts_in + part * (size + in.K);
      sum += own[column];
      if (column >= count) sum += own[column + in.K];
    }
  shared[slice][lane] = sum;
  __syncthreads();
  if (slice || column >= size) return;
  for (int i = 1; i < kSlices; ++i) sum += shared[i][lane];
  if (column < count && dweight) set_element(dweight, column, in.weight_dtype, float(sum));
  if (column >= count && dbias) set_element(dbias, column - count, in.bias_dtype, float(sum));
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int kDtype, int K>
const char* fwd_outputs(const HeadInputs& in, float* out, void* stream) {
  const int64_t rows = kFwdThreads / kWarp * kRows, blocks = (in.N + rows - 1) / rows;
  if (in.weight_dtype == kDtype)
    return launch(token_head_fwd_kernel<kDtype, kDtype, K>, blocks, kFwdThreads, stream, in, out);
  return launch(token_head_fwd_kernel<kDtype, kFp32, K>, blocks, kFwdThreads, stream, in, out);
}

template <int kDtype>
const char* fwd_typed(const HeadInputs& in, float* out, void* stream) {
  return in.K == 1 ? fwd_outputs<kDtype, 1>(in, out, stream)
                   : fwd_outputs<kDtype, 3>(in, out, stream);
}

template <int kDtype>
const char* bwd_typed(const HeadInputs& in, const float* grad, int parts, void* dx, float* sums,
                      void* stream) {
  const auto kernel =
      in.K == 1 ? token_head_bwd_kernel<kDtype, 1> : token_head_bwd_kernel<kDtype, 3>;
  const int64_t columns = kBwdThreads * kHeadColumns<kDtype>;
  return launch(kernel, (in.D + columns - 1) / columns * parts, kBwdThreads, stream, in, grad,
                parts, dx, sums);
}

}  // namespace

const char* token_head_fwd_cuda(const HeadInputs& in, float* out, void* stream) {
  return in.dtype == kFp32   ? fwd_typed<kFp32>(in, out, stream)
         : in.dtype == kBf16 ? fwd_typed<kBf16>(in, out, stream)
                             : fwd_typed<kFp16>(in, out, stream);
}

const char* token_head_bwd_cuda(const HeadInputs& in, const float* grad, int parts, void* dx,
                                void* dweight, void* dbias, float* sums, void* stream) {
  const char* error = in.dtype == kFp32   ? bwd_typed<kFp32>(in, grad, parts, dx, sums, stream)
                      : in.dtype == kBf16 ? bwd_typed<kBf16>(in, grad, parts, dx, sums, stream)
                                          : bwd_typed<kFp16>(in, grad, parts, dx, sums, stream);
  if (error || !sums) return error;
  const int64_t size = in.K * in.D + in.K;
  return launch(token_head_merge_kernel, (size + kWarp - 1) / kWarp, kMergeThreads, stream, in,
                parts, static_cast<const float*>(sums), dweight, dbias);
}

}  // namespace tppo
