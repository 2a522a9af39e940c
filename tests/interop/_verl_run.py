"""PPO of verl's own trainer and workers through a local Ray, without a GPU and without a rollout.

    python _verl_run.py FOLDER OUT.json

verl's driver computes advantages and orders updates; its FSDP engine, of two processes for the
actor and one for the critic, computes log-probs, values, losses and updates. Only what writes
responses is not verl's, whose rollouts are engines for a GPU: they are random letters, the same
ones in each run. A token is paid 1 if it is the letter 7. OUT gets what was logged, and the
log-probs of the letter 7 before and after.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

FOLDER = Path(sys.argv[1])
PROMPT, RESPONSE, ROWS, LETTER, STEPS = 3, 12, 8, 7, 6
MODELS = "language_model", "value_model"
SETTINGS = dict(strategy="fsdp2", param_offload=False, optimizer_offload=False, model_dtype="fp32",
                use_torch_compile=False, mixed_precision=dict(param_dtype="fp32"),
                use_dynamic_bsz=False, micro_batch_size_per_gpu=2, infer_micro_batch_size_per_gpu=2)


def saved_models():
    """An actor and a critic of two layers and sixteen letters."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(16)}, "t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1",
                                        chat_template="{{ messages }}")
    for model in (LlamaForCausalLM, LlamaForTokenClassification):
        folder = FOLDER / MODELS[model is LlamaForTokenClassification]
        tokenizer.save_pretrained(folder)
        model(LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_labels=1,
            num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
            eos_token_id=1)).save_pretrained(folder)


def workers(kind, processes, loss, rate):
    """A worker group of verl with an FSDP engine on a CPU."""
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker

    class Worker(TrainingWorker):
        """On gloo alone: verl names a backend for "cpu" and one for its device, here both one. And
        verl asks for flash-attn by name where it loads a critic."""

        def __init__(self, config):
            load = AutoModelForTokenClassification.from_pretrained
            AutoModelForTokenClassification.from_pretrained = (
                lambda *args, **given: load(*args, **given | {"attn_implementation": "sdpa"}))
            torch.distributed.init_process_group(
                "gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"))
            super().__init__(config)

    config = TrainingWorkerConfig(
        model_type=kind, engine_config=FSDPEngineConfig(**SETTINGS),
        model_config=HFModelConfig(path=str(FOLDER / kind), use_remove_padding=False,
                                   enable_gradient_checkpointing=False,
                                   override_config={"attn_implementation": "sdpa"}),
        optimizer_config=FSDPOptimizerConfig(lr=rate, total_training_steps=100),
        checkpoint_config=CheckpointConfig())
    pool = RayResourcePool([processes], use_gpu=False, max_colocate_count=1)
    group = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(Worker), config=config),
                           device_name="cpu")
    group.reset()
    group.set_loss_fn(loss)
    return group


def batch():
    """Random responses, two of them with a tool's tokens in the middle, one of two tokens."""
    from verl import DataProto

    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 16, (ROWS, PROMPT + RESPONSE), generator=g)
    lengths = torch.tensor([12, 5, 9, 12, 2, 12, 7, 12])
    written = torch.arange(RESPONSE) < lengths[:, None]
    mask = written.clone()
    mask[[0, 3], 4:7] = False
    attention = torch.cat((torch.ones(ROWS, PROMPT, dtype=torch.bool), written), 1).long()
    ids = ids * attention
    rewards = (ids[:, PROMPT:] == LETTER) & mask
    tensors = dict(prompts=ids[:, :PROMPT], responses=ids[:, PROMPT:], input_ids=ids,
                   attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                   response_mask=mask.long(), token_level_scores=rewards.float())
    return DataProto.from_dict(tensors=tensors, meta_info={
        "temperature": 1.0, "global_token_num": attention.sum(1).tolist()})


def main():
    """Six steps of PPO as verl's trainer orders them."""
    from functools import partial

    from verl.trainer.ppo import core_algos, ray_trainer
    from verl.workers.config import ActorConfig, CriticConfig, PolicyLossConfig
    from verl.workers.utils import losses

    saved_models()
    mode = "tppo" if "tppo" in core_algos.POLICY_LOSS_REGISTRY else "vanilla"
    actor = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=4,
                        ppo_micro_batch_size_per_gpu=2, entropy_coeff=0.01, use_kl_loss=True,
                        policy_loss=PolicyLossConfig(loss_mode=mode), ppo_epochs=2)
    critic = CriticConfig(strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=4, ppo_epochs=2,
                          ppo_micro_batch_size_per_gpu=2)
    trainer = ray_trainer.RayPPOTrainer.__new__(ray_trainer.RayPPOTrainer)
    trainer.config = OmegaConf.create({
        "actor_rollout_ref": {"actor": {
            "calculate_entropy": True, "entropy_coeff": 0.01, "ppo_mini_batch_size": 4,
            "ppo_epochs": 2, "data_loader_seed": 1, "shuffle": False},
            "rollout": {"n": 1, "temperature": 1.0, "multi_turn": {"enable": False}}},
        "critic": {"ppo_mini_batch_size": 4, "ppo_epochs": 2, "data_loader_seed": 1,
                   "shuffle": False}})
    trainer.distillation_config, trainer.ref_in_actor = None, False
    policy = workers(MODELS[0], 2, partial(losses.ppo_loss, actor), 1e-2)
    trainer.critic_wg = workers(MODELS[1], 1, partial(losses.value_loss, critic), 1e-2)
    trainer.actor_rollout_wg = SimpleNamespace(
        compute_log_prob=lambda data: policy.infer_batch(data).get(),
        update_actor=lambda data: policy.train_mini_batch(data).get())
    trainer.ref_policy_wg = SimpleNamespace(
        compute_ref_log_prob=trainer.actor_rollout_wg.compute_log_prob)
    steps, reference = [], None
    for _ in range(STEPS):
        data = batch()
        data = data.union(trainer._compute_old_log_prob(data)[0])
        reference = trainer._compute_ref_log_prob(batch()) if reference is None else reference
        data = data.union(reference).union(trainer._compute_values(data))
        data, logged = ray_trainer.apply_kl_penalty(
            data, core_algos.FixedKLController(0.05), "low_var_kl")
        data = ray_trainer.compute_advantage(data, "gae", gamma=0.99, lam=0.95, config={})
        chosen = data.batch["token_level_scores"].bool()
        steps.append({"letter": data.batch["old_log_probs"][chosen].mean().item(), **logged})
        for update in (trainer._update_critic, trainer._update_actor):
            logged = update(data).meta_info["metrics"]
            steps[-1] |= {k: torch.tensor(v).double().mean().item() if isinstance(v, list) else v
                          for k, v in logged.items() if not k.startswith("perf/")}
    ours = core_algos.compute_gae_advantage_return.__module__
    Path(sys.argv[2]).write_text(json.dumps({"ours": ours, "mode": mode, "steps": steps},
                                            default=float))


if __name__ == "__main__":
    here = str(Path(__file__).parent)
    chosen = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "_verl_cpu",
              "VERL_ENGINE_DEVICE": "cuda", "OMP_NUM_THREADS": "1",
              "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    os.environ |= chosen
    sys.path.insert(0, here)
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": chosen})
    main()
