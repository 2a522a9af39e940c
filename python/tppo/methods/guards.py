"""What PPO checks before its first update: that the parts it is made of agree with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tppo.methods.advantages import TokenAdvantages
from tppo.methods.experience import Experience, Models
from tppo.models.batch import Batch
from tppo.models.guards import GuardError, trainable
from tppo.models.policy import policy_logprobs
from tppo.models.precision import dtype_name, relative_rms, rounding_error
from tppo.progress import say
from tppo.rewards import Reward, TokenReward
from tppo.rewards.token_model import TokenModelReward

MAX_RATIO_DRIFT = 1e-4  # of the first minibatch of the first step, in fp32
MAX_PREFIX_ERROR = 1e-4  # of shared against dense, of the largest value, in fp32


def check_step_zero_ratio(logprobs: Tensor, old: Tensor, mask: Tensor) -> None:
    """Before the first update new and old log-probs are those of one model.

    Errors: GuardError where max|ratio - 1| >= 1e-4: dropout, a second temperature or a mask that
    differs between the two passes.
    """
    ratio = torch.where(mask, logprobs.detach() - old, 0.0).exp()  # [B, T]
    drift = (ratio - 1).abs().max().item()
    if not drift < MAX_RATIO_DRIFT:
        raise GuardError(f"step 0: max|ratio - 1| is {drift:.1e}, expected < {MAX_RATIO_DRIFT:.0e}")


def check_step_zero(
    policy: PreTrainedModel, part: Experience, logprobs: Tensor, temperature: float
) -> None:
    """Before the first update the log-probs of the loss are those of the policy that sampled.

    In float32 they are compared with the old ones as they are.  In 16 bits old ones come from
    batches of another shape, whose sums are rounded in another order.  Read again in the batch of
    the loss they are equal to the bit, and are held to float32's bound; the old ones are held to
    what roundings explain (`rounding_error`).
    Errors: GuardError where they differ: dropout, a second temperature or a mask that differs
    between the two passes, or answers in another order.
    """
    mask = part.masks.policy
    if policy.dtype == torch.float32:
        check_step_zero_ratio(logprobs, part.logprobs, mask)
        return
    with torch.no_grad():
        again, _ = policy_logprobs(policy, part.batch, temperature)  # [B, T]
    check_step_zero_ratio(logprobs, again, mask)
    error, limit = relative_rms(again[mask], part.logprobs[mask]), rounding_error(policy)
    if not error < limit:
        raise GuardError(
            f"step 0: the log-probs of the update differ from those of scoring by {error:.1e} "
            f"(root mean square, relative), expected < {limit:.1e}, the error of roundings in "
            f"{dtype_name(policy.dtype)}"
        )


def check_reward(found: TokenReward, mask: Tensor) -> TokenReward:
    """What a reward gave for responses of this mask, in float32, if it is what `Reward` promises.

    Errors: ValueError naming what it gave.
    """
    if not isinstance(found, TokenReward):
        raise ValueError(
            f"the reward gave a {type(found).__name__}, expected a tppo.TokenReward, such as "
            "TokenReward(rewards) with rewards [B, T]"
        )
    _check_shapes("reward", found, mask)
    outside = (found.rewards != 0) & ~mask.to(found.rewards.device)  # NaN is not 0 either
    if outside.any():
        b, t = outside.nonzero()[0].tolist()
        raise ValueError(
            f"the reward gave {found.rewards[b, t].item()} at token {t} of response {b}, which has "
            f"{int(mask[b].sum())} tokens; expected 0 behind the last one"
        )
    return found._replace(rewards=found.rewards.float())


def _check_shapes(giver: str, found: TokenReward | TokenAdvantages, mask: Tensor) -> None:
    for name, tensor in found._asdict().items():
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(
                f"the {giver} gave {name} of shape {[*tensor.shape]}, expected [B, T] = "
                f"{[*mask.shape]}: a number for each token of each response"
            )


def check_advantage(found: TokenAdvantages, mask: Tensor, needs_critic: bool) -> TokenAdvantages:
    """What an advantage gave for responses of this mask, in float32, if it is what it promises.

    Errors: ValueError naming what it gave.
    """
    if not isinstance(found, TokenAdvantages):
        raise ValueError(
            f"the advantage gave a {type(found).__name__}, expected a tppo.TokenAdvantages"
        )
    if needs_critic and found.returns is None:
        raise ValueError(
            "the advantage gave returns None, expected the critic's targets [B, T]: it says that "
            "it needs a critic (needs_critic)"
        )
    _check_shapes("advantage", found, mask)
    returns = None if found.returns is None else found.returns.float()
    return TokenAdvantages(found.advantages.float(), returns)


def check_shared_prefix(models: Models, reward: Reward, batch: Batch, temperature: float) -> None:
    """A shared prompt gives what dense prompts give: states of every model, and gradients.

    Compared: log-probs, values, class logits where the reward has them, and the gradients of policy
    and critic of the sums of log-probs and of values.  In float32 by the largest error over the
    largest value, in 16 bits by `relative_rms`.
    Errors: GuardError naming the first of them that is off by 1e-4, or `rounding_error`, or more.
    """
    inner = reward.modules() if isinstance(reward, nn.Module) else ()
    classifiers = [module for module in inner if isinstance(module, TokenModelReward)]
    results = []
    for way in (batch, batch.dense()):
        logprobs, _ = policy_logprobs(models.policy, way, temperature)  # [B, T]
        found = {"log-probs": logprobs}
        outputs: list[tuple[str, nn.Module, Tensor]] = [("policy", models.policy, logprobs)]
        if models.critic is not None:
            found["values"], _ = models.critic(way)  # [B, T]
            outputs.append(("critic", models.critic, found["values"]))
        with torch.no_grad():
            for classifier in classifiers:
                found["class logits"] = classifier.logits(way)  # [B, T, 3]
        for name, model, output in outputs:
            gradients = torch.autograd.grad(output.sum(), trainable(model), allow_unused=True)
            kept = [g.flatten() for g in gradients if g is not None]
            found[f"{name}'s gradients"] = torch.cat(kept)
        results.append({name: tensor.detach() for name, tensor in found.items()})
    shared, dense = results
    for name, expected in dense.items():
        if models.policy.dtype == torch.float32:
            error, limit = (shared[name] - expected).abs().max().item(), MAX_PREFIX_ERROR
            error /= max(expected.abs().max().item(), torch.finfo(expected.dtype).tiny)
        else:
            passes = 2 if name.endswith("gradients") else 1
            error = relative_rms(shared[name], expected)
            limit = rounding_error(models.policy, passes)
        if not error < limit:
            raise GuardError(
                f"step 0: {name} with a shared prefix differ from dense ones by {error:.1e} "
                f"(relative), expected < {limit:.1e}; --prefix dense goes on without it"
            )
    say("step 0: the shared prefix agrees with dense prompts, forward and backward")


def check_gradients(trained: Mapping[str, nn.Module], data: Experience) -> None:
    """Before the first update what is trained has gradients: the policy, the critic's head.

    A model that nothing pulls has none: no advantage at the tokens that the policy is trained on,
    or values that are their targets already where the critic is.
    Errors: GuardError naming the model whose gradients are all zero or not finite.  Where the
    reward model rates all tokens alike there is nothing to learn from: only a warning.
    """
    if not data.advantages.any():
        say("WARNING: step 0: every advantage is zero, the reward rates all tokens alike")
        return
    pulls = {"policy": data.advantages[data.masks.policy]}
    if data.returns is not None and data.values is not None:
        pulls["critic"] = (data.returns - data.values)[data.masks.critic]
    for name, model in trained.items():
        if name in pulls and not pulls[name].any():
            continue
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not any(bool(g.any()) for g in gradients):
            raise GuardError(f"step 0: every gradient of the {name} is zero: is it frozen?")
        if not all(bool(g.isfinite().all()) for g in gradients):
            raise GuardError(f"step 0: a gradient of the {name} is not finite")


def stands_still(allowed: bool) -> None:
    """Stop after a first step that left the policy as it was.

    Errors: GuardError unless `allowed`.
    """
    problem = (
        "there is nothing to learn from: the first step left the policy as it was (every advantage "
        "is zero, or the learning rate is too small for a weight to change)"
    )
    if not allowed:
        raise GuardError(f"{problem}. --ppo.without-signal goes on all the same")
    say(f"WARNING: {problem}")


def sums(weights: Sequence[Tensor]) -> list[float]:
    """A number a tensor that changes where the tensor does, but for a coincidence."""
    return torch.stack([w.detach().sum(dtype=torch.float64) for w in weights]).tolist()
