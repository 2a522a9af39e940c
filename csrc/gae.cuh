// The walk over a sequence that gae.cu and token_advantages.cu share: a parallel scan of gae.h's
// maps. A thread holds kGroup adjacent tokens (one 16-byte load of fp32), a warp kRounds times 32
// such groups, a block of kThreads either one sequence (kWarps = 8) or one a warp (kWarps = 1).
// Chunks go from the last token to the first and hand a carry on. Every token is read once.
//
// Positions count from a multiple of kGroup at or before the first token of the sequence in the
// dense outputs, so that a group is aligned wherever a sequence begins. An input at another phase
// (row strides, views) is read element by element: the same bytes, more instructions.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "gae.h"
#include "kernels.h"

namespace tppo::sequence {

constexpr int kWarp = 32, kThreads = 256, kGroup = 4, kRounds = 2;
constexpr int kTile = kWarp * kGroup;         // tokens of a warp in a round
constexpr int64_t kWarpChunk = kTile * kRounds;
constexpr unsigned kAll = 0xffffffffu;

struct Group {
  uint32_t word[kGroup];  // fp32: a word each; 16-bit types: two in a word
};

__device__ inline bool aligned(const void* p, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

__device__ inline float widen(uint32_t bits, int dtype) {
  if (dtype == kFp32) return __uint_as_float(bits);
  if (dtype == kBf16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ inline float value_of(const Group& group, int dtype, int j) {
  if (dtype == kFp32) return __uint_as_float(group.word[j]);
  return widen((group.word[j / 2] >> (16 * (j % 2))) & 0xffffu, dtype);
}

__device__ inline float value_at(const PerSequence& x, int64_t b) {
  if (!x.data) return x.value;
  const int64_t i = b * x.stride;
  return widen(x.dtype == kFp32 ? static_cast<const uint32_t*>(x.data)[i]
                                : static_cast<const uint16_t*>(x.data)[i],
               x.dtype);
}

// One sequence: its n tokens begin at `begin` of the dense outputs, at `row * stride` of an input.
struct Span {
  int64_t begin, n, row;
  bool packed;
  __device__ int64_t at(int64_t stride) const { return packed ? begin : row * stride; }
  __device__ int64_t phase() const { return begin % kGroup; }
};

__device__ inline Span span_of(const Sequences& s, int64_t b) {
  if (!s.offsets) return {b * s.T, s.T, b, false};
  return {s.offsets[b], int64_t(s.offsets[b + 1]) - s.offsets[b], b, true};
}

// Tokens t .. t + kGroup - 1 of a sequence; those outside [0, n) are 0.
__device__ inline Group load(const Tokens& x, const Span& span, int64_t t) {
  Group group = {};
  const bool whole = t >= 0 && t + kGroup <= span.n;
  const int64_t first = span.at(x.stride) + t;
  if (x.dtype == kFp32) {
    const uint32_t* p = static_cast<const uint32_t*>(x.data) + first;
    if (whole && aligned(p, 16)) {
      const uint4 four = *reinterpret_cast<const uint4*>(p);
      return {four.x, four.y, four.z, four.w};
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (t + j >= 0 && t + j < span.n) group.word[j] = p[j];
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + first;
    if (whole && aligned(p, 8)) {
      const uint2 four = *reinterpret_cast<const uint2*>(p);
      return {four.x, four.y};
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (t + j >= 0 && t + j < span.n) group.word[j / 2] |= uint32_t(p[j]) << (16 * (j % 2));
  }
  return group;
}

// Byte j is 1 where token t + j lies inside the sequence and is valid. mask: [B, T] or [N]; null is
// all True. As loaded, so that nothing waits for it before the next loads are on their way.
__device__ inline uint32_t load_mask(const Mask& mask, const Span& span, int64_t t) {
  const uint8_t* p = mask.data ? mask.data + span.at(mask.stride) + t : nullptr;
  const bool whole = t >= 0 && t + kGroup <= span.n;
  if (p && whole && aligned(p, 4)) return *reinterpret_cast<const uint32_t*>(p);
  uint32_t bytes = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (t + j >= 0 && t + j < span.n && (!p || p[j])) bytes |= 1u << (8 * j);
  return bytes;
}

__device__ inline bool has(uint32_t bytes, int j) { return bytes >> (8 * j) & 1; }

__device__ inline void store(float* out, const Span& span, int64_t t, const float* values) {
  float* p = out + span.begin + t;
  if (t >= 0 && t + kGroup <= span.n && aligned(p, 16)) {
    *reinterpret_cast<float4*>(p) = make_float4(values[0], values[1], values[2], values[3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (t + j >= 0 && t + j < span.n) p[j] = values[j];
}

__device__ inline GaeMap from_lane(const GaeMap& map, int lane) {
  return {__shfl_sync(kAll, map.decay, lane), __shfl_sync(kAll, map.add, lane),
          __shfl_sync(kAll, map.value_decay, lane), __shfl_sync(kAll, map.value_add, lane)};
}

__device__ inline GaeMap lanes_behind(const GaeMap& map, int step) {
  return {__shfl_down_sync(kAll, map.decay, step), __shfl_down_sync(kAll, map.add, step),
          __shfl_down_sync(kAll, map.value_decay, step),
          __shfl_down_sync(kAll, map.value_add, step)};
}

// Each lane's map joined with those of all lanes behind it.
__device__ inline GaeMap join_lanes(GaeMap map, int lane) {
  for (int step = 1; step < kWarp; step *= 2) {
    const GaeMap behind = lanes_behind(map, step);
    if (lane + step < kWarp) map = gae_join(map, behind);
  }
  return map;
}

// The carry after maps[first .. last), which are those of stretches from left to right.
__device__ inline GaeCarry apply_maps(const GaeMap* maps, int first, int last, GaeCarry carry) {
  const int lane = threadIdx.x % kWarp;
  for (int end = last; end > first; end -= kWarp) {
    const int i = end - kWarp + lane;
    const GaeMap all = join_lanes(i >= first ? maps[i] : gae_identity(), lane);
    carry = gae_apply(from_lane(all, 0), carry);
  }
  return carry;
}

// What a thread knows of kGroup tokens after loading: inputs that the scan needs, 0 where invalid.
struct Steps {
  float reward[kGroup], value[kGroup];
  uint32_t valid;  // as `load_mask`
};

__device__ inline GaeMap map_of(const Steps& steps, const GaeScale& scale) {
  GaeMap map = gae_identity();
#pragma unroll
  for (int j = kGroup - 1; j >= 0; --j)
    if (has(steps.valid, j)) map = gae_join(gae_map(steps.reward[j], steps.value[j], scale), map);
  return map;
}

// The part of a sequence that one block walks: chunks [first, last).
struct Part {
  int64_t first, last;
};

template <int kWarps>
__device__ Part part_of(const Span& span, int part, int parts) {
  const int64_t chunk = kWarpChunk * kWarps;
  const int64_t chunks = (span.phase() + span.n + chunk - 1) / chunk;
  const int64_t each = (chunks + parts - 1) / parts;
  const int64_t first = each * part < chunks ? each * part : chunks;
  return {first, first + each < chunks ? first + each : chunks};
}

// Results of a thread's tokens; `joined` and `behind` say what lies behind its lane and its round.
template <class Source>
__device__ void emit_round(Source& tokens, const Span& span, int64_t t,
                           const typename Source::Raw& raw, const Steps& steps,
                           const GaeMap& joined, const GaeScale& scale, GaeCarry behind) {
  const GaeMap lanes = lanes_behind(joined, 1);
  if (threadIdx.x % kWarp < kWarp - 1) behind = gae_apply(lanes, behind);
  GaeResult results[kGroup];
#pragma unroll
  for (int j = kGroup - 1; j >= 0; --j) {
    results[j] = {0.f, 0.f};
    if (!has(steps.valid, j)) continue;
    results[j] = gae_result(steps.reward[j], steps.value[j], behind, scale);
    behind = gae_apply(gae_map(steps.reward[j], steps.value[j], scale), behind);
  }
  tokens.emit(span, t, raw, steps, results);
}

// Joins the maps of a part, or emits it with the carry behind it. tokens: load(span, t) -> Raw,
// steps(raw) -> Steps, emit(span, t, raw, steps, results), each for the kGroup tokens from t on.
// shared: [2][kWarps], of which `turn` says the half that is free. Returns the part's map.
template <int kWarps, bool kEmit, class Source>
__device__ GaeMap walk(Source& tokens, const Span& span, const Part& part, const GaeScale& scale,
                       GaeCarry carry, GaeMap (*shared)[kWarps], int& turn) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % kWarps;
  GaeMap whole = gae_identity();
  for (int64_t chunk = part.last - 1; chunk >= part.first; --chunk) {
    const int64_t t0 = (chunk * kWarps + warp) * kWarpChunk + lane * kGroup - span.phase();
    typename Source::Raw raw[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) raw[r] = tokens.load(span, t0 + r * kTile);
    Steps steps[kRounds];
    GaeMap joined[kRounds], total = gae_identity();
#pragma unroll
    for (int r = kRounds - 1; r >= 0; --r) {
      steps[r] = tokens.steps(raw[r]);
      joined[r] = join_lanes(map_of(steps[r], scale), lane);
      total = gae_join(from_lane(joined[r], 0), total);
    }
    GaeCarry mine = carry;  // behind this warp's tokens
    if (kWarps > 1) {
      if (lane == 0) shared[turn][warp] = total;
      __syncthreads();
      const GaeMap from = join_lanes(lane < kWarps ? shared[turn][lane] : gae_identity(), lane);
      mine = gae_apply(from_lane(from, warp + 1), carry);  // the identity behind the last warp
      total = from_lane(from, 0);                          // now of the whole block
      turn ^= 1;  // the next chunk writes the other half: one barrier a chunk is enough
    }
    carry = gae_apply(total, carry);
    whole = gae_join(total, whole);
    if constexpr (kEmit) {
#pragma unroll
      for (int r = kRounds - 1; r >= 0; --r) {
        emit_round(tokens, span, t0 + r * kTile, raw[r], steps[r], joined[r], scale, mine);
        mine = gae_apply(from_lane(joined[r], 0), mine);
      }
    }
  }
  return whole;
}

// The part `task % parts` of the sequence `task / parts`; its map goes to maps [B, parts], or its
// results out, with the carry that the maps of the parts behind it give.
template <int kWarps, bool kEmit, class Source>
__device__ void walk_task(Source& tokens, const GaeInputs& in, int64_t task, int parts,
                          GaeMap* maps, GaeMap (*shared)[kWarps], int& turn) {
  const int64_t b = task / parts;
  const int part = int(task % parts);
  const Span span = span_of(in.sequences, b);
  const GaeScale scale{value_at(in.gamma, b), value_at(in.lam, b), value_at(in.value_lam, b)};
  const float behind = value_at(in.bootstrap, b);
  GaeCarry carry{behind, behind};
  if (kEmit && parts > 1) carry = apply_maps(maps + b * parts, part + 1, parts, carry);
  const GaeMap map = walk<kWarps, kEmit>(tokens, span, part_of<kWarps>(span, part, parts), scale,
                                         carry, shared, turn);
  if (!kEmit && threadIdx.x == 0) maps[task] = map;
}

// Blocks of a grid whose blocks loop over tasks of `warps` warps.
inline int64_t tasks_to_blocks(int64_t tasks, int warps) {
  const int64_t each = kThreads / kWarp / warps;
  return std::min<int64_t>((tasks + each - 1) / each, 1 << 20);
}

// Null, or the error's text.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, void* stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tppo::sequence
