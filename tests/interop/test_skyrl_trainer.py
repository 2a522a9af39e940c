"""SkyRL's own trainer on a CPU: from a generator to trained weights, here and through a local Ray.

The trainer, its data, its gym generator and its registries are SkyRL's; what needs a GPU there
(vLLM, FSDP workers) is played by transformers' `generate` and by one process with three models.
"""

import asyncio
import json
import operator
import runpy
import sys
from pathlib import Path

import pytest
import ray
import torch
import yaml
from skyrl.backends.skyrl_train.distributed.dispatch import WorkerOutput
from skyrl.backends.skyrl_train.utils import ppo_utils, torch_utils
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.dataset import PromptDataset
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
from skyrl.train.generators.utils import prepare_generator_input
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification, LlamaModel

import tppo_kernels as tk
from tppo.config import Config
from tppo.methods.config import PPOConfig
from tppo.models.tokenizer import train_tokenizer
from tppo.options import Options
from tppo_kernels.integrations import skyrl

EXAMPLES = Path(__file__).parents[2] / "examples/integrations/skyrl"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
LONGEST, PROMPTS, SAMPLES, STEPS = 8, 8, 4, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, a reward model that likes some tokens, and prompts, as `cluster_data.py` writes."""
    path = tmp_path_factory.mktemp("cluster")
    texts = [f"search: {a} {b}\nnext 1:\n" for a in ("red", "blue") for b in
             ("shoes", "boots", "coats", "hats")]
    tokenizer = train_tokenizer(texts, 280)
    tokenizer.chat_template, tokenizer.padding_side = TEMPLATE, "left"
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), **SMALL, **ids)
    LlamaForCausalLM(config).save_pretrained(path / "policy")
    tokenizer.save_pretrained(path / "policy")
    rewards = LlamaForTokenClassification(LlamaConfig(
        vocab_size=len(tokenizer), num_labels=3, own_tokens=False, **SMALL, **ids))
    torch.nn.init.normal_(rewards.score.weight, std=2.0)
    rewards.save_pretrained(path / "reward-model")
    rows = [{"prompt": [{"role": "user", "content": text}], "env_class": "tppo",
             "suggested_length": 6.0} for text in texts]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, tokenizer


def settings(path, *more):
    """The configuration of the examples, for models and batches of this size."""
    cfg = skyrl.TokenPPOConfig.from_arguments([
        str(EXAMPLES / "one_gpu.yaml"), f"trainer.policy.model.path={path / 'policy'}",
        f"trainer.critic.model.path={path / 'policy'}", f"data.train_data=[{path}/train.jsonl]",
        f"reward_model.path={path / 'reward-model'}", "reward_model.num_gpus=0",
        f"trainer.train_batch_size={PROMPTS}", f"trainer.policy_mini_batch_size={PROMPTS // 2}",
        f"trainer.critic_mini_batch_size={PROMPTS // 2}",
        f"generator.n_samples_per_prompt={SAMPLES}",
        f"generator.sampling_params.max_generate_length={LONGEST}", "generator.batched=true",
        "trainer.algorithm.kl_loss_coef=0.01", "data.dataloader.num_workers=0",
        "trainer.enable_ray_gpu_monitor=false",
        "generator.inference_engine.enable_ray_prometheus_stats=false", *more])
    skyrl.check_config(cfg)
    return cfg


class Critic(torch.nn.Module):
    """A trunk with a value of each token."""

    def __init__(self, path):
        super().__init__()
        self.trunk = LlamaModel.from_pretrained(path)
        self.value = torch.nn.Linear(SMALL["hidden_size"], 1)

    def forward(self, ids, mask):
        return self.value(self.trunk(input_ids=ids, attention_mask=mask).last_hidden_state)[..., 0]


class Machine:
    """The three models of a training, with the loss that SkyRL's registry gives where they are."""

    def __init__(self, path, algorithm):
        torch.manual_seed(0)
        self.algorithm = algorithm
        self.models = {"policy": LlamaForCausalLM.from_pretrained(path),
                       "ref": LlamaForCausalLM.from_pretrained(path), "critic": Critic(path)}
        self.optimizers = {name: torch.optim.Adam(self.models[name].parameters(), lr=rate)
                           for name, rate in (("policy", 1e-2), ("critic", 1e-2))}
        self.loss = ppo_utils.PolicyLossRegistry.get(algorithm.policy_loss_type)

    def read(self, model, data):
        ids, mask, T = data["sequences"], data["attention_mask"], data.metadata["response_length"]
        if model == "critic":
            return self.models[model](ids, mask)[:, -T - 1:-1]
        logits = self.models[model](input_ids=ids, attention_mask=mask).logits[:, -T - 1:-1]
        return torch_utils.logprobs_from_logits(logits, ids[:, -T:])

    def forward(self, model, data):
        key = "values" if model == "critic" else "logprobs"
        with torch.no_grad():
            rows = self.read(model, data).tolist()
        return WorkerOutput(loss_fn_outputs=[{key: row} for row in rows])

    def forward_backward(self, model, data):
        found = self.read(model, data)
        if model == "critic":
            loss, _ = ppo_utils.ppo_critic_loss(found, data["values"], data["returns"],
                                                self.algorithm, data["loss_mask"])
            metrics = {}
        else:
            loss, metrics = self.loss(found, data["action_log_probs"], data["advantages"],
                                      config=self.algorithm, loss_mask=data["loss_mask"])
        loss.backward()
        return WorkerOutput(metrics={"loss": loss.item(), **metrics,
                                     "ours": float("tppo_kernels" in self.loss.__module__)})

    def optim_step(self, model):
        self.optimizers[model].step()
        self.optimizers[model].zero_grad()

    def weights(self):
        return self.models["policy"].state_dict()


