"""The operators together, as a trainer calls them: compiled whole, traced, and not traced again."""

import re
from pathlib import Path

import pytest
import torch

import tppo_kernels as tk
from tppo_kernels.testing import count_graphs


def update(logits, values, tokens, mask, reward, old, ref, temperature):
    """One PPO update of actor and critic from logits and values, as a trainer writes it."""
    logprobs, entropy = tk.token_logprobs(logits, tokens, mask, temperature=temperature)
    batch = tk.token_advantages(reward, values.detach(), mask, logprobs=old, ref_logprobs=ref,
                                kl_coef=0.1)
    policy = tk.ppo_loss(logprobs, old, batch.advantages, mask, entropy=entropy, entropy_coef=0.01)
    return policy.loss + 0.1 * tk.value_loss(values, batch.returns, mask).loss


def inputs(batch=3, length=7, vocabulary=11):
    torch.manual_seed(length)
    shape = (batch, length)
    return (torch.randn(*shape, vocabulary, requires_grad=True),
            torch.randn(shape).requires_grad_(),
            torch.randint(vocabulary, shape), torch.rand(shape) < 0.8, torch.randn(shape),
            -torch.rand(shape), -torch.rand(shape), torch.tensor(0.7))


def test_an_update_compiles_whole_and_equals_eager():
    given = inputs()
    expected = update(*given)
    gradients = torch.autograd.grad(expected, given[:2])
    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, expected)
    for actual, wanted in zip(torch.autograd.grad(compiled, given[:2]), gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_an_update_compiles_with_inductor():
    given = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True)(*given)
    torch.testing.assert_close(compiled, update(*given))
    compiled.backward()
    assert given[0].grad.isfinite().all()


def test_fifty_lengths_and_temperatures_make_at_most_two_graphs():
    """Liger#146, fla#533: recompilation for every length or temperature."""
    calls = []
    for length in range(2, 52):
        *rest, _ = inputs(length=length)
        calls.append((*rest, torch.tensor(0.5 + length / 100)))
    assert count_graphs(update, calls) <= 2


def examples():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.S)
    return [compile(example, "README.md", "exec") for example in found]


def test_the_first_example_of_the_readme_runs():
    names = {}
    exec(examples()[0], names)
    assert names["logits"].grad.abs().sum() > 0 and names["values"].grad.abs().sum() > 0


def test_the_second_example_of_the_readme_is_each_answer_alone(tmp_path, monkeypatch):
    """As it is pasted, in a folder where a model lies at the path that it names."""
    transformers = pytest.importorskip("transformers")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )).save_pretrained(tmp_path / "path/or/hub-id")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(examples()[1], names)
    model, prompt, answers = names["model"], names["prompt"], names["answers"]
    for answer, logprobs in zip(answers, names["logprobs"], strict=True):
        every = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[3:-1]
        alone = every.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[:len(answer)], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_update_runs_where_no_gradient_is_wanted(context):
    given = inputs()
    with context():
        assert torch.equal(update(*given), update(*given).clone())


def test_autocast_does_not_lower_the_results():
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = update(*given)
    assert lowered.dtype == torch.float32
    torch.testing.assert_close(lowered, update(*given), rtol=0, atol=0)
