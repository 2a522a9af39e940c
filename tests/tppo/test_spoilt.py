"""A batch with figures that are not finite is skipped, counted, told and kept; one too large for
the memory is read in smaller parts, with the same result."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from test_ppo import CONFIG, PROMPTS, folder, questions, trainer  # noqa: F401

from tppo.errors import DataError
from tppo.methods.spoilt import SPOILT
from tppo.models.guards import GuardError
from tppo.stages import replay as replays
from tppo.stages.replay import experience_of, read_kept, write_spoilt

NAN, INF = float("nan"), float("inf")


class Pays:
    """A reward that gives `value` to one token of one response, at the calls that are named."""

    def __init__(self, real, value, calls):
        self.real, self.value, self.calls, self.count = real, value, calls, 0

    def __call__(self, batch, answers):
        found = self.real(batch, answers)
        self.count += 1
        if self.count in self.calls:
            found.rewards[2, 0] = self.value
        return found


def weights(ppo):
    return [p.detach().clone() for model in ppo.models.trained.values() for p in model.parameters()]


def same(before, ppo):
    return all(map(torch.equal, before, weights(ppo)))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_costs_one_step(folder, value, capsys):  # noqa: F811
    ppo = trainer(folder)
    ppo.reward = Pays(ppo.reward, value, {2})
    ppo.step(questions(PROMPTS))
    before = weights(ppo)
    metrics, rollout = ppo.step(questions(PROMPTS))
    assert metrics == {SPOILT: 1.0, "policy/updates": 0.0} and len(rollout.response_ids) == 16
    assert same(before, ppo)
    assert "WARNING: ppo step 2: not finite: class logits of the reward model" in (
        capsys.readouterr().err)  # fmt: skip
    metrics, _ = ppo.step(questions(PROMPTS))
    assert SPOILT not in metrics and not same(before, ppo) and ppo.skips.in_row == 0


def test_so_many_in_a_row_stop_with_one_sentence_and_the_weights_as_they_were(folder):  # noqa: F811
    ppo = trainer(folder, replace(CONFIG, max_spoilt=2))
    ppo.step(questions(PROMPTS))
    ppo.reward, before = Pays(ppo.reward, NAN, range(100)), weights(ppo)
    ppo.step(questions(PROMPTS))
    with pytest.raises(GuardError) as stopped:
        ppo.step(questions(PROMPTS))
    assert same(before, ppo) and "\n" not in str(stopped.value)
    for part in ("ppo step 3: not finite", "2 batches in a row", "--ppo.max-spoilt"):
        assert part in str(stopped.value)


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_a_loss_that_is_not_finite_costs_one_minibatch(folder, model, monkeypatch):  # noqa: F811
    """Of four, the second; what is kept says what it was, and reads back as it was."""
    ppo, kept = trainer(folder), []
    ppo.step(questions(PROMPTS))
    ppo.skips.keep = lambda batch: kept.append(batch) or "FILE"
    real, calls = ppo._backward, []

    def backward(part, whole, step_zero):
        losses = real(part, whole, step_zero)
        calls.append(1)
        if len(calls) == 2:
            field = {"policy": "policy", "critic": "value"}[model]
            losses = losses._replace(**{field: losses.policy * NAN})
        return losses

    monkeypatch.setattr(ppo, "_backward", backward)
    metrics, _ = ppo.step(questions(PROMPTS))
    assert metrics[SPOILT] == 1 and metrics["policy/updates"] == 3
    (batch,) = kept
    assert batch.step == 2 and batch.part == "minibatch" and "loss is nan" in batch.why
    assert len(batch.data.batch.response_ids) == CONFIG.minibatch_size


def kept_batch(folder, tmp_path, spoil):  # noqa: F811
    """A skipped minibatch on the disk; `spoil` changes the experience before its update."""
    ppo = trainer(folder)
    rollout = ppo.sample(questions(PROMPTS).ids)
    data, _ = ppo.score(rollout, ppo.answers(questions(PROMPTS), rollout))
    data = data.rows(range(8))
    spoil(data)
    ppo.skips.keep = lambda batch: write_spoilt(tmp_path / "run" / "train.tmp", batch)
    (tmp_path / "run").mkdir(exist_ok=True)
    ppo.skips.add(3, data, "ppo step 3: policy loss is nan", ppo._with_weights(), part="minibatch")
    (path,) = (tmp_path / "run" / "spoilt").glob("*.json")
    return ppo, data, path


def test_what_is_kept_is_replayed_and_names_the_operator(folder, tmp_path):  # noqa: F811
    def spoil(data):
        data.advantages[5, 0] = INF

    ppo, data, path = kept_batch(folder, tmp_path, spoil)
    assert path.name == "train-step-3-1.json"
    kept = read_kept(path)
    again = experience_of(kept, path, ppo)
    assert all(torch.equal(a, b) for a, b in zip(again.masks, data.masks, strict=True))
    assert torch.equal(again.advantages, data.advantages)
    said = "\n".join(replays.replay(ppo, None, kept, path))
    assert "advantages of the batch: inf at token 0 of response 5 (1 values)" in said
    assert "found: linear_ppo_loss: " in said or "found: ppo_loss: " in said
    assert "Its input advantages is inf at row 5, column 0" in said


def test_a_layer_of_the_model_between_two_operators_is_told_apart(folder, tmp_path):  # noqa: F811
    ppo, _, path = kept_batch(folder, tmp_path, lambda data: None)
    kept = read_kept(path)
    assert "every figure is finite with these weights" in replays.replay(ppo, None, kept, path)[-1]
    weight = next(iter(ppo.models.policy.parameters()))
    weight.register_hook(lambda gradient: gradient * NAN)
    assert "a layer of the model itself" in replays.replay(ppo, None, kept, path)[-1]


@pytest.mark.parametrize("harm", ["missing", "cut", "foreign", "other"])
def test_a_kept_batch_that_is_harmed_is_one_sentence(folder, tmp_path, harm):  # noqa: F811
    ppo, _, path = kept_batch(folder, tmp_path, lambda data: None)
    tensors = path.with_suffix(".safetensors")
    if harm == "missing":
        tensors.unlink()
    elif harm == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif harm == "foreign":
        path.write_text(json.dumps({"step": 3}))
    else:
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | {"responses": kept["responses"][:-1],
                                           "prompts": kept["prompts"][:-1]}))  # fmt: skip
    with pytest.raises(DataError, match=r"train-step-3-1\.\w+: .*expected"):
        experience_of(read_kept(path), path, ppo)


def test_only_the_newest_batches_are_kept(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(replays, "MOST", 1)
    ppo, data, path = kept_batch(folder, tmp_path, lambda data: None)
    ppo.skips.add(4, data, "ppo step 4: value loss is inf", ppo._with_weights(), part="minibatch")
    left = sorted(file.name for file in path.parent.iterdir())
    assert left == ["train-step-4-1.json", "train-step-4-1.safetensors"]


def test_what_is_kept_is_bounded_in_bytes_and_a_kill_leaves_nothing(
    folder, tmp_path, monkeypatch  # noqa: F811
):
    ppo, data, path = kept_batch(folder, tmp_path, lambda data: None)
    (path.parent / "train-step-2-1.safetensors").write_bytes(b"killed before its JSON")
    one = path.with_suffix(".safetensors").stat().st_size
    monkeypatch.setattr(replays, "MOST_BYTES", 2 * one + 500)
    for step in (4, 5):
        ppo.skips.in_row = 0
        ppo.skips.add(step, data, f"ppo step {step}: nan", ppo._with_weights(), part="minibatch")
    left = sorted(file.stem for file in path.parent.iterdir())
    assert left == ["train-step-4-1"] * 2 + ["train-step-5-1"] * 2


def test_a_full_disk_costs_what_is_kept_of_a_batch_and_no_more(
    folder, tmp_path, monkeypatch, capsys  # noqa: F811
):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    ppo, data, path = kept_batch(folder, tmp_path, lambda data: None)
    monkeypatch.setattr(replays, "write_json", full)
    ppo.skips.in_row = 0
    ppo.skips.add(4, data, "ppo step 4: nan", ppo._with_weights(), part="minibatch")
    said = capsys.readouterr().err
    assert "a batch that is skipped cannot be written: No space left on device" in said
    assert "ppo step 4: nan. The minibatch is skipped (1 in a row)\n" in said
    assert {file.stem for file in path.parent.iterdir()} == {"train-step-3-1"}


def gradients(ppo):
    return [p.grad.clone() for model in ppo.models.trained.values() for p in model.parameters()
            if p.grad is not None]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_a_batch_too_large_for_the_memory_has_the_same_gradients(
    folder, kind, monkeypatch, capsys  # noqa: F811
):
    """The allocator refuses passes of more than 40 tokens, in the middle of policy or critic."""
    ppo = trainer(folder)
    rollout = ppo.sample(questions(PROMPTS).ids)
    data, _ = ppo.score(rollout, ppo.answers(questions(PROMPTS), rollout))
    whole, critic = data.rows(range(8)), ppo.models.critic
    ppo._minibatch(whole, True)
    expected = ppo.gradients(whole, 10_000) and gradients(ppo)
    error = {"gpu": torch.OutOfMemoryError("CUDA out of memory."),
             "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory")}[kind]
    real = critic.forward

    def forward(batch):
        if sum(map(len, (*batch.prompt_ids, *batch.response_ids))) > 40:
            raise error  # behind the policy's backward: its gradients are there already
        return real(batch)

    monkeypatch.setattr(critic, "forward", forward)
    losses = ppo.part_size.fitted(whole.batch, lambda n: ppo.gradients(whole, n))
    assert len(losses) > 1 and ppo.part_size.tokens < 41
    for found, right in zip(gradients(ppo), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    said = capsys.readouterr().err
    assert "WARNING: out of memory with" in said and "the same result" in said
    ppo.part_size.fitted(whole.batch, lambda n: ppo.gradients(whole, n))
    assert "out of memory" not in capsys.readouterr().err  # said once


def test_one_answer_that_does_not_fit_is_one_sentence_and_other_errors_pass(folder):  # noqa: F811
    ppo = trainer(folder)
    rollout = ppo.sample(questions(PROMPTS).ids)
    data, _ = ppo.score(rollout, ppo.answers(questions(PROMPTS), rollout))

    def work(error):
        def never(tokens):
            raise error
        return never

    with pytest.raises(torch.OutOfMemoryError, match="One answer of .* alone does not fit"):
        ppo.part_size.fitted(data.batch, work(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(RuntimeError, match="^something else$"):
        ppo.part_size.fitted(data.batch, work(RuntimeError("something else")))
