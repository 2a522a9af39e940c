"""Nothing is slower through the adapter than TRL's own, on a CPU."""

import inspect

import pytest
import torch
from _speed import compared, with_backward
from _trl_runs import count_vowels, made, saved_model
from trl import GRPOTrainer
from trl.trainer import utils

from tppo_kernels.integrations import trl as ours

pytestmark = pytest.mark.slow
CHUNKED, SOFTMAX, ENTROPY = (utils._ChunkedLogProbFunction, utils.selective_log_softmax,
                             utils.entropy_from_logits)
BOTH = getattr(utils, "selective_log_softmax_and_entropy", None)


def test_the_table_has_every_function_that_is_installed():
    timed = {"_ChunkedLogProbFunction", "selective_log_softmax", "entropy_from_logits"}
    timed |= {"selective_log_softmax_and_entropy"} if BOTH else set()
    assert {name.partition(":")[2] for name in ours._OURS} == timed


SHAPES = [(4, 64, 32000, torch.float32), (4, 64, 32000, torch.bfloat16),
          (2, 16, 1000, torch.float32)]


@pytest.mark.parametrize("name", ["selective_log_softmax", "entropy_from_logits", "both"])
@pytest.mark.parametrize(("b", "t", "v", "dtype"), SHAPES)
def test_functions_of_logits(capsys, name, b, t, v, dtype):
    logits, index = torch.randn(b, t, v).to(dtype), torch.randint(0, v, (b, t))
    pairs = {
        "selective_log_softmax": (lambda x: SOFTMAX(x, index),
                                  lambda x: ours._selective_log_softmax(x, index)),
        "entropy_from_logits": (ENTROPY, ours._entropy_from_logits)}
    if BOTH is not None:
        pairs["both"] = (lambda x: BOTH(x, index),
                         lambda x: ours._selective_log_softmax_and_entropy(x, index))
    if name not in pairs:
        pytest.skip("of 1.14 and later")
    exact = with_backward(pairs[name][0], logits.double())()  # of bf16 TRL's sums are rounded
    compared(capsys, f"{name}, {b} x {t} x {v} {dtype}, with backward",
             *(with_backward(f, logits) for f in pairs[name]), exact=exact)


@pytest.mark.parametrize(("n", "d", "v"), [(512, 256, 32000), (32, 64, 1000)])
def test_the_chunked_function(capsys, n, d, v):
    hidden, weight = torch.randn(n, d), torch.randn(v, d) / d ** 0.5
    rest = (torch.randint(0, v, (n,)), 1.0, 32768)
    names = inspect.signature(CHUNKED.forward).parameters
    rest = ((None,) if "bias" in names else ()) + rest
    if "outputs" in names:
        rest += (None, 1.0, ("log_probs", "entropy"))
    compared(capsys, f"chunked log-probs, {n} x {d} x {v} fp32, with backward",
             *(with_backward(lambda h, w, k=kind: k.apply(h, w, *rest), hidden, weight)
               for kind in (CHUNKED, ours._ChunkedLogProbs)), close=1e-4)


def test_a_step_of_the_trainer(capsys, tmp_path):
    model = saved_model(tmp_path / "model")
    trainers = [made(kind, model, tmp_path / "out", reward=count_vowels, beta=0.1)
                for kind in (GRPOTrainer, ours.TokenGRPOTrainer)]
    steps = []
    for trainer in trainers:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
    inputs = trainers[0]._generate_and_score_completions([{"prompt": "ab"}] * 8)
    inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    for trainer in trainers:
        def step(trainer=trainer):
            loss = trainer._compute_loss(trainer.model, inputs)
            loss.backward()
            return [loss.detach()]

        steps.append(step)
    compared(capsys, "loss and backward of 8 answers, a model of 30,000 weights", *steps)
