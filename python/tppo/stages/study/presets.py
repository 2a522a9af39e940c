"""The studies that have a name; `study.yaml` in a study's folder shows one as a file to change.

What arms have beside their names was chosen by `tuning`, on seeds that no other study reports.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from tppo.config import Config
from tppo.methods.config import Algorithm, PPOConfig, RewardModelConfig, SFTConfig
from tppo.models.config import AdapterConfig, GenerateConfig
from tppo.sessions.config import SessionsConfig
from tppo.stages.study.config import ANY_MODEL, PAPER, Arm, Noise, Part, Pooling, StudyConfig

WORDS = Arm("words")
SENTENCES = Arm("sentences", labels="sentences", pooling="mean", mode="score", paid="end",
                scale=12.0, fit_critic=800)  # fmt: skip
LABELS = (WORDS, SENTENCES)
FEW = 400  # with more labels the scores of whole answers lie further apart
# Twice as many answers a step, and updates, follow the scores too far at the scale above.
OF_FEW, OF_MANY = replace(SENTENCES, scale=6.0), replace(SENTENCES, scale=3.0)

RANDOM = Arm("at random")
UNSURE = Arm("unsure", chosen="unsure")
POLICY = Arm("of the policy", chosen="policy")

TOKEN = Arm("token")
END = Arm("end", paid="end")
END_FITTED = Arm("end, critic fitted", paid="end", fit_critic=1600)
TOKEN_FITTED = Arm("token, critic fitted", fit_critic=1600)
GRPO = Arm("GRPO, groups of 8", advantage="grpo", responses_per_prompt=8)
GRPO_END = Arm("GRPO, groups of 8, end", paid="end", advantage="grpo", responses_per_prompt=8)
RLOO = Arm("RLOO, groups of 8", advantage="rloo", responses_per_prompt=8)
REMAX = Arm("ReMax, 1 of 2 greedy", paid="end", advantage="remax", responses_per_prompt=2)
RTO = Arm("RTO", labels="pairs")
DPO = Arm("DPO", method="dpo", labels="pairs")
BEST_OF_8 = Arm("best of 8", method="best-of-n", responses_per_prompt=8)
CREDIT = (TOKEN, END, END_FITTED, TOKEN_FITTED, GRPO, GRPO_END, RLOO, REMAX, RTO, DPO, BEST_OF_8)
SOME = (TOKEN, END, END_FITTED, GRPO, REMAX, BEST_OF_8, DPO)

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
BOTH = (Noise(), PAPER)
SIZES = (25, 50, 100, 200, 400, 800, 1600)  # labelled answers
# Of PPO: with fewer steps, 32 answers a step or half the cost of a fault, the format has not come
# back from where it dips in the first of them.
STEPS, STEP_ANSWERS, FORMAT_COST = 24, 64, 6.0

# Less than the trainer's defaults, for two cores: fewer steps of SFT, fewer answers.
SMALL = Config(
    sessions=SessionsConfig(heldout_users=128, test_users=200, transfer_users=1),
    sft=SFTConfig(max_steps=800, decay_steps=600),
    generate=GenerateConfig(samples=2000),
    # What a repeated query costs is paid by `format_cost`: no answers with one need be made.
    reward_model=RewardModelConfig(repeated_share=0.0),
)
LARGE = replace(
    SMALL,
    sessions=SessionsConfig(test_users=400, transfer_users=1),
    sft=SFTConfig(),
    generate=GenerateConfig(samples=4000),
    ppo=PPOConfig(format_cost=FORMAT_COST),
)


def labels(seeds: tuple[int, ...] = SEEDS) -> StudyConfig:
    """Question A: 25 to 3,200 labelled answers, clean and with the paper's noise."""
    sizes = (25, 50, 100, 200, 400, 800, 1600, 3200)
    reward_models = Part("labels", LABELS, sizes, BOTH, seeds=seeds, steps=0)
    parts = (reward_models, *_policies(sizes, sizes, seeds))
    return StudyConfig(parts, users=400, settings=LARGE)


