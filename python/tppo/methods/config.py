"""The settings of the methods, each of which takes its own section.

The defaults are the numbers that were measured to work on the generated sessions with a model of
about 0.2M parameters; a larger model wants smaller learning rates (the paper: 5e-6 for PPO).
This file loads no torch, so that `tppo --help` can list the settings at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tppo.settings import Count, Natural, NonNegative, Part, Positive, Share, Text, section

MAX_TOKENS = 65_536  # that a model reads at once
Algorithm = Literal["ppo", "ppo++", "aggrevated", "lols", "d2lols"]
# Settings of PPO that the weights do not depend on.
WITHOUT_EFFECT = ("checkpoint_every", "max_spoilt", "verify_prefix", "without_signal")


@section
class SFTConfig:
    """Supervised fine-tuning on the true next queries, to the early stop."""

    max_steps: Count = 1_500
    """Optimiser steps at most; the early stop usually comes before."""
    max_passes: Positive = 50.0
    """At most this many passes over the sessions: a small file gets fewer steps."""
    decay_steps: Count = 700
    """The learning rate falls linearly to `final_lr_share` of it over this many steps."""
    final_lr_share: Share = 0.1
    """The part of the learning rate that is left after `decay_steps`."""
    batch_size: Count = 32
    """Sessions an optimiser step."""
    max_tokens: Count = MAX_TOKENS
    """Tokens of prompts and answers that the model reads at once: less takes less memory."""
    lr: Positive | None = None
    """By default 5e-3 from scratch, 2e-5 with --model."""
    eval_every: Count = 50
    """Optimiser steps between two evaluations of the held-out loss; at most three passes."""
    patience: Count = 2
    """Stop after this many evaluations without an improvement of `min_delta`."""
    min_delta: NonNegative = 0.003
    """Smallest improvement of the held-out loss that counts, in nats a token."""
    prompt_loss: bool | None = None
    """Train on prompt tokens too; by default only where the model starts from scratch."""
    grad_norm: Positive = 1.0
    """Gradients with a larger norm are scaled down to it."""


@section
class RewardModelConfig:
    """Token reward model: three classes, local and global loss."""

    model: Text | None = None
    """Local folder or id on the hub of a token classifier (or its trunk) with its tokenizer,
    whichever that is; by default the trunk and the tokenizer of the SFT model."""
    revision: Text | None = None
    """Branch, tag or commit of that model where it is an id of a hub."""
    epochs: Count = 3
    """Passes over the labelled answers."""
    batch_size: Count = 32
    """Labelled answers an optimiser step."""
    max_tokens: Count = MAX_TOKENS
    """Tokens of prompts and answers that the model reads at once: less takes less memory, and
    answers of a batch that exceeds it are read twice."""
    lr: Positive | None = None
    """By default 1e-3 from scratch, 1e-5 with --model or a model of its own (the paper)."""
    heldout_share: Part = 0.1
    """Share of the labelled answers kept for accuracy and AUC."""
    repeated_share: Share = 1.0
    """Share of the labelled answers that are trained on a second time, with one query repeated."""
    local_weight: NonNegative = 0.4
    """Weight of the local loss, the classification of each token."""
    global_weight: NonNegative = 0.6
    """Weight of the global loss, the classification of whole answers."""
    hand_weight: Positive = 4.0
    """What a label by hand weighs in both losses where others label too, whose labels weigh 1."""
    balance: Positive = 3.0
    """Kept ratio of the larger to the smaller of classes 1 and 2."""
    min_auc: Share = 0.8
    """PPO does not start below this AUC of relevant against irrelevant tokens; with few labelled
    sessions, where its whole 95 % interval is below."""
    min_auc_sessions: Natural = 1_000
    """With fewer labelled sessions the interval of the AUC decides: a low AUC whose interval
    reaches `min_auc` warns instead of stopping."""
    grad_norm: Positive = 1.0
    """Gradients with a larger norm are scaled down to it."""

    def __post_init__(self) -> None:
        if self.local_weight == self.global_weight == 0:
            raise ValueError("local_weight, global_weight were 0, 0, expected one of them above 0")
        if self.revision is not None and self.model is None:
            raise ValueError(f"revision was {self.revision!r} and model None, expected the id on "
                             "the hub that it is a revision of")  # fmt: skip


@section
class PPOConfig:
    """Token-level PPO (Ouyang et al., EMNLP 2025)."""

    steps: Count = 80
    """PPO steps: each samples answers, judges them, and trains on them."""
    max_passes: Positive | None = None
    """At most this many passes over the prompts: a small file gets fewer steps. By default 2 in a
    run of stages; with --reward as many as the steps take."""
    batch_size: Count = 64
    """Prompts a step."""
    responses_per_prompt: Count = 1
    """Responses sampled for each of them; the prompt is computed once for all."""
    minibatch_size: Count = 32
    """Responses an optimiser step."""
    max_tokens: Count = MAX_TOKENS
    """Tokens of prompts and responses that a model reads at once: less takes less memory."""
    epochs: Count = 2
    """Passes of a step over its own responses."""
    lr: Positive | None = None
    """By default 3e-4 from scratch, 5e-6 with --model (the paper)."""
    critic_lr: Positive | None = None
    """By default 1e-3 from scratch, 1e-5 with --model."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How both learning rates fall after their warm-up, to `final_lr_share` at the last step."""
    final_lr_share: Share = 0.0
    """The part of the learning rates that a linear or cosine schedule goes down to."""
    lr_warmup_steps: Natural = 0
    """PPO steps over which the policy's learning rate rises linearly; 0: it begins at `lr`."""
    critic_lr_warmup_steps: Natural = 0
    """The same for the critic's learning rate."""
    critic_warmup_steps: Natural = 0
    """First PPO steps that train the critic alone, on answers of the policy as it was."""
    fit_critic: Natural = 0
    """Fit the critic before the first step on as many answers of the SFT model (in a run of stages
    those that it has generated, at most all of them), to an epoch past its best; 0: it starts at 0.
    """
    advantage: Literal["gae", "grpo", "rloo", "remax"] = "gae"
    """gae trains a critic.  grpo, rloo and remax train none, and none is loaded: they compare the
    responses of one prompt, of which they need at least two (responses_per_prompt), and do not use
    lam, critic_lr, value_clip and bootstrap_truncated.  With remax the last response of each prompt
    is the greedy one, which the others are compared with."""
    gamma: Share = 1.0
    """Discount of the reward of later tokens; 1: they count in full."""
    lam: Share = 0.95
    """Lambda of GAE: 1 trusts the rewards that came alone, 0 the critic alone."""
    clip: Positive = 0.2
    """A token's probability ratio counts no further than 1 - clip and 1 + clip."""
    value_clip: Positive | None = None
    """The same for the critic: how far a step may move a value; None: as far as it goes."""
    kl_coef: NonNegative = 0.2
    """What a nat of KL to the reference costs of the reward; with `adaptive_kl` the first one."""
    adaptive_kl: Positive | None = None
    """KL per response, in nats, that `kl_coef` is moved towards after each step (Ziegler et al.
    2019); None: it stays as it is."""
    adaptive_kl_horizon: Positive = 10_000.0
    """Over so many responses `kl_coef` changes by at most 22 %: smaller is faster.  At least the
    responses of a step."""
    target_kl: Positive | None = None
    """Leave out the rest of a step's updates once a minibatch is further than this from the policy
    that sampled it, in nats a token (policy/approxkl_avg); None: all epochs are run."""
    reward: Literal["argmax", "expected"] = "expected"
    """Reward of a token: of its likeliest class (the paper) or the expectation over classes."""
    reward_values: tuple[float, float, float] = (0.0, -0.5, 0.5)
    """Reward of the classes none, irrelevant, relevant; the paper's scale is 0 1 2."""
    length_alpha: NonNegative | None = 2.0
    """Steepness of the length penalty; None: no penalty."""
    format_cost: NonNegative = 3.0
    """What each fault of an answer's form costs, where it stands: a query that repeats another one,
    is one too many, or is missing. 0: the rewards of tokens alone, as in the paper."""
    train_on_unlabelled: bool = True
    """Train the policy on tokens of class 0 too; False is the paper read literally."""
    bootstrap_truncated: bool | None = None
    """Bootstrap cut answers from the critic; by default only with the token reward model without
    its length penalty, for any other reward would be counted twice where it pays at the end."""
    normalize: bool = True
    """Whiten the advantages (gae), or divide them by the deviation within their prompt's responses
    (grpo); rloo and remax do neither."""
    grad_norm: Positive = 1.0
    """Gradients with a larger norm are scaled down to it."""
    verify_prefix: bool = False
    """Before the first update, compare the shared prefix with dense prompts on one minibatch."""
    eval_every: Count = 5
    """PPO steps between two evaluations of held-out relevance (the rule's), which decides the
    weights kept."""
    min_format: Share = 0.95
    """Weights are not kept whose held-out format share is lower than this part of SFT's."""
    max_kl: NonNegative = 10.0
    """Weights whose held-out KL per response is larger, in nats, are not kept."""
    checkpoint_every: Count = 5
    """PPO steps between two checkpoints."""
    max_spoilt: Count = 3
    """A batch whose loss, gradient, reward or value is not finite is skipped, counted (ppo/spoilt)
    and kept for `tppo replay`; so many in a row stop the training."""
    without_signal: bool = False
    """Go on where there is nothing to learn from: labels of one class, a policy that stays put."""

    def __post_init__(self) -> None:
        if self.advantage != "gae" and self.responses_per_prompt < 2:
            raise ValueError(
                f"responses_per_prompt was 1, expected at least 2 with advantage {self.advantage}, "
                "which compares the responses of one prompt: --ppo.responses-per-prompt 8"
            )
        for name in ("critic_warmup_steps", "fit_critic"):
            if self.advantage != "gae" and getattr(self, name):
                raise ValueError(
                    f"{name} was {getattr(self, name)}, expected 0 with advantage "
                    f"{self.advantage}, which has no critic"
                )
        if self.adaptive_kl is not None and not self.kl_coef:
            raise ValueError(
                "kl_coef was 0, expected more with adaptive_kl, which multiplies it "
                "(--ppo.kl-coef 0.2)"
            )
        responses = self.batch_size * self.responses_per_prompt
        if self.adaptive_kl is not None and self.adaptive_kl_horizon < responses:
            raise ValueError(
                f"adaptive_kl_horizon was {self.adaptive_kl_horizon:g}, expected at least the "
                f"{responses} responses of a step (--ppo.adaptive-kl-horizon)"
            )


