// The only pybind11 file. Tensors come as addresses (0 = none), streams as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "gae.h"
#include "kernels.h"
#include "ppo_loss.h"
#include "value_loss.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

[[maybe_unused]] void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

#if TPPO_CUDA
using TokensTuple = std::tuple<Address, int, int64_t>;
using MaskTuple = std::tuple<Address, int64_t>;
using PerSequenceTuple = std::tuple<Address, int, int64_t, float>;

tppo::Tokens tokens(const TokensTuple& x) {
  return {at<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
}

tppo::Mask mask(const MaskTuple& x) { return {at<uint8_t>(std::get<0>(x)), std::get<1>(x)}; }

tppo::PerSequence per_sequence(const PerSequenceTuple& x) {
  return {at<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

// (offsets, B, T, rewards, values, mask, gamma, lam, value_lam, bootstrap)
using Described =
    std::tuple<Address, int64_t, int64_t, TokensTuple, TokensTuple, MaskTuple, PerSequenceTuple,
               PerSequenceTuple, PerSequenceTuple, PerSequenceTuple>;

tppo::GaeInputs gae_inputs(const Described& in) {
  return {{at<int32_t>(std::get<0>(in)), std::get<1>(in), std::get<2>(in)},
          tokens(std::get<3>(in)), tokens(std::get<4>(in)), mask(std::get<5>(in)),
          per_sequence(std::get<6>(in)), per_sequence(std::get<7>(in)),
          per_sequence(std::get<8>(in)), per_sequence(std::get<9>(in))};
}
#endif

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
  using Map = std::tuple<float, float, float, float>;
  const auto map = [](const Map& m) {
    return GaeMap{std::get<0>(m), std::get<1>(m), std::get<2>(m), std::get<3>(m)};
  };
  const auto tuple = [](const GaeMap& m) {
    return Map{m.decay, m.add, m.value_decay, m.value_add};
  };
  m.def("gae_map", [=](float reward, float value, float gamma, float lam, float value_lam) {
    return tuple(gae_map(reward, value, {gamma, lam, value_lam}));
  });
  m.def("gae_join", [=](const Map& before, const Map& behind) {
    return tuple(gae_join(map(before), map(behind)));
  });
  m.def("gae_apply", [=](const Map& of, float x, float y) {
    const GaeCarry carry = gae_apply(map(of), {x, y});
    return std::make_tuple(carry.x, carry.y);
  });
  m.def("gae_result", [](float reward, float value, float x, float y, float gamma) {
    const GaeResult result = gae_result(reward, value, {x, y}, {gamma, 0.f, 0.f});
    return std::make_tuple(result.advantage, result.returns);
  });
  m.def("gae_fwd", [](Address rewards, Address values, Address mask, Address lam,
                      Address value_lam, Address bootstrap, Address offsets, float gamma,
                      int64_t B, int64_t T, Address advantages, Address returns, int threads) {
    py::gil_scoped_release release;
    gae_fwd(at<float>(rewards), at<float>(values), at<uint8_t>(mask), at<float>(lam),
            at<float>(value_lam), at<float>(bootstrap), at<int32_t>(offsets), gamma, B, T,
            at<float>(advantages), at<float>(returns), threads);
  });
#if TPPO_CUDA
  m.def("gae_fwd_cuda", [](const Described& in, bool wide, int parts, Address maps,
                           Address advantages, Address returns, Address stream) {
    check(gae_fwd_cuda(gae_inputs(in), wide, parts, at<float>(maps), at<float>(advantages),
                       at<float>(returns), at<void>(stream)));
  });
#endif
}

void bind_token_advantages([[maybe_unused]] py::module_& m) {
  using namespace tppo;
#if TPPO_CUDA
  m.def("token_advantages_fwd_cuda",
        [](const Described& walk, const TokensTuple& logprobs, const TokensTuple& ref_logprobs,
           const MaskTuple& train_mask, const PerSequenceTuple& kl_coef, int estimator, bool wide,
           int parts, int blocks, Address maps, Address partials, Address advantages,
           Address returns, Address rewards, Address stream) {
          check(token_advantages_fwd_cuda(
              {gae_inputs(walk), tokens(logprobs), tokens(ref_logprobs), mask(train_mask),
               per_sequence(kl_coef), estimator},
              wide, parts, blocks, at<float>(maps), at<double>(partials),
              {at<float>(advantages), at<float>(returns), at<float>(rewards)}, at<void>(stream)));
        });
  m.def("token_advantages_whiten_cuda",
        [](Address x, Address mask, Address train_mask, int64_t N, bool unbiased, Address partials,
           int count, Address stats, Address n, Address moments, Address out, Address stream) {
          check(token_advantages_whiten_cuda(
              {at<float>(x), at<uint8_t>(mask), at<uint8_t>(train_mask), N, unbiased},
              at<double>(partials), count,
              {at<float>(stats), at<int64_t>(n), at<double>(moments)}, at<float>(out),
              at<void>(stream)));
        });
#endif
}

// (logits, dtype, N, columns, inner, outer_stride, inner_stride, targets, mask, row_temperature,
//  temperature, softcap, logit_scale, threads)
using Rows = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t, Address,
                        Address, Address, double, double, double, int>;

tppo::TokenRows unpack(const Rows& rows) {
  return std::apply(
      [](Address logits, int dtype, int64_t N, int64_t columns, int64_t inner,
         int64_t outer_stride, int64_t inner_stride, Address targets, Address mask,
         Address row_temperature, double temperature, double softcap, double logit_scale,
         int threads) {
        return tppo::TokenRows{at<void>(logits), dtype, N, columns, inner, outer_stride,
                               inner_stride, at<int64_t>(targets), at<uint8_t>(mask),
                               at<double>(row_temperature), temperature, softcap, logit_scale,
                               threads};
      },
      rows);
}

void bind_token_logprobs(py::module_& m) {
  using namespace tppo;
  m.def("token_logprobs_fwd", [](const Rows& rows, Address logprobs, Address entropy, Address top,
                                 Address log_sum) {
    py::gil_scoped_release release;
    token_logprobs_fwd(unpack(rows), at<float>(logprobs), at<float>(entropy), at<float>(top),
                       at<float>(log_sum));
  });
  m.def("token_logprobs_bwd", [](const Rows& rows, Address grad_logprobs, Address grad_entropy,
                                 Address entropy, Address top, Address log_sum,
                                 int64_t vocabulary, Address grad) {
    py::gil_scoped_release release;
    token_logprobs_bwd(unpack(rows), at<float>(grad_logprobs), at<float>(grad_entropy),
                       at<float>(entropy), at<float>(top), at<float>(log_sum), vocabulary,
                       at<void>(grad));
  });
}

void bind_linear_logprobs(py::module_& m) {
  using namespace tppo;
  m.def("linear_exponentials", [](const Rows& rows, Address top, bool half, Address out) {
    py::gil_scoped_release release;
    linear_exponentials(unpack(rows), at<float>(top), half, at<void>(out));
  });
  m.def("linear_gradient", [](const Rows& rows, Address g_logprobs, Address g_entropy,
                              Address logprobs, Address entropy, Address /*top*/, Address log_sum,
                              Address dx) {  // the statistics of a row as forward gives them
    py::gil_scoped_release release;
    linear_gradient(unpack(rows), at<float>(g_logprobs), at<float>(g_entropy),
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

// (B, T, N, offsets, mask, mask_stride), (data, dtype, stride, step),
// (value, device, dtype), (count_of, count, length, by_length): the structs of loss.h.
using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, Address, Address, int64_t>;
using ColumnTuple = std::tuple<Address, int, int64_t, int>;
using ScalarTuple = std::tuple<double, Address, int>;
using ShareTuple = std::tuple<int, ScalarTuple, ScalarTuple, bool>;
using SlopesTuple = std::tuple<Address, int64_t, int, Address>;

tppo::Layout layout(const LayoutTuple& x) {
  const auto [B, T, N, offsets, mask, mask_stride] = x;
  return {B, T, N, at<int32_t>(offsets), at<uint8_t>(mask), mask_stride};
}

tppo::Column column(const ColumnTuple& x) {
  const auto [data, dtype, stride, step] = x;
  return {at<void>(data), dtype, stride, step};
}

tppo::Scalar scalar(const ScalarTuple& x) {
  const auto [value, device, dtype] = x;
  return {value, at<void>(device), dtype};
}

tppo::Share share(const ShareTuple& x) {
  const auto& [count_of, count, length, by_length] = x;
  return {count_of, scalar(count), scalar(length), by_length};
}

tppo::Slopes slopes(const SlopesTuple& x) {
  const auto [data, count, dtype, out] = x;
  return {at<float>(data), count, dtype, at<void>(out)};
}

// logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights; clip_low, clip_high,
// dual_clip, max_log_ratio, entropy_coef, kl_coef; dlogprobs, dentropy, loss, metrics, scale
tppo::PolicyBatch policy(const LayoutTuple& in, const std::array<ColumnTuple, 6>& x,
                         const std::array<ScalarTuple, 6>& s, const ShareTuple& parts,
                         int estimator, bool sequence_ratio, const std::array<Address, 5>& out) {
  return {layout(in), column(x[0]), column(x[1]), column(x[2]), column(x[3]), column(x[4]),
          column(x[5]), scalar(s[0]), scalar(s[1]), scalar(s[2]), scalar(s[3]), scalar(s[4]),
          scalar(s[5]), share(parts), estimator, sequence_ratio, at<float>(out[0]),
          at<float>(out[1]), at<float>(out[2]), at<float>(out[3]), at<float>(out[4])};
}

// values, returns, old_values; dvalues, loss, metrics, scale
tppo::ValueBatch critic(const LayoutTuple& in, const std::array<ColumnTuple, 3>& x,
                        const ScalarTuple& clip, const ShareTuple& parts,
                        const std::array<Address, 4>& out) {
  return {layout(in), column(x[0]), column(x[1]), column(x[2]), scalar(clip), share(parts),
          at<float>(out[0]), at<float>(out[1]), at<float>(out[2]), at<float>(out[3])};
}

void bind_losses(py::module_& m) {
  using namespace tppo;
  m.def("ppo_loss_fwd", [](const LayoutTuple& in, const std::array<ColumnTuple, 6>& x,
                           const std::array<ScalarTuple, 6>& s, const ShareTuple& parts,
                           int estimator, bool sequence_ratio, const std::array<Address, 5>& out,
                           int threads) {
    py::gil_scoped_release release;
    ppo_loss_fwd(policy(in, x, s, parts, estimator, sequence_ratio, out), threads);
  });
  m.def("value_loss_fwd", [](const LayoutTuple& in, const std::array<ColumnTuple, 3>& x,
                             const ScalarTuple& clip, const ShareTuple& parts,
                             const std::array<Address, 4>& out, int threads) {
    py::gil_scoped_release release;
    value_loss_fwd(critic(in, x, clip, parts, out), threads);
  });
  m.def("loss_bwd", [](const SlopesTuple& x, float factor, int threads) {
    py::gil_scoped_release release;
    loss_bwd(slopes(x), factor, threads);
  });
#if TPPO_CUDA
  m.def("ppo_loss_fwd_cuda", [](const LayoutTuple& in, const std::array<ColumnTuple, 6>& x,
                                const std::array<ScalarTuple, 6>& s, const ShareTuple& parts,
                                int estimator, bool sequence_ratio,
                                const std::array<Address, 5>& out, Address room, Address stream) {
    check(ppo_loss_fwd_cuda(policy(in, x, s, parts, estimator, sequence_ratio, out),
                            at<double>(room), at<void>(stream)));
  });
  m.def("value_loss_fwd_cuda", [](const LayoutTuple& in, const std::array<ColumnTuple, 3>& x,
                                  const ScalarTuple& clip, const ShareTuple& parts,
                                  const std::array<Address, 4>& out, Address room,
                                  Address stream) {
    check(value_loss_fwd_cuda(critic(in, x, clip, parts, out), at<double>(room),
                              at<void>(stream)));
  });
  m.def("loss_bwd_cuda", [](const SlopesTuple& a, const SlopesTuple& b, Address grad_loss,
                            Address scale, Address stream) {
    check(loss_bwd_cuda(slopes(a), slopes(b), at<float>(grad_loss), at<float>(scale),
                        at<void>(stream)));
  });
#endif
}

// (hidden, weight, bias, mask, dtype, weight_dtype, bias_dtype, N, D, K, inner, outer, stride)
using HeadTuple = std::tuple<Address, Address, Address, Address, int, int, int, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t>;

[[maybe_unused]] tppo::HeadInputs head(const HeadTuple& x) {
  const auto [hidden, weight, bias, mask, dtype, weight_dtype, bias_dtype, N, D, K, inner, outer,
              stride] = x;
  return {at<void>(hidden), at<void>(weight), at<void>(bias), at<uint8_t>(mask), dtype,
          weight_dtype,     bias_dtype,       N,              D,                 K,
          inner,            outer,            stride};
}

void bind_token_head([[maybe_unused]] py::module_& m) {
#if TPPO_CUDA
  using namespace tppo;
  m.def("token_head_fwd_cuda", [](const HeadTuple& in, Address out, Address stream) {
    check(token_head_fwd_cuda(head(in), at<float>(out), at<void>(stream)));
  });
  m.def("token_head_bwd_cuda", [](const HeadTuple& in, Address grad, int parts, Address dx,
                                  Address dweight, Address dbias, Address room, Address stream) {
    check(token_head_bwd_cuda(head(in), at<float>(grad), parts, at<void>(dx), at<void>(dweight),
                              at<void>(dbias), at<float>(room), at<void>(stream)));
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
