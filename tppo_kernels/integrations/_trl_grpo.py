"""TokenGRPOTrainer: TRL's GRPO with rewards and advantages at tokens, and the loss by ours.

TRL's `_compute_loss` runs as it is, on log-probs without their graph, so that its metrics and its
controller of the entropy bonus are TRL's own code; what it makes of [B, T] numbers is cheap.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

import tppo_kernels as tk

from ._peer import say
from ._token_rewards import TokenRewards

LOSS_TYPES = {"grpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean", "bnpo": "token-mean",
              "dr_grpo": "seq-mean-token-sum-norm", "luspo": "seq-mean-token-sum",
              "dapo": "token-sum", "cispo": "token-sum"}  # and how each adds up its tokens
ADVANTAGES = ("group", "rloo", "whitened")


class TokenGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with rewards and advantages at tokens, and the loss by `tk.ppo_loss`.

    reward_funcs: as TRL's, but each entry of what a function returns is a number for the answer, a
    list with one number a token (completion_ids, the EOS included), or a list of (start, end,
    value) over the characters of the answer, paid at the last token that writes one of them.  TRL
    logs the totals as it logs its rewards.  With r the weighted sum of the functions at the
    actions t of answer b (tokens of tools are none; a reward there goes to the action before):

        G[b, t] = r[b, t] + gamma G[b, t + 1]
        F[g, t] = G of answer g at its first action from position t on, at its last one behind it
        "group":    A[b, t] = (G[b, t] - mean over the group of F[g, t]) / (s + 1e-4)
        "rloo":     the same with the mean over the others of the group
        "whitened": A = (G - its mean) / its deviation, over all actions of all answers

    s: the deviation of the totals in the group or in the batch, as `scale_rewards` says; under
    "none" nothing is divided, and "whitened" does not read it.  Answers to which every function
    gave None have advantage 0 and belong to no mean.  With numbers for answers and gamma = 1,
    "group" gives TRL's advantages exactly.  Sources: reward-to-go and baseline, Williams 1992;
    group mean, DeepSeekMath, arXiv 2402.03300; leave-one-out, Kool et al. 2019, with dense rewards
    PRIME, arXiv 2502.01456; whitening, REINFORCE++, arXiv 2501.03262.

    The loss types grpo, bnpo, dr_grpo, dapo, luspo, cispo and sapo, with all that TRL adds to them
    (sequence ratios, delta, KL and its weight by the ratio, tool_mask, the mask of entropies, of
    answers off the policy, importance-sampling correction, entropy bonus, auxiliary loss of
    experts) have TRL's values.  TRL's own code computes the metrics from the same log-probs.

    Raises ValueError for what is not supported: the loss type vespo, `normalize_then_sum`, Liger's
    kernel of 1.12, cispo with epsilon_high below 1, delta not above 1.
    """

    reward_funcs: list[Any]

    def __init__(self, model: Any, reward_funcs: Any = None, *args: Any,
                 token_advantages: str = "group", gamma: float = 1.0, **kwargs: Any) -> None:
        if token_advantages not in ADVANTAGES:
            raise ValueError(f"token_advantages was {token_advantages!r}, expected one of "
                             f"{', '.join(ADVANTAGES)}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma was {gamma!r}, expected a number from 0 to 1")
        self.token_advantages, self.gamma = token_advantages, gamma
        super().__init__(model, reward_funcs, *args, **kwargs)
        self._refuse_the_unknown()
        self._paid = [TokenRewards(name, self._tokenizer) for name in self.reward_func_names]
        self.reward_funcs = [f if isinstance(f, torch.nn.Module) else _totals_of(f, paid)
                             for f, paid in zip(self.reward_funcs, self._paid, strict=True)]
        self._seen: dict[str, Any] | None = None  # what TRL's loss has computed, while it runs
        say("trl", f"TokenGRPOTrainer: {self.loss_type} loss by ppo_loss, "
                  f"advantages of tokens {token_advantages!r}, gamma {gamma:g}")

    def _refuse_the_unknown(self) -> None:
        wrong = None
        if self.loss_type not in LOSS_TYPES:
            wrong = f"loss_type={self.loss_type!r}, expected one of {', '.join(LOSS_TYPES)}"
        elif self.multi_objective_aggregation != "sum_then_normalize":
            wrong = (f"multi_objective_aggregation={self.multi_objective_aggregation!r}, expected "
                     "'sum_then_normalize': the functions' rewards are added at each token")
        elif getattr(self, "use_liger_kernel", False):
            wrong = "use_liger_kernel=True, whose loss takes one advantage an answer: leave it off"
        elif self.loss_type == "cispo" and self.epsilon_high < 1:
            wrong = (f"epsilon_high={self.epsilon_high:g} with cispo, expected at least 1: it is "
                     "the bound of the ratio itself")
        elif self.args.delta is not None and self.args.delta <= 1:
            wrong = f"delta={self.args.delta:g}, expected more than 1: the ratio starts at 1"
        if wrong:
            raise ValueError(f"TokenGRPOTrainer does not support {wrong}")

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any,
                           completion_ids_list: Any) -> Tensor:
        totals = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = totals, [len(ids) for ids in completion_ids_list]
        return totals

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = self._advantages_of_tokens(output)
        return output

    def _advantages_of_tokens(self, output: dict[str, Any]) -> Tensor:
        """[B, T] of this process, from the rewards of all of them: a group may lie on several; [B]
        where each answer has one advantage."""
        (totals, lengths), gather = self._scored, self.accelerator.gather
        width = output["completion_ids"].shape[1]
        rewards, actions = self._placed(output, totals, lengths)
        rewards, actions = (self.accelerator.pad_across_processes(x, dim=1)
                            for x in (rewards, actions.to(torch.uint8)))
        rewards, actions = gather(rewards), gather(actions).bool()
        returns = tk.gae(rewards, torch.zeros_like(rewards), actions, gamma=self.gamma,
                         lam=1.0).returns
        silent = totals.isnan().all(1)
        scores = (totals * self.reward_weights.to(totals.device)).nansum(1)
        scores = scores.masked_fill(silent, torch.nan)
        mine = slice(self.accelerator.process_index * len(lengths),
                     (self.accelerator.process_index + 1) * len(lengths))
        if self.token_advantages == "whitened":
            found = tk.whiten(returns, actions & ~silent[:, None])
        else:
            found = self._against_group(returns, actions, scores)
        found = found.nan_to_num(nan=0.0)[mine, :width]
        dense = any(x is not None for paid in self._paid for x in paid.tokens)
        dense = bool(gather(torch.tensor([dense], device=rewards.device)).any())  # in any process
        if dense or self.gamma != 1 or self.token_advantages == "whitened":
            return found
        return found[:, 0]  # the same at each token; [B] as TRL's, by which metrics count rows

    def _placed(self, output: dict[str, Any], totals: Tensor, lengths: list[int]
                ) -> tuple[Tensor, Tensor]:
        """The rewards [B, T] of this process's answers, and which of their tokens are actions."""
        ids, device = output["completion_ids"], totals.device
        actions = torch.arange(ids.shape[1], device=device) < torch.tensor(
            lengths, device=device)[:, None]
        if "tool_mask" in output:  # 0 everywhere in an answer that TRL takes out of the loss
            tools = output["tool_mask"] == 0
            actions &= ~(tools & (output["completion_mask"].sum(1, keepdim=True) > 0))
        terminal = torch.zeros(len(lengths), dtype=torch.float64)
        dense = torch.zeros(ids.shape, dtype=torch.float64)
        first = self.accelerator.process_index * len(lengths)
        local = totals[first:first + len(lengths)].double().cpu()
        for i, (weight, paid) in enumerate(zip(self.reward_weights.tolist(), self._paid,
                                               strict=True)):
            for b in range(len(lengths)):
                tokens = paid.tokens[b] if paid.tokens else None
                if tokens is not None:
                    dense[b, :len(tokens)] += weight * torch.tensor(tokens, dtype=torch.float64)
                elif not local[b, i].isnan():
                    terminal[b] += weight * local[b, i]
        terminal[~actions.any(1).cpu()] = 0  # an answer without a token: no place, and no gradient
        placed = tk.place_rewards(actions.cpu(), terminal=terminal, dense=dense,
                                  on_masked="move_back")
        return placed.rewards.float().to(device), actions

    def _against_group(self, returns: Tensor, actions: Tensor, scores: Tensor) -> Tensor:
        """The advantages of "group" and "rloo", [B, T] of all processes; NaN where none is."""
        at = torch.arange(returns.shape[1], device=returns.device).expand_as(returns)
        behind = torch.full_like(at, returns.shape[1])
        coming = torch.where(actions, at, behind).flip(1).cummin(1).values.flip(1)
        last = torch.where(actions, at, 0).amax(1, keepdim=True)
        filled = returns.gather(1, torch.where(coming == behind, last, coming))
        filled = torch.where(actions.any(1, keepdim=True), filled, scores[:, None])
        filled = filled.masked_fill(scores.isnan()[:, None], torch.nan)
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        grouped = filled.view(-1, size, returns.shape[1])
        found = (grouped - grouped.nanmean(1, keepdim=True)).view_as(filled)
        if self.token_advantages == "rloo":
            members = (~scores.isnan()).view(-1, size).sum(1).clamp(min=2)
            found = found * (members / (members - 1)).repeat_interleave(size)[:, None]
        if self.scale_rewards == "group" and size > 1:
            deviation = nanstd(scores.view(-1, size), dim=1).repeat_interleave(size)
        elif self.scale_rewards == "batch" and scores.numel() > 1:
            deviation = nanstd(scores).expand_as(scores)
        else:
            deviation = torch.zeros_like(scores)
        return found if self.scale_rewards == "none" else found / (deviation[:, None] + 1e-4)

    # What TRL's loss computes on its way is kept, for ours.

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._seen is None:
            return found
        self._seen["scored"] = found
        return tuple(x if x is None else x.detach() for x in found)

    def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, kept."""
        return self._weight(super().get_high_entropy_mask(*args, **kwargs), "entropy_mask")

    def get_off_policy_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, kept."""
        return self._weight(GRPOTrainer.get_off_policy_mask(*args, **kwargs), "off_policy_mask")

    def _weight(self, x: Tensor, name: str) -> Tensor:
        if self._seen is not None:
            self._seen[name] = x
        return x

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        coef = self._entropy_coef_of_this_step()
        seen: dict[str, Any] = {}
        self._seen = seen
        try:
            super()._compute_loss(model, inputs)
        finally:
            self._seen = None
        logprobs, entropies, aux_loss = seen["scored"]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        weights = [seen[name].float() for name in ("off_policy_mask", "entropy_mask")
                   if name in seen]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            weights.append(inputs["importance_sampling_ratio"])
        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1.0
        loss = self._policy_loss(inputs, logprobs, mask,
                                 functools.reduce(torch.mul, weights) if weights else None)
        if LOSS_TYPES[self.loss_type] == "token-sum":  # TRL counts the tokens of all processes
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            share = accumulated / self.args.steps_per_generation if training else 1.0
            loss = loss / (tokens * share)
        else:
            loss = loss / accumulated
        if coef:
            shown = mask * seen.get("entropy_mask", 1)
            mean = (entropies * shown).sum() / shown.sum().clamp(min=1.0)
            loss = loss - coef * mean / accumulated
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
        return loss

    def _entropy_coef_of_this_step(self) -> float:
        """Read before TRL's loss moves it for the next step."""
        if not self._entropy_bonus_enabled:
            return 0.0
        held = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        return 0.0 if held else self.entropy_coef

    def _policy_loss(self, inputs: dict[str, Any], logprobs: Tensor, mask: Tensor,
                     weights: Tensor | None) -> Tensor:
        """The policy loss with its KL term; what TRL calls grpo and so on, as ours calls it."""
        args, low, high = self.args, self.epsilon_low, self.epsilon_high
        old = inputs.get("old_per_token_logps")
        chosen: dict[str, Any] = {"clip_low": low, "clip_high": high}
        if self.loss_type == "cispo":
            chosen = {"objective": "cispo", "clip_low": 1.0, "clip_high": high - 1}
        elif self.loss_type == "sapo":
            chosen = {"objective": "sapo", "tau_pos": args.sapo_temperature_pos,
                      "tau_neg": args.sapo_temperature_neg}
        elif args.delta is not None:  # max(-A min(r, delta), -A clip(r)) in our terms
            chosen = {"clip_low": low, "clip_high": min(high, args.delta - 1),
                      "dual_clip": max(args.delta, 1 + high)}
        return tk.ppo_loss(
            logprobs, logprobs.detach() if old is None else old, inputs["advantages"], mask,
            **chosen, ratio=self.importance_sampling_level, weights=weights,
            ref_logprobs=inputs["ref_per_token_logps"] if self.beta else None,
            kl_coef=self.beta, kl_estimator="k3",
            kl_ratio_weighted=bool(self.beta) and args.use_bias_correction_kl,
            reduction=LOSS_TYPES[self.loss_type], num_sequences="all",
            norm_length=self.max_completion_length, max_log_ratio=torch.inf).loss


def _totals_of(function: Callable[..., Any], paid: TokenRewards) -> Callable[..., Any]:
    """The function of a user as TRL calls it: it gives totals, and `paid` keeps the tokens."""
    def totals(entries: Any, given: dict[str, Any]) -> list[float | None]:
        return paid.totals(entries, given["completions"], given["completion_ids"])

    async def later(**given: Any) -> list[float | None]:
        return totals(await function(**given), given)

    def now(**given: Any) -> list[float | None]:
        return totals(function(**given), given)

    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    waits = any(map(inspect.iscoroutinefunction, (inner, type(inner).__call__)))
    called: Callable[..., Any] = later if waits else now
    return functools.update_wrapper(called, function) if hasattr(function, "__name__") else called