@section
class SERConfig:
    """Self-evolved reward learning (Huang et al., ICLR 2025)."""

    labels: Literal["pairs", "words"] = "pairs"
    """pairs: a model of whole answers, from pairs of answers to one history. words: a token reward
    model, from labels of words."""
    pooling: Literal["last", "mean"] = "last"
    """pairs: the model reads the state of an answer's last token, or the mean of all of them."""
    seed_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the labelled sessions, or prompts, whose labels are used. The labels of the others
    are hidden, and say only how right the model was. By default .15, and all that people gave by
    hand."""
    heldout_share: Part = 0.1
    """Share of them that is kept for figures, and never trained on."""
    rounds: Natural = 3
    """Rounds of labelling for itself, at most; 0: the seed's labels alone."""
    filter: Literal["status", "any"] = "status"
    """Pairs that are kept. status: easy ones, or hard ones where those are too few (the paper).
    any: those that are either (the authors' code)."""
    tau_high: Share = 0.55
    """An easy pair has one answer with a probability above this, ..."""
    tau_low: Share = 0.45
    """... and the other one below this."""
    tau_delta: Share = 0.3
    """The probabilities of a hard pair are further apart than this."""
    tau_token: Share = 0.9
    """words: a token is labelled whose likeliest class has at least this probability."""
    min_share: Share = 0.05
    """The rounds end where fewer are kept than this share of those without a label."""
    all_labels: bool = True
    """Where the labels of all are known, train on them too, and on the true labels of what the
    rounds have labelled, to compare in the report."""
    scale: Positive = 1.0
    """pairs: what an answer is paid in PPO is this times its probability less one half."""

    def __post_init__(self) -> None:
        if self.tau_low > self.tau_high:
            raise ValueError(f"tau_low, tau_high were {self.tau_low:g}, {self.tau_high:g}, "
                             "expected tau_low to be the smaller one")  # fmt: skip