def _policies(
    words: tuple[int, ...], sentences: tuple[int, ...], seeds: tuple[int, ...]
) -> list[Part]:
    """PPO of question A at these numbers of answers labelled by word and as a whole."""
    sizes = {
        WORDS: words,
        OF_FEW: tuple(n for n in sentences if n <= FEW),
        OF_MANY: tuple(n for n in sentences if n > FEW),
    }
    return [Part("labels", (arm,), answers, BOTH, seeds=seeds, steps=STEPS,
                 step_answers=STEP_ANSWERS)
            for arm, answers in sizes.items()]  # fmt: skip


def credit(seeds: tuple[int, ...] = SEEDS) -> StudyConfig:
    """Question B: one reward model, paid at each token or at the end, at 3 and at 10 queries."""
    parts = tuple(
        Part("credit", CREDIT, (3200,), queries=queries, seeds=seeds, steps=STEPS,
             step_answers=STEP_ANSWERS, eval_every=2)
        for queries in (3, 10)
    )  # fmt: skip
    return StudyConfig(parts, users=400, settings=LARGE)


def small() -> StudyConfig:
    """Both questions at 3 queries, reduced: 40 minutes on two cores.

    The seeds come one after another, so that whatever of it is done can be read.
    """
    parts: list[Part] = []
    for seed in SEEDS:
        parts += [
            Part("labels", LABELS, SIZES, BOTH, seeds=(seed,), steps=0),
            *_policies((25, 50, 100, 200, 400, 1600), (200, 1600), (seed,)),
            Part("credit", SOME, (1600,), seeds=(seed,), steps=STEPS, step_answers=STEP_ANSWERS,
                 eval_every=2),
        ]  # fmt: skip
    settings = replace(SMALL, sessions=replace(SMALL.sessions, test_users=600),
                       ppo=replace(SMALL.ppo, format_cost=FORMAT_COST))  # fmt: skip
    return StudyConfig(tuple(parts), users=600, settings=settings)


def scarce() -> StudyConfig:
    """Which answers to label where labels are few: any, those that a reward model is unsure of, or
    those of the policy while it is trained.
    """
    few, more = (50, 100), (25, 50, 100, 200, 400)
    rated = [Part("choice", (arm,), answers, BOTH, seeds=SEEDS, steps=0)
             for arm, answers in ((RANDOM, more), (UNSURE, few))]  # fmt: skip
    trained = [Part("choice", (RANDOM, UNSURE, POLICY), (answers,), (noise,), seeds=SEEDS,
                    steps=STEPS) for noise, answers in product(BOTH, few)]  # fmt: skip
    return StudyConfig((*rated, *trained), users=200, settings=SMALL)


def tuning() -> StudyConfig:
    """The grid that the arms of the other studies were chosen from, the same size for each kind.

    Words: scale and lambda, at the token.  Sentences: pooling too, and the critic fitted or not.
    """
    arms = [
        Arm(f"words x{scale:g} lam {lam:g} fit {fit}", scale=scale, lam=lam, fit_critic=fit)
        for scale, lam, fit in product((1.0, 2.0), (0.95, 1.0), (0, 800))
    ]
    poolings: tuple[Pooling, ...] = ("last", "mean")
    arms += [
        Arm(f"sentences {pooling} x{scale:g} lam {lam:g} fit {fit}", "sentences", pooling, "end",
            scale, lam=lam, fit_critic=fit, mode="score")
        for pooling, scale, lam, fit in product(poolings, (2.0, 6.0), (0.95, 1.0), (0, 800))
    ]  # fmt: skip
    part = Part("labels", tuple(arms), (200,), seeds=TUNING_SEEDS, steps=16)
    return StudyConfig((part,), users=200, settings=SMALL)


