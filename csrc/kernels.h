// Every kernel that bindings.cpp exposes. A pointer may be null only where its comment allows it.
#pragma once
#include <cstdint>

namespace tppo {

struct GaeRows {  // dense: [B, T], or packed [N] with offsets [B + 1]
  const float *rewards, *values;
  const uint8_t* mask;                        // or null
  const float *lam, *value_lam, *bootstrap;  // [B]
  const int32_t* offsets;                     // or null
  float gamma;
  int64_t B, T;
};

void gae_fwd(const GaeRows& in, float* advantages, float* returns, int threads);

enum Dtype { kFp32, kBf16, kFp16 };

// N rows of logits, row i at (i / inner) * outer_stride + (i % inner) * inner_stride elements, of
// which `columns` are live. mask [N] and row_temperature [N] may be null; softcap 0 is none.
struct TokenRows {
  const void* logits;
  int dtype;
  int64_t N, columns, inner, outer_stride, inner_stride;
  const int64_t* targets;  // or null: entropy alone is wanted
  const uint8_t* mask;
  const double* row_temperature;
  double temperature, softcap, logit_scale;
  int threads;
};

// All results [N], logprobs null without targets; logsumexp = top + log_sum. A target outside
// [0, columns) gives NaN.
void token_logprobs_fwd(const TokenRows& in, float* logprobs, float* entropy, float* top,
                        float* log_sum);

// grad: [N, vocabulary] in the logits' dtype, written whole. grad_logprobs, grad_entropy: or null.
void token_logprobs_bwd(const TokenRows& in, const float* grad_logprobs, const float* grad_entropy,
                        const float* entropy, const float* top, const float* log_sum,
                        int64_t vocabulary, void* grad);

// logits: fp32, one row after another at inner_stride. out: [N, columns] exp(z - top), fp32, or
// fp16 times 2^15 where `half`; fp32 may take the place of the logits.
void linear_exponentials(const TokenRows& in, const float* top, bool half, void* out);

// Both without a softcap. in.logits: those exponentials. dx: [N, columns], the gradient by the
// logits; it may take their place. A target of -1 is not in this shard. g_logprobs, g_entropy: or
// null.
void linear_gradient(const TokenRows& in, const float* g_logprobs, const float* g_entropy,
                     const float* logprobs, const float* entropy, const float* log_sum,
                     float* dx);

// A hint for fresh memory that is written as a whole; no result depends on it.
void expect_writes(char* begin, int64_t bytes);

// mask may be null; moments: n, mean, M2, max|x| of the valid tokens.
void whiten_stats(const float* x, const uint8_t* mask, int64_t n, double* moments, int threads);
void whiten_fwd(const float* x, const uint8_t* mask, int64_t n, const double* moments, double eps,
                bool unbiased, bool shift_mean, float* out, int threads);

// Inputs of the GPU's sequence operators, read in their own types (`dtype` of `Dtype`).
struct Tokens {  // [B, T] with rows `stride` elements apart, or packed [N]
  const void* data;
  int dtype;
  int64_t stride;
};
struct Mask {  // the same of bool; null: all True
  const uint8_t* data;
  int64_t stride;
};
struct PerSequence {  // [B], or one value for all (stride 0); null: the number `value`
  const void* data;
  int dtype;
  int64_t stride;
  float value;
};
struct Sequences {  // offsets [B + 1] of a packed batch, or null: B padded rows of T
  const int32_t* offsets;
  int64_t B, T;
};

struct GaeInputs {
  Sequences sequences;
  Tokens rewards, values;
  Mask mask;
  PerSequence gamma, lam, value_lam, bootstrap;
};

// Each returns null, or the CUDA error's text. Outputs are dense fp32, [B, T] or [N]; `parts` > 1
// splits each sequence over blocks, through maps [4 B parts].
const char* gae_fwd_cuda(const GaeInputs& in, bool wide, int parts, float* maps, float* advantages,
                         float* returns, void* stream);

struct AdvantageInputs {
  GaeInputs walk;
  Tokens logprobs, ref_logprobs;  // null: no KL
  Mask train_mask;                // null: all that is valid is trained
  PerSequence kl_coef;            // one value
  int estimator;                  // enum KlEstimator
};

struct AdvantageOutputs {  // dense, as the results
  float *advantages, *returns, *rewards;
};

struct AdvantageStatistics {
  float* scalars;   // [7]: means of KL, rewards, advantages, returns; deviations of the last three
  int64_t* n;       // tokens
  double* moments;  // [4] of what is trained: n, mean, M2, max|x|
};

struct WhitenInputs {
  const float* x;                    // [N]
  const uint8_t *mask, *train_mask;  // [N], or null
  int64_t N;                         // 0: statistics alone
  bool unbiased;
};

// `blocks` of them leave partials [5, blocks, 4]. Then whitening, by those, with the statistics; or
// by one set of moments, without.
const char* token_advantages_fwd_cuda(const AdvantageInputs& in, bool wide, int parts, int blocks,
                                      float* maps, double* partials, const AdvantageOutputs& out,
                                      void* stream);
const char* token_advantages_whiten_cuda(const WhitenInputs& in, const double* partials, int count,
                                         const AdvantageStatistics& statistics, float* out,
                                         void* stream);

// The losses; their batches are described in loss.h, ppo_loss.h and value_loss.h.
struct PolicyBatch;
struct ValueBatch;
void ppo_loss_fwd(const PolicyBatch& in, int threads);
void value_loss_fwd(const ValueBatch& in, int threads);

struct Slopes {  // derivatives to be scaled into `out`, of type `dtype`; count may be 0
  const float* slopes;
  int64_t count;
  int dtype;
  void* out;
};

// out = slope * factor, and 0 where the slope is 0 whatever the factor.
void loss_bwd(const Slopes& x, float factor, int threads);

// Described in kl.h and reduce.h. grad, out: [N].
struct KlTokens;
struct ReduceBatch;
struct ReduceShares;
void kl_fwd(const KlTokens& in, float* out, int threads);
void kl_bwd(const KlTokens& in, const float* grad, float* out, int threads);
void reduce_fwd(const ReduceBatch& in, int threads);
void reduce_bwd(const ReduceShares& in, float factor, int threads);

// Each returns null, or the CUDA error's text. sums: kMaxBlocks * kPolicySums of loss.cuh and
// ppo_loss.h, 1024 x 13 doubles. grad_loss, scale: one float each.
const char* ppo_loss_fwd_cuda(const PolicyBatch& in, double* sums, void* stream);
const char* value_loss_fwd_cuda(const ValueBatch& in, double* sums, void* stream);
const char* loss_bwd_cuda(const Slopes& a, const Slopes& b, const float* grad_loss,
                          const float* scale, void* stream);

// N rows of hidden, row i at i / inner * outer + i % inner * stride elements. weight [K, D] of the
// same dtype or fp32, bias [K] or null, K 1 or 3. mask [N] may be null. All rows of both begin at
// multiples of 16 bytes, of which D is a multiple too.
struct HeadInputs {
  const void *hidden, *weight, *bias;
  const uint8_t* mask;
  int dtype, weight_dtype, bias_dtype;
  int64_t N, D, K, inner, outer, stride;
};

// Null, or the error's text. out: [N, K].
const char* token_head_fwd_cuda(const HeadInputs& in, float* out, void* stream);

// grad: [N, K]. dx [N, D], dweight, dbias in the dtypes of their tensors, or null. sums: fp32
// [parts, K D + 2 K], or null where only dx is wanted.
const char* token_head_bwd_cuda(const HeadInputs& in, const float* grad, int parts, void* dx,
                                void* dweight, void* dbias, float* sums, void* stream);

}  // namespace tppo