class Dispatch:
    """What the trainer asks of its workers, of one machine; `ask` calls a method of it."""

    def __init__(self, ask):
        self.ask = ask

    def get_lcm_dp_size(self):
        return 1

    def empty_cache(self, model=None):
        pass

    def stage_data(self, model, data, boundaries):
        return [data[start:end] for start, end in boundaries]

    def forward(self, model, data):
        return self.ask("forward", model, data)

    forward_from_staged = forward

    def forward_backward_from_staged(self, model, data):
        return self.ask("forward_backward", model, data)

    def optim_step(self, model):
        return self.ask("optim_step", model)


class Engine:
    """An inference engine of transformers; one that answers as SkyRL's client of vLLM does."""

    model_name = "policy"

    def __init__(self, path, tokenizer):
        self.model = LlamaForCausalLM.from_pretrained(path).eval()
        self.tokenizer = tokenizer

    async def generate(self, batch, model=None):
        prompts = batch["prompt_token_ids"]
        width = max(map(len, prompts))
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        found = self.model.generate(ids, attention_mask=real, do_sample=True, top_k=0,
                                    max_new_tokens=LONGEST)[:, width:]
        mask = tk.response_mask(found, eos)
        rows = [row[keep].tolist() for row, keep in zip(found, mask, strict=True)]
        return {"responses": self.tokenizer.batch_decode(rows, skip_special_tokens=True),
                "response_ids": rows, "stop_reasons": ["stop"] * len(rows),
                "response_logprobs": None}


def make_trainer(folder, remote=False):
    """SkyRL's trainer by its own constructor, with its models here or in a process of Ray's."""
    path, tokenizer = folder
    cfg = settings(path)
    engine = Engine(path / "policy", tokenizer)
    exp = object.__new__(skyrl.TokenPPOExp)  # its constructor asks Ray for all GPUs
    exp.cfg, exp.colocate_pg = cfg, None
    dataset = PromptDataset(cfg.data.train_data, tokenizer, 64, num_workers=1)
    made = skyrl.TokenPPOTrainer(
        cfg=cfg, tracker=None, tokenizer=tokenizer, train_dataset=dataset,
        inference_engine_client=engine, generator=exp.get_generator(cfg, tokenizer, engine))
    if not remote:
        machine = Machine(path / "policy", cfg.trainer.algorithm)
        made.dispatch = Dispatch(lambda method, *given: getattr(machine, method)(*given))
    else:
        actor = ray.remote(num_cpus=0)(Machine).remote(path / "policy", cfg.trainer.algorithm)
        made.dispatch = Dispatch(lambda method, *given: ray.get(
            getattr(actor, method).remote(*given)))
    made.ref_model = made.dispatch  # there is one
    made.reward_kl_controller = ppo_utils.get_kl_controller(cfg.trainer.algorithm)
    return made, dataset


