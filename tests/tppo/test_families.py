"""Every family of causal language models: from its folder to labels, rewards, PPO and back."""

import copy

import pytest
import torch
from _families import tiny
from _matrix import third
from _weights import enlarged
from safetensors.torch import load_file
from test_reading import PAD, TOLERANCE, Used, alone, broken, together, worst
from test_reading import PROMPTS as READ_PROMPTS
from test_reading import RESPONSES as READ_RESPONSES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from tppo.labels.rule import label_by_rule
from tppo.labels.words import map_labels, word_spans
from tppo.methods.config import PPOConfig, RewardModelConfig
from tppo.methods.experience import Models
from tppo.methods.ppo import PPO
from tppo.methods.reward_model import LabelledAnswer, PolicyTokens, train_reward_model
from tppo.models.batch import Batch
from tppo.models.folder import model_eos_ids, save_model, save_weights
from tppo.models.guards import GuardError
from tppo.models.load import load_policy, load_reward_model
from tppo.models.own_tokens import load_frozen
from tppo.models.policy import Critic, RewardModel, policy_logprobs
from tppo.models.rollout import HFRollout, Sampling
from tppo.models.token_classifier import state_size, token_classifier
from tppo.models.tokenizer import load_tokenizer, token_offsets, train_tokenizer
from tppo.progress import say_once
from tppo.rewards import Questions
from tppo.rewards.token_model import TokenModelReward
from tppo.sessions.prompts import encode_prompt
from tppo_kernels.models.lm_head import FAMILIES
from tppo_kernels.models.shared_prefix import FAMILIES as SHARED

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
EVERY = sorted(FAMILIES | set(SHARED) | {"qwen3_next"})
WITHOUT_CLASSIFIER = ("cohere", "cohere2", "gemma3_text", "gptj", "granite", "olmo", "olmo2", "opt")
CHOSEN = sorted({*third(EVERY, seed=5), "gemma3_text", "opt", "qwen3_next"})  # the odd ones always
ABSOLUTE = ("gpt2", "gpt_neo", "opt")  # positions are embeddings: a shift of all of them shows
# Windows shorter than the prompts, in the families that have such layers.
WINDOWS = {name: {"sliding_window": 4} for name in ("cohere2", "gemma2", "gemma3_text", "mistral")}
# Logits as large as trained models have them: near-uniform ones hide errors, and capped ones tie.
SHARP = {"cohere": {"logit_scale": 1.0}, "cohere2": {"logit_scale": 1.0},
         "gemma2": {"final_logit_softcapping": 30.0}}  # fmt: skip
PROMPTS = ["search: warm boots\nnext 2:\n", "search: b\nnext 2:\n",
           "search: cheap\nclick: cheap red tent\nnext 2:\n",
           "profile: likes rain\nsearch: altara coat\nnext 2:\n"]  # fmt: skip
made = {}


def tokenizer():
    if "tokenizer" not in made:
        made["tokenizer"] = train_tokenizer(PROMPTS, 300)
    return made["tokenizer"]


