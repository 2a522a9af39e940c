"""A training script of SkyRL whose responses are rewarded token by token.

    python examples/integrations/skyrl/train.py trainer.algorithm.advantage_estimator=tppo_gae \
      trainer.algorithm.policy_loss_type=tppo environment.env_class=tppo KEY=VALUE ...

Four lines are ours; the rest is the entry point that SkyRL's documentation gives.  Who has no
script of his own takes `python -m tppo_kernels.integrations.skyrl one_gpu.yaml`, which is the same
with the reward model in a process of its own.
"""

import sys

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import initialize_ray, validate_cfg

from tppo_kernels.integrations.skyrl import TokenPPOTrainer, TokenRewardGenerator, TokenRewardModel


class Experiment(BasePPOExp):
    """SkyRL's experiment with another generator and another trainer."""

    def get_generator(self, cfg, tokenizer, inference_engine_client):
        """SkyRL's own, its rewards from the exported reward model."""
        generator = super().get_generator(cfg, tokenizer, inference_engine_client)
        score = TokenRewardModel("cluster/reward-model", mode="expected").rewards
        return TokenRewardGenerator(generator, score)

    def get_trainer(self, **given):
        """SkyRL's own, whose advantages step over the tokens of tools."""
        return TokenPPOTrainer(**given)


@ray.remote(num_cpus=1)
def train(cfg):
    """The whole training, in a process of the cluster."""
    Experiment(cfg).run()


def main(arguments):
    """`key.path=value` of SkyRL's configuration."""
    cfg = SkyRLTrainConfig.from_cli_overrides(arguments)
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(train.remote(cfg))


if __name__ == "__main__":
    main(sys.argv[1:])
