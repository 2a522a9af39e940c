"""SkyRL 0.4: rewards of every token from the exported reward model, GAE over a mask, fused losses.

    python -m tppo_kernels.integrations.skyrl FILE.yaml trainer.policy.model.path=... ...

trains with `TokenPPOExp`; a script that has an experiment of its own takes the parts: importing
this file registers the advantage estimator "tppo_gae" and the policy loss "tppo" with SkyRL, and
`patch()` puts our operators under SkyRL's own names, to SkyRL's numbers; `unpatch()` undoes that.

What SkyRL does otherwise than we do, and what `patch()` therefore reproduces:

- `compute_gae_advantage_return` walks over every column, of tools and of padding too: a token of a
  tool is a step with the critic's value and one more factor gamma * lambda. "tppo_gae" steps over
  what the policy has not written; SkyRL hands estimators the response mask, so `TokenPPOTrainer`
  gives it the loss mask.
- Whitening divides by n - 1 and raises where the mask has one token or none; ours is 0 there.
- `ppo_critic_loss` takes the mean over all rows, those without a valid token included.
- Policy losses are sums: the reduction is in the advantages, which SkyRL scales beforehand.
- At masked slots SkyRL's whitened advantages are not 0, and `advantage_batch_normalize` takes its
  mean over them (its own issue 1305); ours are 0.
- A NaN behind a mask reaches SkyRL's losses, which multiply by the mask; ours select.
"""
# No `from __future__ import annotations`: SkyRL reads the types of its configuration's fields.

import asyncio
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tppo_kernels as tk

from . import _peer
from ._peer import Part, Replacements
from ._reward_model import TokenRewardModel, deal, gather

if __name__ == "__main__":  # other processes know what is pickled by its module's name
    try:
        from tppo_kernels.integrations.skyrl import main as run_as_a_module
    except _peer.PeerError as error:
        sys.exit(str(error))
    run_as_a_module()
    sys.exit()

VERSIONS = _peer.PEERS["skyrl"].versions
GAE, LOSS, ENVIRONMENT = "tppo_gae", "tppo", "tppo"  # what SkyRL's configuration names
_UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"
_TORCH = "skyrl.backends.skyrl_train.utils.torch_utils"
_LOSS = "log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs"
_INTERFACE: dict[str, str | None] = {
    f"{_UTILS}:compute_gae_advantage_return":
        "token_level_rewards, values, response_mask, gamma, lambd, kwargs",
    f"{_UTILS}:masked_whiten": "values, mask, shift_mean",
    f"{_UTILS}:ppo_policy_loss": _LOSS,
    f"{_UTILS}:ppo_critic_loss": "values, old_values, returns, config, loss_mask",
    f"{_UTILS}:BaseFunctionRegistry.register": "cls, name, func",
    f"{_UTILS}:apply_off_policy_correction":
        "loss, old_log_probs, rollout_logprobs, loss_mask, off_policy_correction",
    f"{_TORCH}:logprobs_from_logits": "logits, labels, inplace_backward",
    "skyrl.train.generators.base:GeneratorInterface.generate": "self, input_batch",
    "skyrl.train.trainer:RayPPOTrainer.compute_advantages_and_returns": "self, data",
    "skyrl.train.entrypoints.main_base:BasePPOExp.get_generator":
        "self, cfg, tokenizer, inference_engine_client",
}
_peer.require("skyrl", VERSIONS, _INTERFACE)

# What follows is there, and as we know it.
import ray  # noqa: E402
import skyrl_gym  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402
from skyrl.backends.skyrl_train.utils import ppo_utils, torch_utils  # noqa: E402
from skyrl.train.config import SkyRLTrainConfig  # noqa: E402
from skyrl.train.entrypoints.main_base import BasePPOExp  # noqa: E402
from skyrl.train.generators.base import GeneratorInterface  # noqa: E402
from skyrl.train.trainer import RayPPOTrainer  # noqa: E402
from skyrl.train.utils import validate_cfg  # noqa: E402
from skyrl.train.utils.utils import initialize_ray  # noqa: E402
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput  # noqa: E402


