"""The study of a real model, with a tiny one in its place: adapters, and heads of frozen states."""

from dataclasses import replace

import pytest
import torch
from test_examples import CHATML
from test_loading import small, write_gguf
from torch.nn.functional import cross_entropy

from tppo.commands import _read
from tppo.errors import DataError
from tppo.models.batch import Batch
from tppo.models.tokenizer import train_tokenizer
from tppo.sessions.config import SessionsConfig
from tppo.sessions.synthetic import POPULAR
from tppo.stages.study.arms import WRITTEN
from tppo.stages.study.command import with_model
from tppo.stages.study.config import Arm, Cell, Noise, Part, StudyConfig
from tppo.stages.study.figures import all_figures
from tppo.stages.study.frozen import RIDGES, first_layers, fit_linear, head_scores, states_of
from tppo.stages.study.material import Material
from tppo.stages.study.presets import PRESETS
from tppo.stages.study.reward_models import reward_of, scores
from tppo.stages.study.tables import markdown, tables
from tppo.stages.study.work import Outcome, Place, _jobs, perform


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GGUF file with a chat template, as the real one is."""
    path = tmp_path_factory.mktemp("site") / "Tiny.Q4_1.gguf"
    tokenizer = train_tokenizer(list(POPULAR), 300)
    write_gguf(path, tokenizer, small(tokenizer, tie_word_embeddings=True), CHATML)
    return path


def reduced(name, seeds=(3, 4)):
    """The preset with all its arms, a layer that the tiny model has, and as little as possible."""
    study = PRESETS[name]()
    settings = replace(
        study.settings,
        sessions=SessionsConfig(24, 4, 8, 0),
        sft=replace(study.settings.sft, max_steps=2, decay_steps=2, eval_every=2),
        generate=replace(study.settings.generate, samples=24, max_new_tokens=16),
        ppo=replace(study.settings.ppo, without_signal=True),
    )

    def shrunk(part):
        arms = tuple(replace(arm, layer=1, fit_critic=min(arm.fit_critic, 8)) for arm in part.arms)
        # Nothing that the tiny model says is relevant: flipped labels are something to learn.
        return replace(part, arms=arms, answers=(8, 16)[: len(part.answers)],
                       seeds=seeds[:1] if part.steps else seeds,
                       noise=(Noise(0.3, 0.3),), steps=min(part.steps, 1), step_answers=4,
                       eval_every=0)  # fmt: skip

    parts = tuple(dict.fromkeys(map(shrunk, study.parts)))
    return replace(study, parts=parts, fresh_answers=8, users=8, settings=settings)


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    study = with_model(reduced("real"), model)
    return Place(study, tmp_path_factory.mktemp("study"), model)


@pytest.fixture(scope="module")
def outcomes(place):
    """Every arm of the preset, in this process."""
    found = []
    for job in _jobs(place.study, place.study.cells()):
        result = perform(job, place)
        found += [] if result is None else [Outcome(job.cell, result)]
    return found


def material_of(place, seed):
    return Material(place.folder, place.study, 3, seed, place.model)


def test_a_real_model_is_trained_by_every_arm_of_the_preset(place, outcomes):
    study = place.study
    assert study.model == "Tiny.Q4_1.gguf" and len(outcomes) == len(study.cells())
    jobs = [job for job in _jobs(study, study.cells()) if job.kind == "material"]
    assert len(jobs) == 1 and len(list((place.folder / "material").iterdir())) == 1
    trained = [o for o in outcomes if o.cell.steps]
    assert {o.cell.arm.name for o in trained} == {arm.name for p in study.parts for arm in p.arms}
    assert all(len(o.found["curve"]) == 2 and len(o.found["sampled"]) == 1 for o in trained)
    assert all(len(row["written"]) == WRITTEN for o in trained for row in o.found["curve"])
    assert all(o.found["critic_fit"] for o in trained if o.cell.arm.fit_critic)
    assert not any(o.found["curve"] for o in outcomes if not o.cell.steps)
    assert all(len(set(o.found["scores"])) > 4 for o in outcomes)
    of_words = {o.cell.seed: o.found["shares"] for o in outcomes}
    assert of_words[3] != of_words[4]  # seeds differ in which answers are fresh
    figures = all_figures(study, outcomes)
    alone = next(s for s in figures["labels"] if not s["steps"])
    assert "relevance" not in alone["arms"]["by word"] and "correlation" in alone["needed"]
    shown = markdown(tables(figures | {"label_cost": None}))
    assert "critic fitted" in shown and "rank correlation" in shown


def test_the_study_for_a_gpu_is_that_of_two_cores_with_more_of_everything(model, tmp_path):
    small, large = PRESETS["real"](), PRESETS["gpu"]()
    for part, more in zip((small.parts[0], small.parts[1], small.parts[-1]), large.parts,
                          strict=True):  # fmt: skip
        assert part.question == more.question
        assert [arm.name for arm in part.arms] == [arm.name for arm in more.arms]
        assert more.steps >= part.steps and max(more.answers) > max(part.answers)
    assert large.material_seed is None and large.users > small.users
    study = with_model(reduced("gpu", seeds=(5,)), model)
    cells = [cell for cell in study.cells() if cell.arm.fit_critic and cell.answers == 8][-2:]
    place = Place(study, tmp_path, model)
    found = [perform(job, place) for job in _jobs(study, cells)]
    trained = [row for row in found if row is not None and row["curve"]]
    assert [cell.arm.labels for cell in cells] == ["words", "sentences"] and len(trained) == 2
    assert (tmp_path / "material/3-queries-seed-5/sft/adapter").exists()


def test_ppo_is_paid_by_the_head_that_was_fitted_on_the_kept_states(place, outcomes):
    material = material_of(place, 3)
    sft = material.run.sft_model()
    answers = [answer for answer, _ in material.fresh]
    batch = Batch([a.prompt_ids for a in answers], [a.response_ids for a in answers],
                  material.run.tokenizer.pad_token_id)  # fmt: skip
    for cell in (o.cell for o in outcomes if o.cell.steps and o.cell.seed == 3):
        reward = reward_of(material, cell, sft)
        kept = scores(material, cell, None)
        while hasattr(reward, "reward"):  # its form, or where it is paid, is another's matter
            reward = reward.reward
        found = reward.model(batch)
        if cell.arm.labels == "sentences":
            assert found.tolist() == pytest.approx(kept, abs=1e-4)
            continue
        chance = found.softmax(-1) * batch.mask[..., None]
        share = chance[..., 2].sum(1) / chance[..., 1:].sum((1, 2))
        assert share.tolist() == pytest.approx(kept, abs=1e-4)


def test_other_commands_find_the_settings_of_a_material_in_its_folder(place, outcomes):
    """`tppo train-rm` and `tppo noise` of a study's material need no flag but --out."""
    run = material_of(place, 3).run
    found = _read(run.out / "run.yaml")
    assert (found.out, found.seed, found.model) == (run.out, run.seed, run.model)
    assert found.settings == run.config


