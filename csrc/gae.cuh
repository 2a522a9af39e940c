// The walk over a sequence that gae.cu and token_advantages.cu share: a parallel scan of gae.h's
// maps. A thread holds kGroup adjacent tokens (one 16-byte load of fp32), a warp kRounds times 32
// such groups, a block of kThreads one sequence, or one a warp (in one round).
// Chunks go from the last token to the first and hand a carry on. Every token is read once.
//
// Positions count from a multiple of kGroup at or before the first token of the sequence in the
// dense outputs, so that a group is aligned wherever a sequence begins. An input at another phase
// (row strides, views) is read element by element: the same bytes, more instructions. Which tokens
// count is a matter of selection, never of branches: a warp's lanes stay together.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "gae.h"
#include "kernels.h"

namespace tppo::sequence {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp, kGroup = 4;
constexpr int kTile = kWarp * kGroup;         // tokens of a warp in a round
constexpr unsigned kAll = 0xffffffffu;
constexpr uint32_t kWhole = (1u << kGroup) - 1;  // a group of which every token is there
constexpr int64_t kLong = 1024;  // tokens of a sequence that a block takes, where a warp has others

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

// kFloats: every input is fp32, and its type is not asked.
template <bool kFloats>
__device__ inline void unpack(const Group& group, int dtype, float* out) {
  if (kFloats || dtype == kFp32) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) out[j] = __uint_as_float(group.word[j]);
  } else if (dtype == kBf16) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      out[j] = __uint_as_float(j % 2 ? group.word[j / 2] & 0xffff0000u : group.word[j / 2] << 16);
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      out[j] = widen((group.word[j / 2] >> (16 * (j % 2))) & 0xffffu, kFp16);
  }
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

// Bit j is 1 where token t + j lies inside the sequence.
__device__ inline uint32_t inside(const Span& span, int64_t t) {
  const int64_t left = span.n - t;
  const int head = t >= 0 ? 0 : t > -kGroup ? int(-t) : kGroup;
  const int tail = left >= kGroup ? 0 : left > 0 ? int(kGroup - left) : kGroup;
  return (kWhole << head) & (kWhole >> tail);
}