@ppo_utils.register_advantage_estimator(GAE)
def token_gae(token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float,
              lambd: float, **_: Any) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns of tokens, [B, T]: `tk.token_advantages`.

    What the mask leaves out is no step: the value of the token before it is bootstrapped from the
    token after it. Advantages there are 0. Whitening divides by n - 1.
    """
    found = tk.token_advantages(token_level_rewards, values, _valid(response_mask), gamma=gamma,
                                lam=lambd)
    return found.advantages, found.returns


@ppo_utils.register_policy_loss(LOSS)
def token_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, config: Any,
                      loss_mask: Tensor | None = None, rollout_logprobs: Tensor | None = None,
                      ) -> tuple[Tensor, dict[str, float]]:
    """The clipped loss of tokens, summed, and its metrics: `tk.ppo_loss` with a dual clip at
    `clip_ratio_c`, and SkyRL's off-policy correction as weights.

    Beside SkyRL's `clip_ratio` the metrics have the means of `tk.ppo_loss`, and `ratio_max`.
    """
    weights, corrections = _correction(old_log_probs, loss_mask, rollout_logprobs, config)
    found = tk.ppo_loss(log_probs, old_log_probs, advantages, _valid(loss_mask), weights=weights,
                        clip_low=config.eps_clip_low, clip_high=config.eps_clip_high,
                        dual_clip=config.clip_ratio_c, reduction="token-sum")
    sums: dict[str, float] = dict(zip(  # the host reads once
        found.metrics._fields, torch.stack(found.metrics).tolist(), strict=True))
    means = {"clip_ratio": sums["clip_low_count"] + sums["clip_high_count"],
             "clip_fraction_dual": sums["clip_dual_count"],
             "clamped_fraction": sums["clamped_count"], "ratio_mean": sums["ratio_sum"],
             "approx_kl_k1": sums["approx_kl_k1_sum"], "approx_kl_k3": sums["approx_kl_k3_sum"]}
    means = {name: total / max(sums["tokens"], 1) for name, total in means.items()}
    return found.loss, {**means, "ratio_max": sums["ratio_max"], **corrections}


def compute_gae_advantage_return(token_level_rewards: Tensor, values: Tensor, response_mask: Tensor,
                                 gamma: float, lambd: float, **_: Any) -> tuple[Tensor, Tensor]:
    """SkyRL's GAE: every column is a step, and the mask is for whitening alone."""
    found = tk.token_advantages(token_level_rewards, values, None,
                                train_mask=_valid(response_mask), gamma=gamma, lam=lambd)
    return found.advantages, found.returns


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """SkyRL's whitening, by n - 1; 0 (or the mean) where fewer than two tokens are valid."""
    return tk.whiten(values, _valid(mask), shift_mean=shift_mean)


def ppo_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, config: Any,
                    loss_mask: Tensor | None = None, rollout_logprobs: Tensor | None = None,
                    ) -> tuple[Tensor, dict[str, float]]:
    """SkyRL's losses "regular" and "dual_clip", with its metrics."""
    kinds = ("regular", "dual_clip")
    if config.policy_loss_type not in kinds:
        raise ValueError(f"policy_loss_type is {config.policy_loss_type!r}, expected one of "
                         f"{', '.join(kinds)}")
    weights, corrections = _correction(old_log_probs, loss_mask, rollout_logprobs, config)
    dual = config.clip_ratio_c if config.policy_loss_type == "dual_clip" else None
    found = tk.ppo_loss(log_probs, old_log_probs, advantages, _valid(loss_mask), weights=weights,
                        clip_low=config.eps_clip_low, clip_high=config.eps_clip_high,
                        dual_clip=dual, reduction="token-sum")
    return found.loss, {"clip_ratio": found.metrics.clip_fraction.item(), **corrections}


def ppo_critic_loss(values: Tensor, old_values: Tensor, returns: Tensor, config: Any,
                    loss_mask: Tensor | None = None) -> tuple[Tensor, float | None]:
    """SkyRL's critic loss: the mean of the rows' means, rows without a valid token among them."""
    clip = config.value_clip
    found = tk.value_loss(values, returns, _valid(loss_mask), old_values=old_values, clip=clip,
                          reduction="seq-mean-token-mean", num_sequences=max(1, len(values)))
    return found.loss, None if clip is None else found.metrics.clip_fraction.item()


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """SkyRL's log-probs of labels, in fp32 from logits of any dtype."""
    return tk.token_logprobs(logits, labels)[0]


def _valid(mask: Tensor | None) -> Tensor | None:
    """Where a mask of SkyRL, of whole numbers or floats, is not 0."""
    return None if mask is None else mask > 0


