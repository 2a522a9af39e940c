"""slime and NeMo-RL, which the index does not have, by stand-ins: packages with the modules, names
and signatures of theirs, and the formula of GAE that both document, written here from the formula.

And every integration: its trainer is absent, or another version: one sentence.
"""

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tppo_kernels.integrations import _peer, nemo_rl, openrlhf, slime, verl
from tppo_kernels.integrations._peer import PeerError

CASES = 500
SLIME = '''
import torch

def get_advantages_and_returns_batch(total_lengths, response_lengths, values_list, rewards_list,
                                     gamma, lambd, chunked=True):
    """A_t = delta_t + gamma lambda A_{t+1} of each answer by itself, every token a step."""
    advantages, returns = [], []
    for values, rewards in zip(values_list, rewards_list, strict=True):
        following, ahead, back = 0.0, 0.0, []
        for r, v in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
            ahead = r + gamma * following - v + gamma * lambd * ahead
            following = v
            back.append(ahead)
        advantages.append(torch.tensor(back[::-1], dtype=torch.float64))
        returns.append(advantages[-1] + values.double())
    return advantages, returns
'''
NEMO = '''
import torch

class GeneralizedAdvantageEstimator:
    def __init__(self, gamma, lam):
        self.gae_gamma, self.gae_lambda = gamma, lam

    def _compute_gae(self, token_level_rewards, values, mask, gae_lambda=None):
        """Over masked slots the next value and the advantage are carried."""
        lam = self.gae_lambda if gae_lambda is None else gae_lambda
        rewards, values, mask = (x.double() for x in (token_level_rewards, values, mask))
        following = ahead = torch.zeros(len(values), dtype=torch.float64)
        back = []
        for t in reversed(range(values.shape[1])):
            m = mask[:, t]
            delta = rewards[:, t] + self.gae_gamma * following - values[:, t]
            ahead = m * (delta + self.gae_gamma * lam * ahead) + (1 - m) * ahead
            following = m * values[:, t] + (1 - m) * following
            back.append(ahead)
        advantages = torch.stack(back[::-1], 1)
        return advantages, advantages + values
'''


@pytest.fixture
def trainers(tmp_path, monkeypatch):
    """`slime` and `nemo_rl`, as packages that run from their sources."""
    for file, text in {
        "slime/__init__.py": "", "slime/utils/__init__.py": "", "slime/utils/ppo_utils.py": SLIME,
        "slime/loss.py": "from slime.utils.ppo_utils import get_advantages_and_returns_batch\n",
        "nemo_rl/__init__.py": "__version__ = '0.6.0'\n", "nemo_rl/algorithms/__init__.py": "",
        "nemo_rl/algorithms/advantage_estimator.py": NEMO,
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield SimpleNamespace(
        slime=importlib.import_module("slime.loss"),
        nemo=importlib.import_module("nemo_rl.algorithms.advantage_estimator"), path=tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] in ("slime", "nemo_rl")]:
        del sys.modules[name]


def near(found, truth):
    assert found.shape == truth.shape
    if truth.numel():
        assert (found - truth).abs().max() <= 1e-6 * truth.abs().max().clamp(min=1)


def test_slimes_gae_is_ours_with_its_numbers_and_comes_back(trainers, capsys):
    theirs = trainers.slime.get_advantages_and_returns_batch
    slime.patch()
    assert capsys.readouterr().err == (
        "tppo_kernels in slime of unknown version: get_advantages_and_returns_batch is ours, with "
        "slime's numbers\n")
    ours = trainers.slime.get_advantages_and_returns_batch
    assert ours is slime.get_advantages_and_returns_batch
    for case in range(CASES):
        g = torch.Generator().manual_seed(case)
        lengths = torch.randint(0 if case % 7 == 0 else 1, 20, (4,), generator=g).tolist()
        values, rewards = ([torch.randn(n, generator=g) for n in lengths] for _ in range(2))
        given = ([n + 3 for n in lengths], lengths, values, rewards, 0.99,
                 (0.95, 1.0, 0.0)[case % 3])
        for found, truth in zip(ours(*given), theirs(*given), strict=True):
            for a, b in zip(found, truth, strict=True):
                near(a, b)
    slime.unpatch()
    assert trainers.slime.get_advantages_and_returns_batch is theirs


