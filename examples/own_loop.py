"""PPO with a reward at every token in a loop of your own, from the operators alone.

    python examples/own_loop.py

A small recurrent model learns to count: a token pays 1 where it is one more than the token before
it, and costs a little where it is not.  Any model that gives hidden states, and any rewards, stand
in the place of these; `train` is all that PPO takes.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import tppo_kernels as tk

EOS, VOCAB, PROMPT, LONGEST = 0, 24, 3, 12  # an answer has at most LONGEST tokens
ANSWERS, EPOCHS, LEARNING_RATE = 64, 2, 1e-2


class Model(nn.Module):
    """A trunk with a head for tokens and one for values; called, it gives hidden states."""

    def __init__(self, size: int = 64):
        super().__init__()
        self.embedding, self.trunk = nn.Embedding(VOCAB, size), nn.GRU(size, size, batch_first=True)
        self.head, self.value = nn.Linear(size, VOCAB), nn.Linear(size, 1)

    def forward(self, ids: Tensor) -> Tensor:  # [B, L] -> [B, L, D]
        return self.trunk(self.embedding(ids))[0]


def rewards_of(ids: Tensor) -> Tensor:  # [B, PROMPT + LONGEST] -> [B, LONGEST]
    """What every token of the answers is worth."""
    counted = ids[:, PROMPT:] == ids[:, PROMPT - 1 : -1] + 1
    return torch.where(counted, 1.0, -0.1)


@torch.no_grad()
def sample(model: Model) -> Tensor:  # [B, PROMPT + LONGEST]
    """Random prompts with an answer each; what follows EOS is left to the mask."""
    ids = torch.randint(1, VOCAB // 2, (ANSWERS, PROMPT))
    for _ in range(LONGEST):
        p = model.head(model(ids)[:, -1]).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return ids


def train(model: Model, steps: int) -> list[float]:
    """Token-level PPO; gives the mean reward of an answer at every step."""
    optimizer, curve, first = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), [], Model()
    first.load_state_dict(model.state_dict())  # the reference, which KL is paid to

    def read(model: Model, ids: Tensor, tokens: Tensor, mask: Tensor):
        states = tk.response_states(model(ids), PROMPT, LONGEST, mask=mask)
        logprobs, entropy = tk.token_logprobs(model.head(states), tokens, mask)
        return logprobs, entropy, tk.token_head(states, model.value.weight, model.value.bias, mask)

    for _ in range(steps):
        ids = sample(model)
        tokens = ids[:, PROMPT:]
        mask = tk.response_mask(tokens, EOS)
        with torch.inference_mode():
            old, _, old_values = read(model, ids, tokens, mask)
            batch = tk.token_advantages(
                rewards_of(ids), old_values, mask, logprobs=old,
                ref_logprobs=read(first, ids, tokens, mask)[0], kl_coef=0.01, gamma=1.0, lam=0.95,
            )  # fmt: skip
        for _ in range(EPOCHS):
            logprobs, entropy, values = read(model, ids, tokens, mask)
            policy = tk.ppo_loss(logprobs, old, batch.advantages, mask, entropy=entropy,
                                 entropy_coef=0.003)  # fmt: skip
            critic = tk.value_loss(values, batch.returns, mask, old_values=old_values, clip=0.5)
            optimizer.zero_grad()
            (policy.loss + 0.5 * critic.loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        curve.append(float((rewards_of(ids) * mask).sum(1).mean()))
    return curve


def main(arguments: list[str] | None = None) -> list[float]:
    """Train and print what an answer is worth on the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    curve = train(Model(), options.steps)
    for step in range(0, options.steps, max(options.steps // 8, 1)):
        print(f"step {step:4d}: an answer is worth {curve[step]:6.2f}")
    print(f"at the end {sum(curve[-5:]) / len(curve[-5:]):.2f}, of at most {LONGEST}")
    return curve


if __name__ == "__main__":
    main()