def _correction(old: Tensor, mask: Tensor | None, rollout: Tensor | None, config: Any
                ) -> tuple[Tensor | None, dict[str, float]]:
    """SkyRL's correction for rollouts of another policy, as weights of tokens, with its metrics;
    no weights where it is off."""
    if rollout is None:
        return None, {}
    weights, kept, metrics = ppo_utils.apply_off_policy_correction(
        torch.ones_like(old), old, rollout, mask, config.off_policy_correction)
    return (weights * kept if metrics else None), metrics


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as another object: each replaced name has its own."""
    @functools.wraps(function)
    def same(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return same


_OURS: dict[str, Callable[..., Any]] = {
    f"{_UTILS}:compute_gae_advantage_return": compute_gae_advantage_return,
    f"{_UTILS}:AdvantageEstimatorRegistry._functions[gae]": _again(compute_gae_advantage_return),
    f"{_UTILS}:masked_whiten": masked_whiten,
    f"{_UTILS}:ppo_policy_loss": ppo_policy_loss,
    f"{_UTILS}:PolicyLossRegistry._functions[regular]": _again(ppo_policy_loss),
    f"{_UTILS}:PolicyLossRegistry._functions[dual_clip]": _again(ppo_policy_loss),
    f"{_UTILS}:ppo_critic_loss": ppo_critic_loss,
}
if not torch_utils.FLASH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE:
    _OURS[f"{_TORCH}:logprobs_from_logits"] = logprobs_from_logits
_PART = Part(Replacements("skyrl"), _INTERFACE, _OURS, "ours are " + ", ".join(
    sorted({name.partition(":")[2] for name in _OURS if "[" not in name})))


def patch() -> None:
    """Puts our operators under SkyRL's own names in this process, to SkyRL's numbers, and says so.

    GAE, whitening, the losses "regular" and "dual_clip", the critic's loss, and the log-probs where
    SkyRL does not take them from flash-attn. Twice is once.
    """
    _peer.patch_parts(VERSIONS, _PART)


def unpatch() -> None:
    """Puts SkyRL's own functions back, and says which another library has replaced since."""
    _peer.unpatch_parts(_PART)


def probe() -> str:
    """SkyRL's version, where it has every name that this file needs; raises PeerError."""
    return _peer.probe_parts(VERSIONS, _PART)


class TokenRewardGenerator(GeneratorInterface):
    """A generator of SkyRL whose responses have a reward at each token, from a reward model.

    generator: any of SkyRL's; its own rewards are not used. score: the `rewards` of a
    `TokenRewardModel`, or a function of its kind. suggested_length: in tokens, for the length
    penalty; a column `suggested_length` of the data goes before it; without either no penalty.
    """

    def __init__(self, generator: Any, score: Callable[..., list[list[float]]],
                 suggested_length: float | None = None) -> None:
        self.generator, self.score = generator, score
        self.suggested_length = suggested_length

    async def generate(self, input_batch: Any, **kwargs: Any) -> Any:
        """SkyRL's output with `rewards`, a list of floats for each response."""
        output = await self.generator.generate(input_batch, **kwargs)
        lengths = self._lengths(input_batch, len(output["response_ids"]))
        output["rewards"] = await asyncio.to_thread(
            self.score, output["prompt_token_ids"], output["response_ids"], output["loss_masks"],
            lengths)
        return output

    def _lengths(self, batch: Any, responses: int) -> list[float] | None:
        extras: Sequence[Any] = batch.get("env_extras") or [{}] * len(batch["prompts"])
        found: list[Any] = [
            (row or {}).get("suggested_length", self.suggested_length) for row in extras
        ]
        if any(length is None for length in found):
            if any(length is not None for length in found):
                raise ValueError(f"suggested_length is missing in row {found.index(None)} of "
                                 f"{len(found)}, expected it in all rows of the data or in none")
            return None
        if len(found) != responses:
            raise ValueError(f"{responses} responses of {len(found)} prompts, expected one each: "
                             "generator.step_wise_trajectories cuts them, set it to false")
        return [float(length) for length in found]


class RewardModelEnv(BaseTextEnv):
    """The environment "tppo": one turn, whose reward is the reward model's."""

    def __init__(self, env_config: Any = None, extras: Any = None) -> None:
        super().__init__()

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Ends the turn; its own reward is 0."""
        return BaseTextEnvStepOutput(observations=[], reward=0.0, done=True, metadata={})


skyrl_gym.register(id=ENVIRONMENT, entry_point=RewardModelEnv)


@dataclass
class RewardModelConfig:
    """The section `reward_model` of the configuration."""

    path: str | None = None
    """Folder that `tppo train-rm` or `tppo merge` exported."""
    mode: str = "expected"
    values: list[float] = field(default_factory=lambda: [0.0, -0.5, 0.5])
    length_alpha: float = 2.0
    suggested_length: float | None = None
    """Tokens after which the length penalty bites, where the data has no such column."""
    num_gpus: float = 0.0
    """Of a GPU, for each replica; 0: it runs on the CPU of the driver."""
    replicas: int = 1


@dataclass
class TokenPPOConfig(SkyRLTrainConfig):
    """SkyRL's configuration with the section `reward_model`."""

    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> "TokenPPOConfig":
        """From `key.path=value` and YAML files of such keys, nested; the later one counts."""
        flat: list[str] = []
        for argument in arguments:
            if "=" not in argument and argument.endswith((".yaml", ".yml")):
                flat += _flat(OmegaConf.to_container(OmegaConf.load(argument)))
            else:
                flat.append(argument)
        return cls.from_cli_overrides(flat)