def rollout(trainer, dataset):
    """A batch up to its advantages, by the trainer's own steps."""
    rows = dataset.collate_fn([dataset[i] for i in range(PROMPTS)])
    batch, uids = prepare_generator_input(rows, SAMPLES, {}, "tppo", "train", 1)
    output = asyncio.run(trainer.generate(batch))
    output, uids = trainer.postprocess_generator_output(output, uids)
    data = trainer.fwd_logprobs_values_reward(trainer.convert_to_training_input(output, uids))
    return output, trainer.apply_reward_kl_penalty(data)


def test_a_policy_learns_the_rewards_of_tokens_by_skyrls_own_trainer(folder):
    torch.manual_seed(1)
    trainer, dataset = make_trainer(folder)
    paid = []
    for step in range(STEPS):
        output, data = rollout(trainer, dataset)
        rewards = output["rewards"]
        assert all(len(r) == len(ids) for r, ids in zip(rewards, output["response_ids"],
                                                        strict=True))
        paid.append(sum(map(sum, rewards)) / len(rewards))
        shaped = data["rewards"].clone()
        data = trainer.compute_advantages_and_returns(data)
        if not step:
            expected = tk.token_advantages(shaped, data["values"], data["loss_mask"] > 0,
                                           gamma=1.0, lam=0.95)
            torch.testing.assert_close(data["advantages"], expected.advantages)
            torch.testing.assert_close(data["returns"], expected.returns)
            spread = [x for row in rewards for x in row[:-1]]
            assert len({round(x, 3) for x in spread}) > 2  # dense: not at the last token alone
        data.pop("rewards")
        status = trainer.train_critic_and_policy(data)
        assert status["ours"] == 1.0 and status["ratio_mean"] == pytest.approx(1.0, abs=0.5)
        trainer.generator.generator.inference_engine_client.model.load_state_dict(
            trainer.dispatch.ask("weights"))
    print([round(x, 2) for x in paid])
    assert sum(paid[-3:]) / 3 > sum(paid[:3]) / 3 + 0.5, paid


def test_our_trainer_gives_estimators_the_loss_mask_and_skyrls_the_response_mask(folder):
    trainer, dataset = make_trainer(folder)
    _, data = rollout(trainer, dataset)
    data["loss_mask"][:, -4:-2] = 0  # of a tool
    data["values"][:, -4:-2] = 1e4
    response_mask = data["response_mask"].clone()
    found = trainer.compute_advantages_and_returns(data)
    assert found["advantages"].abs().max() < 100 and not found["advantages"][:, -4:-2].any()
    assert torch.equal(found["response_mask"], response_mask)
    trainer.cfg.trainer.algorithm.advantage_estimator = "gae"
    theirs = trainer.compute_advantages_and_returns(data)
    assert theirs["returns"].abs().max() > 500


def settings_of(options):
    """What `cluster_data.py` writes of a run with these flags."""
    return runpy.run_path(str(EXAMPLES.parent / "cluster_data.py"))["settings"](options)


def leaves(tree, at=""):
    """The keys of a tree, with points between them, and their values."""
    for key, value in tree.items():
        yield from leaves(value, f"{at}{key}.") if isinstance(value, dict) else [(at + key, value)]


@pytest.mark.parametrize("files", [["one_gpu.yaml"], ["one_gpu.yaml", "eight_gpus.yaml"]])
def test_the_configurations_pass_skyrls_own_checks(files, tmp_path):
    """And have what `tppo train` has without flags, to which those of a run change nothing."""
    given = [str(EXAMPLES / name) for name in files]
    cfg = skyrl.TokenPPOConfig.from_arguments(given)
    for key, value in leaves(settings_of(Options())):
        assert operator.attrgetter(key)(cfg) == value, key
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings_of(Options(settings=Config(
        ppo=PPOConfig(reward="argmax", gamma=0.5, clip=0.1))))))
    cfg = skyrl.TokenPPOConfig.from_arguments(
        [*given, str(tmp_path / "settings.yaml"), "trainer.algorithm.lambd=0.9"])
    skyrl.check_config(cfg)
    algorithm = cfg.trainer.algorithm
    assert (cfg.reward_model.mode, algorithm.gamma, algorithm.eps_clip_high) == ("argmax", 0.5, 0.1)
    gpus = 8 if len(files) == 2 else 1
    assert cfg.trainer.placement.policy_num_gpus_per_node == gpus == cfg.reward_model.replicas
    assert cfg.trainer.algorithm.lambd == 0.9 and cfg.trainer.algorithm.value_clip is None