def test_slime_under_context_parallelism_is_slimes(trainers, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state",
                        SimpleNamespace(get_context_parallel_world_size=lambda: 2))
    slime.patch()
    found = trainers.slime.get_advantages_and_returns_batch(
        [5], [2], [torch.ones(2)], [torch.ones(2)], 1.0, 1.0)
    slime.unpatch()
    assert found[0][0].dtype == torch.float64  # the stand-in's


def rollout(**changed):
    return dict(
        response_lengths=[4, 2, 3], total_lengths=[6, 4, 5],
        rewards=[[1.0, 0.0, 2.0, 3.0], 5.0, 7.0], kl=[torch.full((n,), 0.5) for n in (4, 2, 3)],
        values=[torch.zeros(n) for n in (4, 2, 3)],
        loss_masks=[torch.tensor([1, 0, 0, 1]), torch.tensor([1, 1]), torch.tensor([0, 0, 0])],
    ) | changed


def test_slimes_custom_function_pays_tokens_and_skips_tools():
    args, data = SimpleNamespace(kl_coef=0.1, gamma=1.0, lambd=1.0), rollout()
    slime.token_advantages(args, data)
    # 2.0 stood on a tool's token and moves back; a masked answer is paid nothing
    assert torch.cat(data["returns"]).tolist() == pytest.approx(
        [1 + 2 - .05 + 3 - .05, 0, 0, 3 - .05, 5 - .1, 5 - .05, 0, 0, 0])
    assert [len(x) for x in data["advantages"]] == [4, 2, 3]
    without = rollout(values=None)
    slime.token_advantages(args, without)
    assert torch.equal(torch.cat(without["advantages"]), torch.cat(data["advantages"]))


@pytest.mark.parametrize(("changed", "words"), [
    ({"rewards": [[1.0], 5.0, 7.0]}, "rewards of answer 0 has 1 tokens, expected 4"),
    ({"kl": [torch.zeros(4), torch.zeros(1), torch.zeros(3)]}, "kl of answer 1 has 1 tokens"),
    ({"values": [torch.zeros(2), torch.zeros(2), torch.zeros(3)]}, "values of answer 0 has 2"),
])
def test_slimes_custom_function_refuses_parts_of_answers(changed, words):
    with pytest.raises(ValueError, match=words):
        slime.token_advantages(SimpleNamespace(kl_coef=0.0, gamma=1.0, lambd=1.0),
                               rollout(**changed))