def seconds() -> StudyConfig:
    """Both questions with a model that has learnt next to nothing: whether everything runs."""
    settings = Config(
        sessions=SessionsConfig(120, 12, 12, 1),
        scratch=replace(Config().scratch, hidden_size=32, intermediate_size=32, vocab_size=400),
        sft=SFTConfig(max_steps=20, eval_every=10),
        generate=GenerateConfig(samples=64, max_new_tokens=24),
        ppo=PPOConfig(without_signal=True),
    )
    fitted = replace(SENTENCES, fit_critic=32)
    parts = (
        Part("labels", (WORDS, fitted), (8, 32), steps=1, step_answers=8),
        Part("credit", (TOKEN, _guided("LOLS", "lols")[0], replace(END_FITTED, fit_critic=32),
                        GRPO, REMAX, RTO, DPO,
                        BEST_OF_8), (32,), steps=2, step_answers=8, eval_every=1),
        Part("choice", (RANDOM, UNSURE, POLICY), (40,), steps=2, step_answers=8),
    )  # fmt: skip
    return StudyConfig(parts, fresh_answers=16, users=12, reward_updates=4, settings=settings)


WEIGHTS = (0.0, 0.2, 0.6, 0.8, 1.0)  # of words; 0.4 is shipped
ABLATIONS = (
    Arm("as shipped"),
    *(Arm(f"words weigh {w:g}, the whole {1 - w:.2g}",
          changes=(f"reward_model.local_weight={w:g}", f"reward_model.global_weight={1 - w:.2g}"))
      for w in WEIGHTS),
    Arm("classes as they come", changes=("reward_model.balance=1e9",)),
    Arm("no length penalty", changes=("ppo.length_alpha=null",)),
    Arm("reward of the likeliest class", changes=("ppo.reward=argmax",)),
    Arm("rewards 0, 1, 2", changes=("ppo.reward_values=[0, 1, 2]",)),
    Arm("tokens of class 0 not trained", changes=("ppo.train_on_unlabelled=false",)),
)  # fmt: skip


def ablations() -> StudyConfig:
    """What the paper's own settings do, each changed by itself."""
    part = Part("settings", ABLATIONS, (400,), seeds=SEEDS[:3], steps=40, step_answers=16,
                eval_every=5)  # fmt: skip
    return StudyConfig((part,), users=200, settings=SMALL)


LAYER = 20
BY_WORD = Arm("by word", responses_per_prompt=4, layer=LAYER)
BY_WORD_END = replace(BY_WORD, name="by word, paid at the end", paid="end")
BY_WORD_FITTED = replace(BY_WORD_END, name="by word, at the end, critic fitted", fit_critic=48)
AS_A_WHOLE = Arm("as a whole, critic fitted", "sentences", "mean", "end", 8.0,
                 responses_per_prompt=4, fit_critic=48, layer=LAYER)  # fmt: skip

# Two CPU cores and 135M parameters: policy and critic are adapters, reward models are heads.
REAL = Config(
    sessions=SessionsConfig(600, 24, 144, 0),
    lora=AdapterConfig(rank=16),
    sft=SFTConfig(max_steps=48, batch_size=8, lr=1e-3, decay_steps=48, eval_every=16),
    generate=GenerateConfig(samples=600, samples_per_session=1, batch_size=64),
    reward_model=RewardModelConfig(repeated_share=0.0),
    ppo=PPOConfig(minibatch_size=4, epochs=1, lr=3e-4, critic_lr=1e-3, kl_coef=0.1,
                  format_cost=1.0),
)  # fmt: skip