@pytest.mark.parametrize(("changed", "words"), [
    ("reward_model.path=null", "reward_model.path is not set, expected the folder"),
    ("trainer.critic.model.path=null", "trainer.critic.model.path is not set, expected a model"),
    ("generator.step_wise_trajectories=true", "step_wise_trajectories is true, expected false"),
])
def test_what_token_level_ppo_needs_is_asked_for_before_anything_starts(folder, changed, words):
    with pytest.raises(ValueError, match=words):
        settings(folder[0], changed)


def test_a_missing_length_is_named(folder):
    class Fixed:
        async def generate(self, batch):
            return {"prompt_token_ids": [[1], [1]], "response_ids": [[2], [3]],
                    "loss_masks": [[1], [1]]}

    generator = skyrl.TokenRewardGenerator(Fixed(), lambda *given: given[3])
    batch = {"prompts": [0, 0], "env_extras": [{"suggested_length": 4}, {}]}
    with pytest.raises(ValueError, match="suggested_length is missing in row 1 of 2"):
        asyncio.run(generator.generate(batch))
    batch["env_extras"][1] = {"suggested_length": 5}
    assert asyncio.run(generator.generate(batch))["rewards"] == [4.0, 5.0]
    assert asyncio.run(generator.generate({"prompts": [0, 0]}))["rewards"] is None


def test_the_example_is_an_experiment_of_skyrl():
    namespace = {"__name__": "example"}
    exec(compile((EXAMPLES / "train.py").read_text(), "train.py", "exec"), namespace)
    assert issubclass(namespace["Experiment"], BasePPOExp)
    given = namespace["Experiment"].get_generator, SkyRLGymGenerator, SkyRLTrainConfig
    assert all(map(callable, given))


@pytest.fixture(scope="module")
def cluster():
    """A local Ray, which counts one GPU that is not there and knows our functions.

    Its own processes have to start within half a minute (a constant of Ray's), which they do not on
    a machine with ten times more to do than it has cores.
    """
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
             object_store_memory=100_000_000)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no process finds a test file
    ppo_utils.sync_registries()
    yield
    ray.shutdown()
    for registry in (ppo_utils.PolicyLossRegistry, ppo_utils.AdvantageEstimatorRegistry):
        registry._ray_actor, registry._synced_to_actor = None, False


@pytest.mark.slow
def test_another_process_finds_our_loss_by_its_name(cluster, folder):
    """SkyRL's workers take it from its registry, which is a process of Ray's too."""
    trainer, dataset = make_trainer(folder, remote=True)
    _, data = rollout(trainer, dataset)
    data = trainer.compute_advantages_and_returns(data)
    before = trainer.dispatch.ask("weights")
    assert trainer.train_critic_and_policy(data)["ours"] == 1.0
    after = trainer.dispatch.ask("weights")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_reward_model_in_processes_of_their_own_pays_the_same(cluster, folder, replicas):
    path, _ = folder
    exp = object.__new__(skyrl.TokenPPOExp)
    exp.colocate_pg = None
    here = settings(path).reward_model
    there = settings(path, "reward_model.num_gpus=0.05",
                     f"reward_model.replicas={replicas}").reward_model
    given = ([[5, 6], [7], [8, 9, 10], [11], [5]], [[9], [8, 7], [5, 5, 6], [9, 10], [6]],
             [[1], [1, 1], [1, 0, 1], [1, 1], [1]], [3.0] * 5)
    assert exp.get_reward_model(there)(*given) == exp.get_reward_model(here)(*given)
    assert exp.get_reward_model(there)(*given[:3], None) != exp.get_reward_model(there)(*given)