def labelled(answers, policy, rollout):
    """The answers with labels of the rule: what they begin with is what was wanted."""
    rows = []
    for prompt, response in zip(rollout.prompt_ids, rollout.response_ids, strict=True):
        text, offsets = token_offsets(policy, response)
        words = [text[a:b] for a, b in word_spans(text)]
        label = label_by_rule("a", text, [" ".join(words[: len(words) // 2])], 0.5)
        categories = map_labels(text, label.words, offsets)
        rows.append(LabelledAnswer(prompt, response, categories, label.sentence + 1))
    assert {1, 2} <= {category for row in rows for category in row.categories}
    return rows


def trained_reward_model(policy_folder, rows, folder, tokens):
    """The folder of a reward model that has learned from labelled answers."""
    torch.manual_seed(0)
    model = load_reward_model(policy_folder, CPU)
    config = RewardModelConfig(epochs=1, batch_size=4, lr=1e-3)
    history = train_reward_model(PolicyTokens(model, tokens.pad_token_id), rows, config, seed=0)
    assert history[0]["loss"] > 0
    save_weights(model, folder)
    tokens.save_pretrained(folder)
    return model


def greedy(engine, prompts):
    return engine.generate(prompts, Sampling(6, temperature=1e-4)).response_ids


def whole_loop(family, tmp_path):
    """Generate, label, map, reward model, two steps of PPO, export, reload, generate."""
    more = SHARP.get(family, {}) | WINDOWS.get(family, {})
    model = tiny(family, vocab_size=len(tokenizer()), **more)
    save_model(model, tokenizer(), tmp_path / "sft")
    tokens = load_tokenizer(tmp_path / "sft")
    policy, ref = (load_policy(tmp_path / "sft", CPU) for _ in range(2))
    ends = {"pad_id": tokens.pad_token_id, "eos_id": model_eos_ids(tokens, policy)}
    engine, asked = HFRollout(policy, **ends), [encode_prompt(tokens, p) for p in PROMPTS]

    rollout = engine.generate([p for p in asked for _ in range(2)], Sampling(12, seed=1))
    rows = labelled(rollout.response_ids, tokens, rollout)
    judge = trained_reward_model(tmp_path / "sft", rows, tmp_path / "rm", tokens)
    frozen = load_frozen(tmp_path / "rm", tokens, CPU)
    batch = Batch(rollout.prompt_ids, rollout.response_ids, tokens.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(frozen(batch), RewardModel(judge)(batch))

    critic = Critic.from_policy(tmp_path / "sft", CPU)
    config = PPOConfig(lr=1e-3, critic_lr=1e-3, responses_per_prompt=2, minibatch_size=4,
                       verify_prefix=True, epochs=1, reward="expected")  # fmt: skip
    reward = TokenModelReward(frozen, mode=config.reward)
    ppo = PPO(Models(policy, ref, critic), engine, config, reward=reward,
              sampling=Sampling(12, 0.7), seed=0, tokenizer=tokens, **ends)  # fmt: skip
    questions = Questions(rollout.prompt_ids, columns={"suggested_length": [8.0] * len(rows)})
    for _ in range(2):
        metrics, _ = ppo.step(questions)
        assert metrics["objective/kl"] == metrics["objective/kl"]  # not NaN
    assert metrics["objective/kl"] != 0  # it has left the reference

    save_model(policy, tokens, tmp_path / "tppo")
    again = load_policy(tmp_path / "tppo", CPU)
    with torch.no_grad():
        torch.testing.assert_close(policy_logprobs(again, batch, 0.7)[0],
                                   policy_logprobs(policy, batch, 0.7)[0])
    answers = greedy(engine, asked)
    assert greedy(HFRollout(again, **ends), asked) == answers
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tppo")
    for prompt, answer in zip(asked, answers, strict=True):
        ids = plain.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert ids[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("family", CHOSEN)
def test_from_a_folder_to_a_better_policy_and_back(family, tmp_path):
    whole_loop(family, tmp_path)


@pytest.mark.parametrize(("family", "how"), [
    ("llama", "padding is seen"), ("cohere", "padding is seen"), ("opt", "padding is seen"),
    ("gpt2", "padding counts as a position"),
])  # fmt: skip
def test_a_loop_that_reads_wrongly_is_seen(family, how, tmp_path):
    """The control of the test above."""
    with broken(how), pytest.raises((AssertionError, GuardError)):
        whole_loop(family, tmp_path)


def models(family):
    """Policy, reference, critic and reward model of one family, each with weights of its own."""
    policy, ref, start = (enlarged(tiny(family, **SHARP.get(family, {}))) for _ in range(3))
    critic = Critic(copy.deepcopy(start.base_model), state_size(start.config)).eval()
    torch.nn.init.normal_(critic.head.weight)
    config = copy.deepcopy(policy.config)
    config.num_labels = 3
    classifier = token_classifier(config)
    make = getattr(classifier, "from_config", None) or classifier
    return Used(policy, ref, critic, RewardModel(enlarged(make(config)).eval()))


@pytest.mark.parametrize("family", CHOSEN)
def test_a_batch_is_read_as_each_answer_alone(family):
    """Beside controls: with a wrong mask or wrong positions the same comparison fails."""
    used = models(family)
    pairs = zip(READ_PROMPTS, READ_RESPONSES, strict=True)
    expected = [alone(used, p, r) for p, r in pairs]
    wrong = [("dense", "padding is seen")]
    wrong += [("dense", "padding counts as a position")] * (family in ABSOLUTE)
    wrong += [("shared", "answers see each other")] * (family in SHARED)
    for way in ("dense", "shared"):
        errors = worst(together(used, way), expected)
        assert max(errors.values()) < TOLERANCE, errors
    for way, how in wrong:
        with broken(how):
            errors = worst(together(used, way), expected)
        assert min(errors.values()) > 1000 * TOLERANCE, (how, errors)


@pytest.mark.parametrize("family", WITHOUT_CLASSIFIER)
def test_a_classifier_that_transformers_lacks_is_as_its_own_are(family, tmp_path):
    """`train-rm` failed for these families: there is no class to load their folder with."""
    policy = tiny(family)
    policy.save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForTokenClassification.from_pretrained(tmp_path / "sft")
    model = load_reward_model(tmp_path / "sft", CPU)
    save_weights(model, tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm", CPU)
    config = AutoConfig.from_pretrained(tmp_path / "rm")
    assert config.architectures == [type(again).__name__] and config.num_labels == 3
    assert config.architectures[0].endswith("ForTokenClassification")
    ids = torch.tensor([[1, 5, 7, 9], [1, 8, 5, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        states = policy.base_model(ids, attention_mask=mask).last_hidden_state
        expected = states @ model.score.weight.T + model.score.bias
        torch.testing.assert_close(again(ids, attention_mask=mask).logits, expected)
    # What the base class knows of its family holds here too.
    assert again.supports_gradient_checkpointing and again._no_split_modules
    assert again.config._attn_implementation == policy.config._attn_implementation
    # A stranger needs the two names of the head, and the trunk's own class for all the rest.
    weights = load_file(tmp_path / "rm" / "model.safetensors")
    head = {name: weights.pop(name) for name in ("score.weight", "score.bias")}
    torch.testing.assert_close(head["score.weight"], model.score.weight.detach())
    prefix = policy.base_model_prefix + "."
    assert {name.removeprefix(prefix) for name in weights} <= {*policy.base_model.state_dict()}


def test_a_head_of_other_classes_is_refused_or_replaced(tmp_path):
    config = copy.deepcopy(tiny("cohere").config)
    config.num_labels = 5
    token_classifier(config)(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        load_reward_model(tmp_path, CPU)
    assert load_reward_model(tmp_path, CPU, new_head=True).score.out_features == 3


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "lfm2", "jamba"])
def test_a_hybrid_model_is_prefilled_for_each_answer_and_says_so_once(family, capsys):
    """Qwen3-Next crashed: its states cannot be copied to rows like keys and values."""
    say_once.cache_clear()
    model = tiny(family)
    prompts = [[5, 6, 7, 12, 19, 4, 3]] * 3 + [[8, 9]] * 2
    found = {}
    for prefix in ("dense", "shared", "shared"):
        engine = HFRollout(model, pad_id=PAD, eos_id=2, prefix=prefix)
        found[prefix] = engine.generate(prompts, Sampling(6, seed=3)).response_ids
    assert found["dense"] == found["shared"]
    said = [line for line in capsys.readouterr().err.splitlines() if "keys and values" in line]
    assert len(said) == 1 and type(model).__name__ in said[0]