def _flat(tree: Any, prefix: str = "") -> list[str]:
    if isinstance(tree, dict) and tree:
        return [line for key, value in tree.items() for line in _flat(value, f"{prefix}{key}.")]
    return [f"{prefix[:-1]}={json.dumps(tree)}"]


def check_config(cfg: Any) -> None:
    """SkyRL's own checks, and ours of what token-level PPO needs.

    Raises ValueError that names the key, what it was and what was expected.
    """
    algorithm, generator = cfg.trainer.algorithm, cfg.generator
    if not cfg.reward_model.path:
        raise ValueError("reward_model.path is not set, expected the folder that `tppo train-rm` "
                         "exported, as RUN/train-rm/model")
    if algorithm.advantage_estimator == GAE and not cfg.trainer.critic.model.path:
        raise ValueError("trainer.critic.model.path is not set, expected a model: the advantages "
                         f"of {GAE!r} need a critic; the policy's own path will do")
    if generator.step_wise_trajectories:
        raise ValueError("generator.step_wise_trajectories is true, expected false: SkyRL spreads "
                         "one advantage over all tokens of a step there")
    validate_cfg(cfg)


class TokenPPOTrainer(RayPPOTrainer):
    """SkyRL's trainer, whose "tppo_gae" steps over the tokens of tools."""

    def compute_advantages_and_returns(self, data: Any) -> Any:
        """As SkyRL's, with the loss mask where SkyRL hands estimators the response mask."""
        if self.cfg.trainer.algorithm.advantage_estimator != GAE:
            return super().compute_advantages_and_returns(data)
        response_mask = data["response_mask"]
        data["response_mask"] = (data["loss_mask"] > 0).to(response_mask.dtype)
        data = super().compute_advantages_and_returns(data)
        data["response_mask"] = response_mask.to(data["response_mask"].device)
        return data


class TokenPPOExp(BasePPOExp):
    """An experiment of SkyRL: token-level PPO by an exported reward model."""

    def get_generator(self, cfg: Any, tokenizer: Any, inference_engine_client: Any) -> Any:
        """SkyRL's generator, its responses rewarded token by token."""
        return TokenRewardGenerator(
            super().get_generator(cfg, tokenizer, inference_engine_client),
            self.get_reward_model(cfg.reward_model), cfg.reward_model.suggested_length)

    def get_reward_model(self, cfg: Any) -> Callable[..., list[list[float]]]:
        """What gives rewards to tokens: the exported model, here or in `replicas` processes, each
        with its share of a GPU beside SkyRL's own parts."""
        settings = {"mode": cfg.mode, "values": cfg.values, "alpha": cfg.length_alpha}
        if not cfg.num_gpus:
            return TokenRewardModel(cfg.path, **settings).rewards
        group = None if self.colocate_pg is None else self.colocate_pg.pg
        actors = [ray.remote(TokenRewardModel).options(
            num_gpus=cfg.num_gpus, num_cpus=0, scheduling_strategy="DEFAULT" if group is None else
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
        ).remote(cfg.path, **settings) for i in range(cfg.replicas)]

        def rewards(*columns: Any) -> list[list[float]]:
            shares = zip(actors, deal(columns, len(actors)), strict=True)
            return gather(ray.get([actor.rewards.remote(*share) for actor, share in shares]))

        return rewards

    def get_trainer(self, *args: Any, **kwargs: Any) -> RayPPOTrainer:
        """The trainer whose GAE steps over the tokens of tools."""
        return TokenPPOTrainer(*args, **kwargs)


@ray.remote(num_cpus=1)
def entrypoint(cfg: Any) -> None:
    """The whole training, in a process of the cluster."""
    TokenPPOExp(cfg).run()


def main() -> None:
    """`key.path=value` and YAML files, as `TokenPPOConfig.from_arguments` reads them."""
    cfg = TokenPPOConfig.from_arguments(sys.argv[1:])
    check_config(cfg)
    initialize_ray(cfg)
    ray.get(entrypoint.remote(cfg))