// Tokens t .. t + kGroup - 1 of a sequence, of which `in` says which there are; the others are 0.
template <bool kFloats>
__device__ inline Group load(const Tokens& x, const Span& span, int64_t t, uint32_t in) {
  Group group = {};
  const int64_t first = span.at(x.stride) + t;
  if (kFloats || x.dtype == kFp32) {
    const uint32_t* p = static_cast<const uint32_t*>(x.data) + first;
    if (in == kWhole && aligned(p, 16)) {
      const uint4 four = *reinterpret_cast<const uint4*>(p);
      return {four.x, four.y, four.z, four.w};
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (in >> j & 1) group.word[j] = p[j];
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + first;
    if (in == kWhole && aligned(p, 8)) {
      const uint2 four = *reinterpret_cast<const uint2*>(p);
      return {four.x, four.y};
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (in >> j & 1) group.word[j / 2] |= uint32_t(p[j]) << (16 * (j % 2));
  }
  return group;
}

// Byte j is not 0 where token t + j lies inside the sequence and is valid. mask: [B, T] or [N];
// null is all True. As loaded, so that nothing waits for it before the next loads are on their way.
__device__ inline uint32_t load_mask(const Mask& mask, const Span& span, int64_t t, uint32_t in) {
  if (!mask.data) return (in * 0x00204081u) & 0x01010101u;  // a bit a byte
  const uint8_t* p = mask.data + span.at(mask.stride) + t;
  if (in == kWhole && aligned(p, 4)) return *reinterpret_cast<const uint32_t*>(p);
  uint32_t bytes = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (in >> j & 1) bytes |= uint32_t(p[j]) << (8 * j);
  return bytes;
}

// The top bit of every byte that is not 0, and no other: how many is __popc of it.
__device__ inline uint32_t flags(uint32_t bytes) {
  return (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
}

__device__ inline bool has(uint32_t flags, int j) { return flags & (0x80u << (8 * j)); }

__device__ inline void store(float* out, const Span& span, int64_t t, uint32_t in,
                             const float* values) {
  float* p = out + span.begin + t;
  if (in == kWhole && aligned(p, 16)) {
    *reinterpret_cast<float4*>(p) = make_float4(values[0], values[1], values[2], values[3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (in >> j & 1) p[j] = values[j];
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
  uint32_t valid;  // as `flags`
};

// The map of token j. The inputs of a token that is not valid are 0, and so is what it adds: with a
// decay of 1 its map is the identity.
__device__ inline GaeMap map_at(const Steps& steps, int j, const GaeScale& scale) {
  GaeMap map = gae_map(steps.reward[j], steps.value[j], scale);
  map.decay = has(steps.valid, j) ? map.decay : 1.f;
  map.value_decay = has(steps.valid, j) ? map.value_decay : 1.f;
  return map;
}

__device__ inline GaeMap map_of(const Steps& steps, const GaeScale& scale) {
  GaeMap map = map_at(steps, kGroup - 1, scale);
#pragma unroll
  for (int j = kGroup - 2; j >= 0; --j) map = gae_join(map_at(steps, j, scale), map);
  return map;
}

// The part of a sequence that one block walks: chunks [first, last).
struct Part {
  int first, last;
};

// chunk: tokens that are walked over at once.
__device__ inline Part part_of(const Span& span, int part, int parts, int64_t chunk) {
  const int chunks = int((span.phase() + span.n + chunk - 1) / chunk);
  const int each = (chunks + parts - 1) / parts;
  const int first = each * part < chunks ? each * part : chunks;
  return {first, first + each < chunks ? first + each : chunks};
}

// Writes the results of a thread's tokens; `joined` are the maps behind its lane, `behind` is the
// carry behind its round.
template <class Source>
__device__ void emit_round(Source& tokens, const Span& span, int64_t t,
                           const typename Source::Raw& raw, const Steps& steps,
                           const GaeMap& joined, const GaeScale& scale, GaeCarry behind) {
  const GaeMap lanes = lanes_behind(joined, 1);
  if (threadIdx.x % kWarp < kWarp - 1) behind = gae_apply(lanes, behind);
  GaeResult results[kGroup];
#pragma unroll
  for (int j = kGroup - 1; j >= 0; --j) {
    const GaeResult result = gae_result(steps.reward[j], steps.value[j], behind, scale);
    results[j] = {has(steps.valid, j) ? result.advantage : 0.f,
                  has(steps.valid, j) ? result.returns : 0.f};
    behind = gae_apply(map_at(steps, j, scale), behind);
  }
  tokens.emit(span, t, raw, steps, results);
}

// Joins the maps of a part, or emits it with the carry behind it. tokens: load(span, t) -> Raw,
// steps(raw) -> Steps, emit(span, t, raw, steps, results), each for the kGroup tokens from t on.
// warps: that walk together, 1 or kWarps. shared: [2][kWarps], of which the half
// `turn` is free. Returns the part's map.
template <bool kEmit, int kRounds, class Source>
__device__ GaeMap walk(Source& tokens, const Span& span, const Part& part, const GaeScale& scale,
                       GaeCarry carry, int warps, GaeMap (*shared)[kWarps], int& turn) {
  const int lane = threadIdx.x % kWarp, warp = warps > 1 ? threadIdx.x / kWarp : 0;
  GaeMap whole = gae_identity();
  for (int chunk = part.last - 1; chunk >= part.first; --chunk) {
    const int64_t t0 =
        (int64_t(chunk) * warps + warp) * (kTile * kRounds) + lane * kGroup - span.phase();
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
    GaeCarry own = carry;  // behind this warp's tokens
    if (warps > 1) {
      if (lane == 0) shared[turn][warp] = total;
      __syncthreads();
      const GaeMap from = join_lanes(lane < kWarps ? shared[turn][lane] : gae_identity(), lane);
      own = gae_apply(from_lane(from, warp + 1), carry);  // the identity behind the last warp
      total = from_lane(from, 0);                          // now of the whole block
      turn ^= 1;  // the next chunk writes the other half: one barrier a chunk is enough
    }
    carry = gae_apply(total, carry);
    whole = gae_join(total, whole);
    if constexpr (kEmit) {
#pragma unroll
      for (int r = kRounds - 1; r >= 0; --r) {
        emit_round(tokens, span, t0 + r * kTile, raw[r], steps[r], joined[r], scale, own);
        own = gae_apply(from_lane(joined[r], 0), own);
      }
    }
  }
  return whole;
}

// A part of the sequence b; its map goes to maps [B, parts], or its results out, with the carry
// that the maps of the parts behind it give.
template <bool kEmit, int kRounds, class Source>
__device__ void walk_part(Source& tokens, const GaeInputs& in, const Span& span, int64_t b,
                          int part, int parts, GaeMap* maps, int warps, GaeMap (*shared)[kWarps],
                          int& turn) {
  const GaeScale scale{value_at(in.gamma, b), value_at(in.lam, b), value_at(in.value_lam, b)};
  const float behind = value_at(in.bootstrap, b);
  GaeCarry carry{behind, behind};
  if (kEmit && parts > 1) carry = apply_maps(maps + b * parts, part + 1, parts, carry);
  const Part own = part_of(span, part, parts, int64_t(kTile) * kRounds * warps);
  const GaeMap map = walk<kEmit, kRounds>(tokens, span, own, scale, carry, warps, shared, turn);
  if (!kEmit && threadIdx.x == 0) maps[b * parts + part] = map;
}

// All parts of all sequences, one after another for a block.
template <bool kEmit, int kRounds, class Source>
__device__ void walk_by_blocks(Source& tokens, const GaeInputs& in, int parts, GaeMap* maps) {
  __shared__ GaeMap shared[2][kWarps];
  int turn = 0;
  for (int64_t task = blockIdx.x; task < in.sequences.B * parts; task += gridDim.x) {
    const int64_t b = task / parts;
    walk_part<kEmit, kRounds>(tokens, in, span_of(in.sequences, b), b, int(task % parts), parts,
                              maps, kWarps, shared, turn);
  }
}

// All sequences, a warp each, eight to a block at a time. Of those eight the long ones, over which
// one warp would walk long after all others have ended, are taken by the block, one by one: packed
// sequences alone can differ, and their lengths are known on the device alone.
template <class Source>
__device__ void walk_by_warps(Source& tokens, const GaeInputs& in) {
  __shared__ GaeMap shared[2][kWarps];
  int turn = 0;
  const int B = int(in.sequences.B);  // of a grid's size
  for (int first = blockIdx.x * kWarps; first < B; first += gridDim.x * kWarps)
#pragma unroll 1
    for (int i = 0; i <= (in.sequences.offsets ? kWarps : 0); ++i) {
      const bool alone = i == 0;
      const int b = alone ? first + threadIdx.x / kWarp : first + i - 1;
      if (b >= B) continue;
      const Span span = span_of(in.sequences, b);
      if (in.sequences.offsets && alone == (span.n > kLong)) continue;
      walk_part<true, 1>(tokens, in, span, b, 0, 1, nullptr, alone ? 1 : kWarps, shared, turn);
    }
}

// Blocks of a grid whose blocks loop over tasks, `each` at a time.
inline int64_t tasks_to_blocks(int64_t tasks, int each) {
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
