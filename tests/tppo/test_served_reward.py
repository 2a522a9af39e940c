"""The token reward model behind a server: the same rewards, and what a server may do wrong.

The server is a real one, over the same transformers model; tests/interop/test_vllm_reward.py has
vLLM itself.
"""

import json
import shutil
import threading
import time

import exported
import pytest
import torch
from reward_server import RewardServer, decoded, encoded, error

import tppo
from tppo.errors import DataError
from tppo.labels.endpoint import retry
from tppo.models.batch import Batch
from tppo.models.load import load_reward_model
from tppo.models.own_tokens import load_own_tokenizer
from tppo.models.policy import RewardModel
from tppo.models.probe import FILE, write_probe
from tppo.models.tokenizer import train_tokenizer
from tppo.rewards import Answers
from tppo.rewards.server import RewardServerError
from tppo.stages.artifacts import POLICY, REWARD_MODEL
from tppo_kernels.integrations._reward_model import TokenRewardModel

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return exported.export(tmp_path_factory.mktemp("served") / "run")


@pytest.fixture(scope="module")
def folder(run):
    return run / REWARD_MODEL.path


@pytest.fixture
def server(folder):
    with RewardServer(folder) as found:
        yield found


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(retry, "MOST_WAIT_S", 0.05)


def answers(folder, n=40, seed=0):
    """Answers of random tokens, four to a prompt, as a batch and as a reward sees them."""
    tokenizer, g = load_own_tokenizer(folder), torch.Generator().manual_seed(seed)

    def ids(most):
        return torch.randint(3, len(tokenizer), (int(torch.randint(1, most, (), generator=g)),),
                             generator=g).tolist()

    prompts = [ids(60) for _ in range(n // 4)]
    prompts, responses = [prompts[i // 4] for i in range(n)], [ids(24) for _ in range(n)]
    columns = {"suggested_length": [float(4 + i % 9) for i in range(n)]}
    given = Answers(prompts, responses, columns, tokenizer, [2], [i // 4 for i in range(n)])
    return Batch(prompts, responses, 0), given


def local(folder, **options):
    return tppo.TokenModelReward(RewardModel(load_reward_model(folder, CPU)), **options)


def config(server, **changes):
    return tppo.RewardServerConfig(base_url=server.url, **{"max_retries": 4, **changes})


@pytest.mark.parametrize("options", [{}, {"mode": "argmax", "length_alpha": None},
                                     {"values": (0.0, 1.0, 2.0)}])  # fmt: skip
def test_served_rewards_are_the_local_ones(folder, server, options):
    batch, given = answers(folder)
    own, found = local(folder, **options), tppo.ServedReward(config(server), folder, **options)
    expected, paid = own(batch, given), found(batch, given)
    assert expected.rewards[batch.mask].std() > 0.05
    assert len(expected.category[batch.mask].unique()) == 3
    torch.testing.assert_close(paid.rewards, expected.rewards, atol=1e-5, rtol=0)
    assert torch.equal(paid.category, expected.category)
    assert not paid.rewards[~batch.mask].any()


def test_requests_are_of_ids_in_parts_and_carry_the_short_text(folder, server):
    batch, given = answers(folder)
    reward = tppo.ServedReward(config(server, max_tokens=200), folder)
    whole = tppo.ServedReward(config(server), folder)(batch, given).rewards
    server.requests.clear()
    connections = server.connections
    torch.testing.assert_close(reward(batch, given).rewards, whole, atol=1e-5, rtol=0)
    asked = [request["input"] for path, request, _ in server.requests if path == "/pooling"]
    assert len(asked) > 5 and all(sum(map(len, rows[1:])) <= 200 for rows in asked)
    assert 1 <= server.connections - connections <= reward.server.config.concurrency < len(asked)
    assert {tuple(rows[0]) for rows in asked} == {tuple(reward.server.probe.ids)}
    sent = sorted(row for rows in asked for row in rows[1:])
    pairs = zip(batch.prompt_ids, batch.response_ids, strict=True)
    assert sent == sorted([*prompt, *response] for prompt, response in pairs)


def test_workers_of_other_trainers_get_what_the_exported_model_gives_them(folder, server):
    batch, given = answers(folder)
    responses = [[], *batch.response_ids[1:]]  # SkyRL has empty ones
    masks = [[int(t % 3 > 0) for t in range(len(ids))] for ids in responses]
    lengths = given.columns["suggested_length"]
    own, served = TokenRewardModel(folder, device="cpu"), tppo.ServedReward(server.url, folder)
    for further in ((), (masks,), (masks, lengths)):
        expected = own.rewards(batch.prompt_ids, responses, *further)
        found = served.rewards(batch.prompt_ids, responses, *further)
        assert found[0] == []
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    assert expected[1][0] == 0.0 != expected[1][1]


def test_nobody_at_the_address_is_one_sentence_with_the_command(folder, server):
    server.close()
    start = time.perf_counter()
    with pytest.raises(RewardServerError, match="cannot be reached.*, once; this starts one: "
                       "python -m vllm.entrypoints.openai.api_server --model"):  # fmt: skip
        tppo.ServedReward(server.url, folder)
    assert time.perf_counter() - start < 5  # it does not wait for a server as a training does


def other_model(folder, place):
    """The same model with other weights, its own probe beside it."""
    torch.manual_seed(11)
    model = load_reward_model(folder, CPU)
    torch.nn.init.normal_(model.score.weight)
    shutil.copytree(folder, place)
    model.save_pretrained(place)
    write_probe(model, load_own_tokenizer(place), place)
    return place


def with_vocabulary_of(folder, place):
    """A model of the same sizes whose tokenizer splits other words."""
    shutil.copytree(folder, place)
    words = ["zebra quartz onyx"] * 50 + ["umber plinth gnome", "yonder wharf vivid"] * 40
    train_tokenizer(words, 400).save_pretrained(place)
    return place


@pytest.mark.parametrize(("kind", "said"), [
    (other_model, "not the reward model of .*it has other weights"),
    (with_vocabulary_of, "it has another tokenizer than"),
])  # fmt: skip
def test_another_model_or_tokenizer_is_refused_before_the_first_step(folder, tmp_path, kind, said):
    with (
        RewardServer(kind(folder, tmp_path / "other")) as server,
        pytest.raises(RewardServerError, match=said),
    ):
        tppo.ServedReward(server.url, folder)


def changed(change):
    """A spoiled server: `change(table, i)` of the class logits of row i."""

    def spoil(request, reply):
        if "input" in request and reply[0] == 200:
            for one in reply[2]["data"]:
                one["data"] = encoded(change(decoded(one["data"]), one["index"]))
        return reply

    return spoil


def in_body(change):
    def spoil(request, reply):
        if "input" in request:
            change(reply[2])
        return reply

    return spoil


@pytest.mark.parametrize(("spoil", "said"), [
    (changed(lambda table, i: table.softmax(-1)), "gives probabilities where class logits"),
    (changed(lambda table, i: table[:, :2]), "2 numbers for each of .* expected 3: none"),
    (changed(lambda table, i: table[:-1]), "numbers for each of .* tokens, expected 3"),
    (changed(lambda table, i: table * torch.nan), "not the reward model"),
    (in_body(lambda body: body["data"].pop()), "0 entries in `data`, expected 1"),
    (in_body(lambda body: body.pop("data")), "no list in `data`"),
    (in_body(lambda body: body["data"][0].update(data=[[0.1] * 3])), "no base64 text"),
    (lambda request, reply: (200, {}, b"<html>"), "no JSON object"),
    (lambda request, reply: error(404), "HTTP 404 .*no such path, or no model 'rm';"),
    (lambda request, reply: error(400, "BadRequestError", "task"), "HTTP 400"),
    (lambda request, reply: error(401, "invalid_api_key"), "HTTP 401.*the key"),
])  # fmt: skip
def test_what_is_no_such_server_is_refused_at_the_start(folder, spoil, said):
    with RewardServer(folder, spoil) as server:
        with pytest.raises(RewardServerError, match=said) as found:
            tppo.ServedReward(server.url, folder)
        assert "the words of a user" not in str(found.value)  # of an error's text, nothing


def test_the_name_is_needed_where_there_are_several_models(folder):
    with RewardServer(folder, names=("one", "two")) as server:
        with pytest.raises(RewardServerError, match="2 models, expected --reward-server.name to "
                           "be one of one, two"):  # fmt: skip
            tppo.ServedReward(server.url, folder)
        with pytest.raises(RewardServerError, match="no model 'three'"):
            tppo.ServedReward(config(server, name="three"), folder)
        assert tppo.ServedReward(config(server, name="two"), folder).server.served.name == "two"


def test_a_key_is_sent_and_never_said(folder, monkeypatch):
    monkeypatch.setenv("RM_KEY", "sk-0123456789abcdef")
    with RewardServer(folder) as server:
        tppo.ServedReward(config(server, api_key_env="RM_KEY"), folder)
        assert {key for _, _, key in server.requests} == {"Bearer sk-0123456789abcdef"}
        server.spoil = lambda request, reply: error(401, "invalid_api_key")
        with pytest.raises(RewardServerError) as found:
            tppo.ServedReward(config(server, api_key_env="RM_KEY"), folder)
    assert "0123456789" not in str(found.value) and "RM_KEY" in str(found.value)


@pytest.mark.parametrize(("url", "said"), [
    ("", "base_url was ''"), ("ftp://x", "base_url"), ("http://me:secret@x", "credentials"),
])  # fmt: skip
def test_an_address_that_cannot_be_is_refused(folder, url, said):
    with pytest.raises(DataError, match=said) as found:
        tppo.ServedReward(url, folder)
    assert "secret" not in str(found.value)


def test_a_folder_without_the_short_text_is_refused(folder, server, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / FILE).unlink()
    with pytest.raises(DataError, match=f"{FILE}: no such file, expected what the reward model"):
        tppo.ServedReward(server.url, tmp_path / "m")
    short = {"text": "a", "ids": [1, 2], "logits": [[1, 2, 3]], "own_tokens": False}
    (tmp_path / "m" / FILE).write_text(json.dumps(short))
    with pytest.raises(DataError, match="2 ids and 1 rows of logits"):
        tppo.ServedReward(server.url, tmp_path / "m")
    (tmp_path / "m" / FILE).write_text(json.dumps({**short, "ids": [1], "own_tokens": True}))
    with pytest.raises(DataError, match="reads text with a tokenizer of its own"):
        tppo.ServedReward(server.url, tmp_path / "m")


def test_a_policy_with_other_tokens_is_refused(folder, server, tmp_path):
    other = load_own_tokenizer(with_vocabulary_of(folder, tmp_path / "other"))
    batch, given = answers(folder)
    reward = tppo.ServedReward(server.url, folder)
    given = Answers(given.prompts, given.response_ids, given.columns, other, [2], given.groups)
    with pytest.raises(DataError, match="is not the policy's"):
        reward(batch, given)


def test_answers_that_the_server_cannot_read_are_refused_before_they_are_sent(folder):
    batch, given = answers(folder)
    with RewardServer(folder, longest=60) as server:
        reward = tppo.ServedReward(server.url, folder)
        server.requests.clear()
        with pytest.raises(DataError, match=r"reads at most 60 tokens, .* --max-model-len \d+"):
            reward(batch, given)
        assert not server.requests


class Failing:
    """The first replies after `begin` are those given, the others are right."""

    def __init__(self, *replies):
        self.replies, self.left = replies, []

    def begin(self):
        self.left = list(self.replies)

    def __call__(self, request, reply):
        return self.left.pop(0) if self.left else reply


@pytest.mark.parametrize("replies", [
    [error(500), error(503), error(429)],
    [(429, {"Retry-After": "0.05"}, {}), None],
    [(200, {}, b'{"data": [')],
    [error(401)],
])  # fmt: skip
def test_what_passes_is_tried_again_and_costs_nothing(folder, replies, capsys):
    failing = Failing(*replies)
    with RewardServer(folder, failing) as server:
        batch, given = answers(folder)
        reward = tppo.ServedReward(config(server), folder)
        failing.begin()
        paid = reward(batch, given)
    assert not failing.left
    torch.testing.assert_close(paid.rewards, local(folder)(batch, given).rewards, atol=1e-5, rtol=0)
    told = capsys.readouterr()
    assert (told.out + told.err).count("tried again") == 1
    assert (told.out + told.err).count("answers again") == 1


@pytest.mark.parametrize(("spoil", "said"), [
    (changed(lambda table, i: table if i == 0 else table.fill_(torch.nan)),
     "class logits of answer 0 are not finite"),
    (changed(lambda table, i: table * 1.01), "off by 1.0e-02 .relative., expected < 1e-03"),
    # Started again by another name.
    (lambda request, reply: error(404), "HTTP 404 from .*: no such path, or no model 'rm';"),
    (lambda request, reply: error(500), "HTTP 500.*, 5 times"),
    (lambda request, reply: (429, {"Retry-After": "900"}, {}), "asks to wait 900 s"),
])  # fmt: skip
def test_what_does_not_pass_ends_the_training_by_its_name(folder, spoil, said):
    with RewardServer(folder) as server:
        batch, given = answers(folder)
        reward = tppo.ServedReward(config(server), folder)
        server.spoil = spoil
        with pytest.raises(RewardServerError, match=said):
            reward(batch, given)


def test_a_server_that_comes_back_with_another_model_pays_nothing(folder, tmp_path):
    other = other_model(folder, tmp_path / "other")
    batch, given = answers(folder)
    with RewardServer(folder) as server:
        reward = tppo.ServedReward(config(server), folder)
        port = server.port
    with (
        RewardServer(other, port=port),
        pytest.raises(RewardServerError, match="it has other weights"),
    ):
        reward(batch, given)


def test_sixteen_bits_at_the_server_are_said(folder, capsys):
    rounded = changed(lambda table, i: table.bfloat16().float())
    with RewardServer(folder, rounded) as server:
        batch, given = answers(folder)
        reward = tppo.ServedReward(server.url, folder)
        error = (reward(batch, given).rewards - local(folder)(batch, given).rewards).abs().max()
    told = capsys.readouterr()
    assert "as those of 16-bit weights are" in told.out + told.err
    assert 1e-4 < error < 0.02


def trained(run, out, reward, longest=12):
    prompts = [{"prompt": f"search: {word} {n}\nnext 2:\n", "suggested_length": 6.0}
               for word in ("red shoes", "tea", "lamp") for n in range(4)]  # fmt: skip
    trainer = tppo.PPOTrainer(
        run / POLICY.path, reward=reward, prompts=prompts, out=out, device="cpu",
        config=tppo.PPOConfig(steps=3, batch_size=4, responses_per_prompt=2, minibatch_size=4,
                              kl_coef=0.1, checkpoint_every=1),
        generate=tppo.GenerateConfig(max_new_tokens=longest),
    )  # fmt: skip
    trainer.train()
    return trainer


FIGURES = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "val/ratio")


def test_a_server_that_dies_and_comes_back_costs_no_step_and_no_reward(run, folder, tmp_path):
    expected = trained(run, tmp_path / "local", local(folder))
    server, later = RewardServer(folder), []

    class Dying:
        """Dies with the request of the second step on its way, and comes back a while later."""

        left = 1  # requests that are still answered

        def __call__(self, request, reply):
            self.left -= 1
            if self.left:
                return reply

            def again():
                server.close()
                time.sleep(0.4)
                later.append(RewardServer(folder, port=server.port))

            threading.Thread(target=again).start()
            return None

    reward = tppo.ServedReward(config(server, max_retries=30), folder)
    server.spoil = Dying()
    server.spoil.left = 2
    found = trained(run, tmp_path / "served", reward)
    later[0].close()
    assert server.spoil.left == 0 and len(later[0].requests) >= 2
    assert len(found.metrics) == len(expected.metrics) == 3
    for one, other in zip(found.metrics, expected.metrics, strict=True):
        for name in FIGURES:
            assert one[name] == pytest.approx(other[name], abs=2e-5), name
    scores = [row["objective/scores"] for row in expected.metrics]
    assert max(scores) - min(scores) > 0.01  # not all alike


def test_the_trainer_refuses_before_it_samples(run, folder, tmp_path):
    with RewardServer(folder, longest=50) as server, pytest.raises(DataError, match="at most 50"):
        trained(run, tmp_path / "short", tppo.ServedReward(server.url, folder), longest=60)
    assert not (tmp_path / "short").exists()


def test_a_training_knows_the_model_and_not_the_address(folder, tmp_path):
    with RewardServer(folder) as one, RewardServer(folder) as two:
        shown = {repr(tppo.ServedReward(server.url, folder)) for server in (one, two)}
    other = other_model(folder, tmp_path / "other")
    with RewardServer(other) as server:
        shown.add(repr(tppo.ServedReward(server.url, other)))
    assert len(shown) == 2
