"""Nothing is slower through the adapter than TRL's own, on a CPU."""

import contextlib
import inspect
import time

import pytest
import torch
from _trl_runs import count_vowels, made, saved_model
from trl import GRPOTrainer
from trl.trainer import utils

from tppo_kernels.integrations import trl as ours

pytestmark = pytest.mark.slow
CHUNKED, SOFTMAX, ENTROPY = (utils._ChunkedLogProbFunction, utils.selective_log_softmax,
                             utils.entropy_from_logits)
BOTH = getattr(utils, "selective_log_softmax_and_entropy", None)
SLACK = 1.1  # what the clock of a machine in use adds to one of the two


def shortest(*functions, rounds):
    """The shortest time of each in seconds, in turns."""
    found = [[] for _ in functions]
    for _ in range(rounds):
        for times, function in zip(found, functions, strict=True):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
    return [min(times) for times in found]


def forward_backward(function, *leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]

    def call():
        results = [x for x in function(*leaves) if x is not None and x.requires_grad]
        torch.autograd.grad(sum(x.sum() for x in results), leaves)

    return call


def told(capsys, name, theirs, mine):
    with capsys.disabled():
        print(f"{name}: {1e3 * theirs:.1f} ms theirs, {1e3 * mine:.1f} ms ours, "
              f"{theirs / mine:.2f} times as fast")
    assert mine <= SLACK * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_logits(capsys, dtype):
    logits, index = torch.randn(4, 64, 32000).to(dtype), torch.randint(0, 32000, (4, 64))
    pairs = {
        "selective_log_softmax": (lambda x: [SOFTMAX(x, index)],
                                  lambda x: [ours._selective_log_softmax(x, index)]),
        "entropy_from_logits": (lambda x: [ENTROPY(x)], lambda x: [ours._entropy_from_logits(x)])}
    if BOTH is not None:
        pairs["both"] = (lambda x: BOTH(x, index),
                         lambda x: ours._selective_log_softmax_and_entropy(x, index))
    for name, functions in pairs.items():
        times = shortest(*(forward_backward(f, logits) for f in functions), rounds=5)
        told(capsys, f"{name}, {list(logits.shape)} {dtype}, forward and backward", *times)


def test_the_chunked_function(capsys):
    hidden, weight = torch.randn(512, 256), torch.randn(32000, 256) / 16
    rest = (torch.randint(0, 32000, (512,)), 1.0, 32768)
    names = inspect.signature(CHUNKED.forward).parameters
    rest = ((None,) if "bias" in names else ()) + rest
    if "outputs" in names:
        rest += (None, 1.0, ("log_probs", "entropy"))
    times = shortest(*(forward_backward(lambda h, w, k=kind: k.apply(h, w, *rest), hidden, weight)
                       for kind in (CHUNKED, ours._ChunkedLogProbs)), rounds=5)
    told(capsys, "chunked log-probs, 512 x 256 x 32000 fp32, forward and backward", *times)


def test_a_step_of_the_trainer(capsys, tmp_path):
    model = saved_model(tmp_path / "model")
    trainers = [made(kind, model, tmp_path / "out", reward=count_vowels, beta=0.1)
                for kind in (GRPOTrainer, ours.TokenGRPOTrainer)]
    steps = []
    for trainer in trainers:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._generate_and_score_completions([{"prompt": "ab"}] * 8)
        inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}

        def step(trainer=trainer, inputs=inputs):
            trainer._compute_loss(trainer.model, inputs).backward()

        steps.append(step)
    with contextlib.redirect_stdout(None):
        times = shortest(*steps, rounds=30)
    told(capsys, "loss and backward of 8 answers, a model of 30,000 weights", *times)