def real() -> StudyConfig:
    """Both questions with a real model, reduced to one setting each: an hour on two cores.

    Heads of frozen states at every number of labelled answers; PPO with those of 100 answers.
    """
    seeds = SEEDS[:3]
    parts = [
        Part("labels", (BY_WORD, AS_A_WHOLE), (25, 50, 100, 200, 400), BOTH, seeds=seeds, steps=0),
        *(Part("credit", (BY_WORD, BY_WORD_END, BY_WORD_FITTED), (100,), seeds=(seed,), steps=5,
               step_answers=16) for seed in seeds),
        Part("labels", (BY_WORD, AS_A_WHOLE), (100,), seeds=seeds, steps=5, step_answers=16),
    ]  # fmt: skip
    return StudyConfig(tuple(parts), fresh_answers=200, users=32, settings=REAL, model=ANY_MODEL,
                       material_seed=0)  # fmt: skip


def gpu() -> StudyConfig:
    """Both questions with a real model, for one GPU: the parts of `real` with more of everything,
    and an SFT model a seed.
    """
    seeds, sizes = SEEDS[:3], (25, 50, 100, 200, 400, 800, 1600, 3200)
    parts = (
        Part("labels", (BY_WORD, AS_A_WHOLE), sizes, BOTH, seeds=seeds, steps=0),
        Part("credit", (BY_WORD, BY_WORD_END, replace(BY_WORD_FITTED, fit_critic=1600)), (1600,),
             seeds=seeds, steps=40, step_answers=64, eval_every=5),
        Part("labels", (BY_WORD, replace(AS_A_WHOLE, fit_critic=1600)), (100, 1600), seeds=seeds,
             steps=40, step_answers=64),
    )  # fmt: skip
    settings = replace(
        REAL,
        sessions=SessionsConfig(6000, 128, 400, 0),
        sft=replace(REAL.sft, max_steps=200, batch_size=32, decay_steps=200, eval_every=50),
        generate=GenerateConfig(samples=4000, samples_per_session=1, batch_size=512),
        ppo=replace(REAL.ppo, minibatch_size=16),
    )
    return StudyConfig(parts, users=400, settings=settings, model=ANY_MODEL)


def _guided(name: str, algorithm: Algorithm) -> list[Arm]:
    """An algorithm with the strong guide, paid at the token and at the end, and with a weak one."""
    arm = Arm(f"{name}, strong guide", algorithm=algorithm, guide="strong")
    return [arm, replace(arm, name=f"{arm.name}, end", paid="end"),
            replace(arm, name=f"{name}, weak guide", guide="sft")]  # fmt: skip


def rlgf() -> StudyConfig:
    """Plain PPO and the algorithms with a guide (Chang et al. 2023), under one budget of 8 steps of
    16 answers: with the SFT model as a weak guide and with a strong one; paid by labels of words,
    at the token and at the end, and by labels of whole answers.

    The arms that the paper compares come first, for every seed.
    """
    plus, late = _guided("PPO++", "ppo++"), _guided("AggreVaTeD", "aggrevated")
    both = _guided("LOLS", "lols")[:1] + _guided("D2LOLS", "d2lols")[:1]
    whole = replace(SENTENCES, fit_critic=0)  # a guide's critic is fitted on no answers of SFT's
    by_whole = [replace(whole, name=f"{arm.name}, sentences", algorithm=arm.algorithm,
                        guide=arm.guide) for arm in (plus[0], late[0])]  # fmt: skip
    parts = tuple(
        Part("guides", tuple(arms), (400,), seeds=SEEDS, steps=8, step_answers=16, eval_every=2)
        for arms in ([TOKEN, plus[0], late[0]], [plus[2], late[2]], [END, plus[1], late[1]],
                     [whole, *by_whole], both)
    )  # fmt: skip
    # As many tokens are trained of 10 answers of PPO's own as of 16 of PPO++.
    parts += (Part("guides", (TOKEN, END, whole), (400,), seeds=SEEDS, steps=8, step_answers=10,
                   eval_every=2),)  # fmt: skip
    return StudyConfig(parts, users=200, settings=SMALL)


PRESETS = {
    "labels": labels, "credit": credit, "small": small, "scarce": scarce, "tuning": tuning,
    "ablations": ablations, "real": real, "gpu": gpu, "seconds": seconds, "rlgf": rlgf,
}  # fmt: skip
