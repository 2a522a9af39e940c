// The only pybind11 file. Tensors come as addresses (0 = none), streams as integers; a struct of
// csrc comes as a Python tuple of its fields, a NamedTuple with their names.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "gae.h"
#include "kernels.h"
#include "ppo_loss.h"
#include "reduce.h"
#include "value_loss.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace pybind11 {
namespace detail {

template <typename Field>
void fill_field(handle source, Field& field) {
  if constexpr (std::is_pointer_v<Field>) {
    field = reinterpret_cast<Field>(source.cast<uintptr_t>());
  } else {
    field = source.cast<Field>();
  }
}

// The one place where structs are filled: false where the number of fields is another one.
template <typename... Fields>
bool fill(handle source, Fields&... fields) {
  if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != sizeof...(fields))
    return false;
  Py_ssize_t i = 0;
  (fill_field(PyTuple_GET_ITEM(source.ptr(), i++), fields), ...);
  return true;
}

#define TPPO_STRUCT(Name, ...)                                            \
  template <>                                                             \
  struct type_caster<tppo::Name> {                                        \
    PYBIND11_TYPE_CASTER(tppo::Name, const_name(#Name));                  \
    bool load(handle source, bool) {                                      \
      auto& x = value;                                                    \
      return fill(source, __VA_ARGS__);                                   \
    }                                                                     \
  }

TPPO_STRUCT(Tokens, x.data, x.dtype, x.stride);
TPPO_STRUCT(Mask, x.data, x.stride);
TPPO_STRUCT(PerSequence, x.data, x.dtype, x.stride, x.value);
TPPO_STRUCT(Sequences, x.offsets, x.B, x.T);
TPPO_STRUCT(GaeMap, x.decay, x.add, x.value_decay, x.value_add);
TPPO_STRUCT(GaeRows, x.rewards, x.values, x.mask, x.lam, x.value_lam, x.bootstrap, x.offsets,
            x.gamma, x.B, x.T);
TPPO_STRUCT(GaeInputs, x.sequences, x.rewards, x.values, x.mask, x.gamma, x.lam, x.value_lam,
            x.bootstrap);
TPPO_STRUCT(AdvantageInputs, x.walk, x.logprobs, x.ref_logprobs, x.train_mask, x.kl_coef,
            x.estimator);
TPPO_STRUCT(AdvantageOutputs, x.advantages, x.returns, x.rewards);
TPPO_STRUCT(AdvantageStatistics, x.scalars, x.n, x.moments);
TPPO_STRUCT(WhitenInputs, x.x, x.mask, x.train_mask, x.N, x.unbiased);
TPPO_STRUCT(TokenRows, x.logits, x.dtype, x.N, x.columns, x.inner, x.outer_stride, x.inner_stride,
            x.targets, x.mask, x.row_temperature, x.temperature, x.softcap, x.logit_scale,
            x.threads);
TPPO_STRUCT(Layout, x.B, x.T, x.N, x.offsets, x.mask, x.mask_stride);
TPPO_STRUCT(Column, x.data, x.dtype, x.stride, x.step);
TPPO_STRUCT(Scalar, x.value, x.device, x.dtype);
TPPO_STRUCT(Share, x.count_of, x.count, x.length, x.by_length);
TPPO_STRUCT(Slopes, x.slopes, x.count, x.dtype, x.out);
TPPO_STRUCT(ValueBatch, x.layout, x.values, x.returns, x.old_values, x.clip, x.share, x.dvalues,
            x.loss, x.metrics, x.scale);
TPPO_STRUCT(PolicyBatch, x.layout, x.logprobs, x.old_logprobs, x.advantages, x.entropy,
            x.ref_logprobs, x.weights, x.clip_low, x.clip_high, x.dual_clip, x.limit,
            x.entropy_coef, x.kl_coef, x.kl_clamp, x.tau_pos, x.tau_neg, x.share, x.estimator,
            x.objective, x.sequence_ratio, x.kl_ratio_weighted, x.kl_clamped, x.dlogprobs,
            x.dentropy, x.loss, x.metrics, x.scale);
TPPO_STRUCT(KlTokens, x.logprobs, x.ref_logprobs, x.mask, x.N, x.estimator, x.clamp);
TPPO_STRUCT(ReduceBatch, x.layout, x.x, x.share, x.total, x.scale);
TPPO_STRUCT(ReduceShares, x.layout, x.by_length, x.dtype, x.out);
TPPO_STRUCT(HeadInputs, x.hidden, x.weight, x.bias, x.mask, x.dtype, x.weight_dtype, x.bias_dtype,
            x.N, x.D, x.K, x.inner, x.outer, x.stride);

}  // namespace detail
}  // namespace pybind11

namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

[[maybe_unused]] void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

// Whether all of x [n] lie in [low, high]: the check of labels.
void bind_checks(py::module_& m) {
  m.def("int64_within", [](Address x, int64_t n, double low, double high) {
    bool within = true;
    for (int64_t i = 0; i < n; ++i) {
      const double value = double(at<int64_t>(x)[i]);
      within &= (value >= low) & (value <= high);
    }
    return within;
  });
}

void bind_gae(py::module_& m) {
  using namespace tppo;
  const auto tuple = [](const GaeMap& m) {
    return std::make_tuple(m.decay, m.add, m.value_decay, m.value_add);
  };
  m.def("gae_map", [=](float reward, float value, float gamma, float lam, float value_lam) {
    return tuple(gae_map(reward, value, {gamma, lam, value_lam}));
  });
  m.def("gae_join", [=](const GaeMap& before, const GaeMap& behind) {
    return tuple(gae_join(before, behind));
  });
  m.def("gae_apply", [](const GaeMap& of, float x, float y) {
    const GaeCarry carry = gae_apply(of, {x, y});
    return std::make_tuple(carry.x, carry.y);
  });
  m.def("gae_result", [](float reward, float value, float x, float y, float gamma) {
    const GaeResult result = gae_result(reward, value, {x, y}, {gamma, 0.f, 0.f});
    return std::make_tuple(result.advantage, result.returns);
  });
  m.def("gae_fwd", [](const GaeRows& in, Address advantages, Address returns, int threads) {
    py::gil_scoped_release release;
    gae_fwd(in, at<float>(advantages), at<float>(returns), threads);
  });
#if TPPO_CUDA
  m.def("gae_fwd_cuda", [](const GaeInputs& in, bool wide, int parts, Address maps,
                           Address advantages, Address returns, Address stream) {
    check(gae_fwd_cuda(in, wide, parts, at<float>(maps), at<float>(advantages),
                       at<float>(returns), at<void>(stream)));
  });
#endif
}

void bind_token_advantages([[maybe_unused]] py::module_& m) {
  using namespace tppo;
#if TPPO_CUDA
  m.def("token_advantages_fwd_cuda",
        [](const AdvantageInputs& in, bool wide, int parts, int blocks, Address maps,
           Address partials, const AdvantageOutputs& out, Address stream) {
          check(token_advantages_fwd_cuda(in, wide, parts, blocks, at<float>(maps),
                                          at<double>(partials), out, at<void>(stream)));
        });
  m.def("token_advantages_whiten_cuda",
        [](const WhitenInputs& in, Address partials, int count,
           const AdvantageStatistics& statistics, Address out, Address stream) {
          check(token_advantages_whiten_cuda(in, at<double>(partials), count, statistics,
                                             at<float>(out), at<void>(stream)));
        });
#endif
}

void bind_token_logprobs(py::module_& m) {
  using namespace tppo;
  m.def("token_logprobs_fwd", [](const TokenRows& rows, Address logprobs, Address entropy,
                                 Address top, Address log_sum) {
    py::gil_scoped_release release;
    token_logprobs_fwd(rows, at<float>(logprobs), at<float>(entropy), at<float>(top),
                       at<float>(log_sum));
  });
  m.def("token_logprobs_bwd", [](const TokenRows& rows, Address grad_logprobs, Address grad_entropy,
                                 Address entropy, Address top, Address log_sum,
                                 int64_t vocabulary, Address grad) {
    py::gil_scoped_release release;
    token_logprobs_bwd(rows, at<float>(grad_logprobs), at<float>(grad_entropy),
                       at<float>(entropy), at<float>(top), at<float>(log_sum), vocabulary,
                       at<void>(grad));
  });
}