def test_an_arm_changes_settings_for_itself_alone(place, outcomes):
    material = material_of(place, 3)
    cell = next(o.cell for o in outcomes if o.cell.steps and o.cell.arm.name == "by word")
    arm = replace(cell.arm, changes=("ppo.reward_values=[0, 1, 2]", "ppo.reward=argmax",
                                     "reward_model.balance=9"))  # fmt: skip
    own = material.for_arm(arm)
    assert own.run.config.reward_model.balance == 9 == own.seeded.config.reward_model.balance
    assert material.for_arm(cell.arm) is material and material.run.config.ppo.reward == "expected"
    assert replace(cell, arm=arm).reward_model == cell.reward_model.replace(
        "layer-1", "layer-1-balance=9"
    )
    reward = reward_of(own, cell, material.run.sft_model()).reward  # within what its form costs
    assert (reward.values, reward.mode) == ([0, 1, 2], "argmax")


def test_settings_that_an_arm_cannot_change():
    for change in ("sft.lr=1", "ppo.lamda=1", "ppo.lam", "ppo.lam="):
        with pytest.raises(DataError, match=f"changes had {change!r}, expected reward_model.NAME"):
            StudyConfig((Part(arms=(Arm(changes=(change,)),)),))
    with pytest.raises(DataError, match="field 'ppo.reward': was 'most'"):
        StudyConfig((Part(arms=(Arm(changes=("ppo.reward=most",)),)),))