def test_nemo_rls_gae_is_ours_with_its_numbers_and_comes_back(trainers):
    estimator = trainers.nemo.GeneralizedAdvantageEstimator(0.99, 0.95)
    theirs = trainers.nemo.GeneralizedAdvantageEstimator._compute_gae
    nemo_rl.patch()
    assert trainers.nemo.GeneralizedAdvantageEstimator._compute_gae is nemo_rl.compute_gae
    for case in range(CASES):
        g = torch.Generator().manual_seed(case)
        b, t = 1 + case % 5, 1 + case % 19
        rewards, values = torch.randn(2, b, t, generator=g)
        mask = torch.rand(b, t, generator=g) < (0.0, 0.3, 0.8, 1.1)[case % 4]
        mask = mask.to((torch.bool, torch.int64, torch.float32)[case % 3])
        lam = (None, 0.5, torch.rand(b, generator=g), 1.0)[case // 4 % 4]
        for found, truth in zip(estimator._compute_gae(rewards, values, mask, lam),
                                theirs(estimator, rewards, values, mask, lam), strict=True):
            near(found[mask.bool()], truth[mask.bool()])
            assert found[~mask.bool()].eq(0).all()
    weighted = torch.full((2, 3), 0.5)
    assert torch.equal(estimator._compute_gae(weighted, weighted, weighted)[0],
                       theirs(estimator, weighted, weighted, weighted)[0])
    nemo_rl.unpatch()
    assert trainers.nemo.GeneralizedAdvantageEstimator._compute_gae is theirs


def test_a_moved_parameter_is_one_sentence_and_nothing_is_replaced(trainers):
    def moved(self, rewards, values, mask):
        return None

    trainers.nemo.GeneralizedAdvantageEstimator._compute_gae = moved
    with pytest.raises(PeerError, match=r"_compute_gae takes \(self, rewards, values, mask\), exp"):
        nemo_rl.patch()
    assert trainers.nemo.GeneralizedAdvantageEstimator._compute_gae is moved


PEERS = {"verl": (verl, "0.7.0"), "openrlhf": (openrlhf, "0.9.1"), "slime": (slime, "0.1.0"),
         "nemo_rl": (nemo_rl, "0.3.0")}
EXAMPLES = Path(__file__).parent.parent / "examples/integrations"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """Makes a trainer of another version: installed, with its metadata, or run from its sources."""
    made = []

    def make(name, version, installed):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
        if installed:
            distribution = name.replace("_", "-")
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        made.append(importlib.import_module(name).__name__)

    yield make
    for name in made:
        del sys.modules[name]


@pytest.mark.parametrize("name", PEERS)
def test_an_absent_trainer_is_one_sentence(name):
    integration, _ = PEERS[name]
    with pytest.raises(PeerError) as caught:
        integration.patch()
    assert str(caught.value).startswith(f"{name} is not installed, expected ")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None
    integration.unpatch()  # nothing is replaced, and nothing is said


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("name", PEERS)
def test_another_version_is_one_sentence(name, installed, old):
    integration, version = PEERS[name]
    old(name, version, installed)
    with pytest.raises(PeerError) as caught:
        integration.patch()
    text = str(caught.value)
    assert text.startswith(f"{name} {version} is installed, expected ") and "\n" not in text


@pytest.mark.parametrize("name", PEERS)
def test_an_example_ends_with_that_sentence(name, old, monkeypatch):
    """Absent, and of another version: what `sys.exit` gets is what stands on stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", "their_script.py"])
    for words in ("is not installed, expected ", f"{PEERS[name][1]} is installed, expected "):
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(EXAMPLES / name / "train.py"), run_name="__main__")
        assert str(caught.value.code).startswith(f"{name} {words}")
        assert "\n" not in str(caught.value.code)
        if "not" in words:
            old(name, PEERS[name][1], installed=True)


def test_the_command_line_of_an_example_says_nothing_else():
    done = subprocess.run([sys.executable, EXAMPLES / "verl/train.py", "--config-name=one_gpu"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("verl is not installed, expected verl>=0.9.1,<0.10")
    assert done.stderr.count("\n") == 1


def test_a_plugin_of_a_trainer_it_does_not_know_tells_it_and_goes_on(old, capsys):
    """verl's entry point: an error in it would be hidden by verl, at its level DEBUG."""
    old("verl", "0.7.0", installed=True)
    verl._peer.patch_when_imported(verl.VERSIONS, {"verl": verl._PARTS[verl._ALGOS]})
    told = capsys.readouterr().err
    assert told.startswith("tppo_kernels in verl: nothing is replaced: verl 0.7.0 is installed")
    assert told.count("\n") == 1


def test_the_self_check_imports_trainers_on_request_alone(trainers, capsys, monkeypatch):
    """Of those that are here, and a name that has moved is the exit status."""
    from tppo_kernels import __main__ as check

    monkeypatch.setattr(check, "self_test", lambda: [])
    monkeypatch.setattr(_peer, "PEERS", {n: _peer.PEERS[n] for n in ("slime", "nemo_rl")})

    def told(*arguments):
        status = check.main([*arguments, "--json"])
        found = json.loads(capsys.readouterr().out)["trainers"]
        assert check.main([*arguments]) == status
        text = capsys.readouterr().out
        assert all(each["why"] in text for each in found if each["why"])
        return status, [each["state"] for each in found], text

    assert told()[:2] == (0, ["known version", "known version"])
    status, states, text = told("--probe")
    assert (status, states) == (0, ["works", "works"])
    assert "nemo_rl   0.6.0 is installed, within >=0.5,<1, and its interface is the one" in text
    del trainers.nemo.GeneralizedAdvantageEstimator._compute_gae
    status, states, text = told("--probe")
    assert (status, states) == (1, ["works", "fails"])
    assert "self-test: FAILED: the integration of nemo_rl" in text
    assert "nemo_rl 0.6.0 has no nemo_rl.algorithms.advantage_estimator:Generalized" in text


def test_a_process_of_ray_tells_of_a_trainer_it_does_not_know_and_goes_on(trainers):
    """What Ray calls in a new process must not raise: the process would not start."""
    (trainers.path / "slime/__init__.py").write_text("__version__ = '9.0'\n")
    done = subprocess.run(
        [sys.executable, "-c", "from tppo_kernels.integrations.slime import *\n"
         "patch_when_imported()\nimport slime, slime.loss\nprint('goes on')"],
        cwd=trainers.path, capture_output=True, text=True)
    assert done.stdout == "goes on\n", done.stderr
    assert done.stderr.startswith("tppo_kernels in slime: nothing is replaced: slime 9.0 is inst")