void bind_linear_logprobs(py::module_& m) {
  using namespace tppo;
  m.def("linear_exponentials", [](const TokenRows& rows, Address top, bool half, Address out) {
    py::gil_scoped_release release;
    linear_exponentials(rows, at<float>(top), half, at<void>(out));
  });
  m.def("linear_gradient", [](const TokenRows& rows, Address g_logprobs, Address g_entropy,
                              Address logprobs, Address entropy, Address /*top*/, Address log_sum,
                              Address dx) {  // the statistics of a row as forward gives them
    py::gil_scoped_release release;
    linear_gradient(rows, at<float>(g_logprobs), at<float>(g_entropy),
                    at<float>(logprobs), at<float>(entropy), at<float>(log_sum), at<float>(dx));
  });
}

void bind_whiten(py::module_& m) {
  using namespace tppo;
  m.def("whiten_stats", [](Address x, Address mask, int64_t n, Address moments, int threads) {
    py::gil_scoped_release release;
    whiten_stats(at<float>(x), at<uint8_t>(mask), n, at<double>(moments), threads);
  });
  m.def("whiten_fwd", [](Address x, Address mask, int64_t n, Address moments, double eps,
                         bool unbiased, bool shift_mean, Address out, int threads) {
    py::gil_scoped_release release;
    whiten_fwd(at<float>(x), at<uint8_t>(mask), n, at<double>(moments), eps, unbiased, shift_mean,
               at<float>(out), threads);
  });
}

void bind_losses(py::module_& m) {
  using namespace tppo;
  m.def("kl_fwd", [](const KlTokens& in, Address out, int threads) {
    py::gil_scoped_release release;
    kl_fwd(in, at<float>(out), threads);
  });
  m.def("kl_bwd", [](const KlTokens& in, Address grad, Address out, int threads) {
    py::gil_scoped_release release;
    kl_bwd(in, at<float>(grad), at<float>(out), threads);
  });
  m.def("reduce_fwd", [](const ReduceBatch& in, int threads) {
    py::gil_scoped_release release;
    reduce_fwd(in, threads);
  });
  m.def("reduce_bwd", [](const ReduceShares& in, float factor, int threads) {
    py::gil_scoped_release release;
    reduce_bwd(in, factor, threads);
  });
  m.def("ppo_loss_fwd", [](const PolicyBatch& in, int threads) {
    py::gil_scoped_release release;
    ppo_loss_fwd(in, threads);
  });
  m.def("value_loss_fwd", [](const ValueBatch& in, int threads) {
    py::gil_scoped_release release;
    value_loss_fwd(in, threads);
  });
  m.def("loss_bwd", [](const Slopes& x, float factor, int threads) {
    py::gil_scoped_release release;
    loss_bwd(x, factor, threads);
  });
#if TPPO_CUDA
  m.def("ppo_loss_fwd_cuda", [](const PolicyBatch& in, Address sums, Address stream) {
    check(ppo_loss_fwd_cuda(in, at<double>(sums), at<void>(stream)));
  });
  m.def("value_loss_fwd_cuda", [](const ValueBatch& in, Address sums, Address stream) {
    check(value_loss_fwd_cuda(in, at<double>(sums), at<void>(stream)));
  });
  m.def("loss_bwd_cuda", [](const Slopes& a, const Slopes& b, Address grad_loss, Address scale,
                            Address stream) {
    check(loss_bwd_cuda(a, b, at<float>(grad_loss), at<float>(scale), at<void>(stream)));
  });
#endif
}

void bind_token_head([[maybe_unused]] py::module_& m) {
#if TPPO_CUDA
  using namespace tppo;
  m.def("token_head_fwd_cuda", [](const HeadInputs& in, Address out, Address stream) {
    check(token_head_fwd_cuda(in, at<float>(out), at<void>(stream)));
  });
  m.def("token_head_bwd_cuda", [](const HeadInputs& in, Address grad, int parts, Address dx,
                                  Address dweight, Address dbias, Address sums, Address stream) {
    check(token_head_bwd_cuda(in, at<float>(grad), parts, at<void>(dx), at<void>(dweight),
                              at<void>(dbias), at<float>(sums), at<void>(stream)));
  });
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of tppo_kernels: raw addresses in, nothing of torch.";
  m.attr("cuda_archs") = TPPO_CUDA_ARCHS;
  m.attr("why_no_cuda") = TPPO_WHY_NO_CUDA;
  bind_checks(m);
  bind_gae(m);
  bind_token_advantages(m);
  bind_token_logprobs(m);
  bind_linear_logprobs(m);
  bind_whiten(m);
  bind_losses(m);
  bind_token_head(m);
}