@section
class PITConfig:
    """Implicit self-improvement (Wang et al., ICLR 2024)."""

    stage_0: Natural = 20
    """PPO steps with references of the data; 0 leaves the stage out."""
    stage_1: Natural = 20
    """PPO steps with references that the policy of the moment writes; 0 leaves the stage out."""
    reward: Literal["answer", "token"] = "answer"
    """The gap is paid at the end of an answer, or each token's part of it at the token."""
    scale: Positive = 1.0
    """What is paid is this times the gap."""
    fifth_term: bool = False
    """Train the gap model on g_wl above g_lw too, which follows from the other four terms."""
    heldout_share: Part = 0.1
    """Share of the pairs that stops SFT and the gap model, and gives figures of the latter."""
    improve_steps: Count = 3
    """Times that `tppo improve` has each answer bettered."""


EARLY = 0.2  # of the steps are of aggrevated in d2lols: the paper has .2 and .4


@section
class RLGFConfig:
    """Reinforcement learning with guided feedback (Chang et al. 2023): how learner and guide share
    an answer."""

    beta: Share = 0.8
    """ppo++: probability that an answer begins with a part of the guide's; 0 is plain PPO."""
    beta_aggrevated: Share = 0.8
    """aggrevated: probability that an answer begins with a part of the learner's; the guide writes
    all of the others, which train the critic alone."""
    tau: Share = 0.8
    """lols: probability that a step is one of ppo++, else it is one of aggrevated."""
    switch_step: Natural | None = None
    """d2lols: the last step of aggrevated, those behind it are of ppo++; by default a fifth of the
    steps."""
    kl_in_reward: bool = True
    """Take kl_coef times KL off the reward, as PPO does; False: KL is a figure alone, as in the
    authors' code for the algorithms with a guide."""
    target_nll: NonNegative = 0.0
    """Weight of the negative log-likelihood of the true answer in the policy's loss (0.1 in the
    authors' code); with --reward the prompts need a column "target" with that answer."""
    max_skipped: Count = 3
    """Steps in a row that are skipped, because the guide gives no answer, before the run stops."""

    def last_aggrevated(self, steps: int) -> int:
        """The last of so many steps of d2lols that is one of aggrevated."""
        return round(EARLY * steps) if self.switch_step is None else min(self.switch_step, steps)

    def asked(self, algorithm: Algorithm, steps: int) -> float:
        """The share of answers that a guide is asked for: of ppo++ those that are cut, of
        aggrevated all, but for those that the learner has ended.
        """
        early = {"ppo": 0.0, "ppo++": 0.0, "aggrevated": 1.0, "lols": 1.0 - self.tau,
                 "d2lols": self.last_aggrevated(steps) / max(steps, 1)}[algorithm]  # fmt: skip
        return 0.0 if algorithm == "ppo" else early + (1.0 - early) * self.beta