def test_states_are_those_of_the_layer_and_are_read_once(place, outcomes, monkeypatch):
    material = material_of(place, 3)
    answer = material.fresh[0][0]
    sft = material.run.sft_model()
    from tppo.methods.reward_model import LabelledAnswer

    row = LabelledAnswer(answer.prompt_ids, answer.response_ids, (), 0)
    monkeypatch.setattr("tppo.stages.study.frozen.first_layers", None)  # is not asked again
    (states,) = states_of(material, 1, [row])
    ids = torch.tensor([[*answer.prompt_ids, *answer.response_ids]])
    trunk = sft.base_model
    with torch.no_grad():
        whole = trunk(input_ids=ids, output_hidden_states=True, use_cache=False)
        expected = trunk.norm(whole.hidden_states[1])[0, len(answer.prompt_ids) :]
    assert torch.allclose(states, expected, atol=1e-4)
    last = whole.last_hidden_state[0, len(answer.prompt_ids) :]
    assert not torch.allclose(states, last, atol=0.1)


def test_layers_that_a_model_has_not(place, outcomes):
    trunk = material_of(place, 3).run.sft_model().base_model
    for layers in (0, 9):
        with pytest.raises(ValueError, match=f"layer was {layers}, expected 1 to 2"):
            first_layers(trunk, layers)


def test_a_head_is_the_minimum_of_its_objective_and_finds_what_is_there():
    torch.manual_seed(0)
    x = 3 * torch.randn(600, 8) + 5
    true = torch.randn(3, 8) / 3
    y = torch.distributions.Categorical(logits=(x - 5) @ true.T).sample()
    head = fit_linear(x, y, 3, list(range(600)), 0)
    deviation = x.double().std(0)
    weight = (head.weight.double() * deviation).detach().requires_grad_()
    bias = (head.bias.double() + head.weight.double() @ x.double().mean(0)).detach()
    z = (x.double() - x.double().mean(0)) / deviation
    gradients = []
    for c in RIDGES:
        loss = cross_entropy(z @ weight.T + bias, y, reduction="sum")
        (loss + c / 2 * weight.square().sum()).backward()
        gradients.append(weight.grad.norm().item())
        weight.grad = None
    assert min(gradients) < 0.1 < sorted(gradients)[1]
    with torch.no_grad():
        own = cross_entropy(head(x), y).item()
        best = cross_entropy((x - 5) @ true.T, y).item()
    assert own < best + 0.02


def test_labels_of_one_class_give_a_head_that_is_finite():
    head = fit_linear(torch.randn(12, 4), torch.zeros(12, dtype=torch.int64), 2, [*range(12)], 0)
    assert head(torch.randn(5, 4)).isfinite().all()


def test_what_a_study_of_a_real_model_needs(model):
    for name in ("real", "gpu"):
        with pytest.raises(DataError, match="--model was None, expected the path of a model"):
            with_model(PRESETS[name](), None)
    with pytest.raises(DataError, match="expected the path of 'other.gguf'"):
        with_model(replace(PRESETS["real"](), model="other.gguf"), model)
    with pytest.raises(DataError, match="expected a layer in every arm"):
        replace(PRESETS["real"](), parts=(Part(answers=(100,)),))


def test_scores_are_of_the_words_that_are_labelled():
    head = torch.nn.Linear(2, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        head.bias.zero_()
    states = [torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]])]
    (share,) = head_scores(Cell(Arm(layer=1)), head, states)
    assert share == pytest.approx(0.5, abs=1e-3)  # the third token is of no word
