"""Guides of other makes: a model with another tokenizer, and one at an endpoint; through the door,
the command and a run of stages.
"""

import json
from dataclasses import replace

import pytest
import torch
from _weights import enlarged
from safetensors.torch import load_file
from test_door import (  # noqa: F401  # model is a fixture
    CHATS,
    CONFIG,
    PROMPTS,
    TEMPLATE,
    assert_same,
    door,
    model,
    train_through_a_kill,
    weights,
)
from test_lora_run import TINY, stage
from test_mapping import CORPUS, FAMILIES, sampler  # noqa: F401  # a fixture
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("openai", reason="openai is not installed: pip install tppo-kernels[label]")

from test_label_openai import KEY, completion, environment, serving  # noqa: E402, F401

import tppo  # noqa: E402
from tppo.errors import DataError  # noqa: E402
from tppo.methods.rlgf import SKIPPED  # noqa: E402
from tppo.models.guide import TextGuide, Written, behind, whole_characters  # noqa: E402
from tppo.models.rollout import LOST, Sampling  # noqa: E402
from tppo.models.tokenizer import decode, load_tokenizer  # noqa: E402
from tppo.stages.guides import EndpointWriter  # noqa: E402

TEXTS = ["red boots", "boots\ncheap socks", " and socks", "s", "\n", "", "</s> red",
         "naïve 東京 😀"]


# Texts become tokens ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", FAMILIES)
def test_behind_the_learners_tokens_stand_those_of_the_text(kind):
    """Every token of the learner stays, and so does its text; both together are the whole."""
    tokenizer, trainer = FAMILIES[kind]()
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    used = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )
    for start in ("", "red", "red boo", "cheap ", "red boots\n", "red run"):
        ids = used.encode(start, add_special_tokens=False)
        before = decode(used, ids)
        for text in TEXTS:
            found = behind(used, ids, text)
            whole = decode(used, [*ids, *found])
            assert whole.startswith(before) and used.eos_token_id not in found
            alone = decode(used, used.encode(text, add_special_tokens=False))
            if kind != "word-piece" and before and alone == text.lstrip(" "):  # it can be spelled
                assert whole == before + text


def test_half_a_character_is_nobodys_beginning():
    tokenizer, trainer = FAMILIES["byte-level"]()
    tokenizer.train_from_iterator(["a"], trainer)
    used = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    ids = used.encode("ab😀", add_special_tokens=False)
    assert len(ids) == 6
    assert [len(whole_characters(used, ids[:n])) for n in range(7)] == [0, 1, 2, 2, 2, 2, 6]
    shown = []

    def write(prompts, begun, sampling):
        shown.extend(begun)
        return [Written("😀!", True), None]

    guide = TextGuide(write, used, [used.eos_token_id], {(5,): "hat?"})
    found = guide.generate([[5], [5]], Sampling(12), [ids[:4], ids[:1]])
    assert shown == ["ab", "a"] and found.response_ids[0][:2] == ids[:2]
    assert decode(used, found.response_ids[0], [used.eos_token_id]) == "ab😀!"
    assert found.author[0] == [False] * 2 + [True] * 6 and found.finish == ["eos", LOST]


def test_a_guides_text_is_cut_to_the_cap_and_ends_at_an_eos(model):  # noqa: F811
    used = load_tokenizer(model)
    eos = [used.eos_token_id, used.encode("x", add_special_tokens=False)[-1]]
    texts = {"a": Written("red boots and socks", True), "b": Written("red x boots", False),
             "c": Written("", True), "d": Written("", False)}  # fmt: skip
    guide = TextGuide(lambda prompts, *_: [texts[p] for p in prompts], used, eos,
                      {(i,): p for i, p in enumerate(texts, 5)})  # fmt: skip
    found = guide.generate([[5], [6], [7], [8]], Sampling(3))
    assert [len(row) for row in found.response_ids] == [3, 3, 1, 0] or found.finish[1] == "eos"
    assert found.response_ids[2] == [eos[0]] and found.finish[2:] == ["eos", LOST]
    assert found.finish[0] == "length" or found.response_ids[0][-1] in eos
    behind_all = guide.generate([[8]], Sampling(3), [[9]])
    assert behind_all.response_ids == [[9]] and behind_all.finish == ["length"]
    done = guide.generate([[5], [5]], Sampling(3), [[9, eos[0]], [9, 9, 9]])
    assert done.response_ids == [[9, eos[0]], [9, 9, 9]]
    assert done.author == [[False] * 2, [False] * 3]


# The door -----------------------------------------------------------------------------------------
LOLS = {"algorithm": "lols", "rlgf": tppo.RLGFConfig(tau=0.5)}
FLAGS = ("--algorithm", "lols", "--rlgf.tau", "0.5")


@pytest.fixture(scope="module")
def by_lols(model, tmp_path_factory, one_thread):  # noqa: F811  # as the one that is killed
    out = tmp_path_factory.mktemp("lols")
    trainer = door(model, out, **LOLS)
    trainer.train()
    return trainer, out


def test_lols_goes_on_after_a_kill_to_the_same_weights(by_lols, model, tmp_path, monkeypatch):  # noqa: F811
    """Killed by SIGKILL inside a step; both critics and the kinds of steps are as they were."""
    trainer, out = by_lols
    kinds = [row["guide/aggrevated"] for row in trainer.metrics]
    assert set(kinds) == {0.0, 1.0} and len(set(kinds[2:])) == 2
    train_through_a_kill(tmp_path, monkeypatch, "lols_reward", model, CONFIG, *FLAGS)
    assert_same(weights(tmp_path / "o/train/model"), weights(out / "train/model"))
    files = [folder / "train/critic.safetensors" for folder in (tmp_path / "o", out)]
    assert_same(*map(load_file, files))
    assert {name.split(".")[0] for name in load_file(files[0])} == {"trunk", "head"}
    card = (out / "train/model/README.md").read_text()
    assert "token-level PPO (lols), 4 of 4 steps" in card


def test_lora_trains_with_a_guide_and_two_critics(model, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    lora = tppo.AdapterConfig(rank=2)
    config = replace(CONFIG, steps=2)
    one = door(model, tmp_path / "a", config=config, lora=lora, algorithm="ppo++")
    one.train()
    rlgf = tppo.RLGFConfig(tau=1.0)
    two = door(model, tmp_path / "b", config=config, lora=lora, algorithm="lols", rlgf=rlgf)
    two.train()
    kept = [load_file(p / "train/model/adapter_model.safetensors")
            for p in (tmp_path / "a", tmp_path / "b")]  # fmt: skip
    assert_same(*kept)
    assert any(tensor.any() for name, tensor in kept[0].items() if "lora_B" in name)


def other_folder(path, kind):
    """A guide with the tokenizer of another family, and a chat template of its own."""
    torch.manual_seed(3)
    backend, trainer = FAMILIES[kind]()
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    enlarged(LlamaForCausalLM(config), std=0.2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("algorithm", ["ppo++", "aggrevated"])
def test_another_model_guides_by_text(model, tmp_path, algorithm, capfd):  # noqa: F811
    guide = other_folder(tmp_path / "guide", "metaspace")
    trainer = door(model, tmp_path / "out", prompts=CHATS, reward=lambda completions: [
        float(len(text[0]["content"])) for text in completions], guide=guide, algorithm=algorithm,
        config=replace(CONFIG, steps=2))  # fmt: skip
    trainer.train()
    assert "has a tokenizer of its own: it reads the prompts as text" in capfd.readouterr().err
    assert all(0 < row["guide/tokens"] < 1 for row in trainer.metrics)


def test_another_model_with_the_same_tokens_guides_by_ids(model, tmp_path, capfd):  # noqa: F811
    config = replace(CONFIG, steps=1)
    door(model, tmp_path, guide=str(model), algorithm="ppo++", config=config).train()
    assert "tokenizer of its own" not in capfd.readouterr().err


# An endpoint --------------------------------------------------------------------------------------
def at(server, **changes):
    given = {"name": "guide-1", "api_key_env": "TPPO_TEST_KEY", "max_retries": 2, "timeout_s": 20.0}
    return tppo.GuideConfig(base_url=server.url, **given | changes)


def begun_in(request):
    """What an answer is to be gone on behind, None for a whole one."""
    text = request["messages"][-1]["content"]
    return text.split("The beginning:\n")[1] if "The beginning:\n" in text else None


@pytest.mark.parametrize("algorithm", ["ppo++", "aggrevated"])
def test_an_endpoint_guides(model, tmp_path, algorithm):  # noqa: F811
    """It is asked for whole answers, or for what stands behind the learner's text."""
    with serving(lambda request, number: "eel shoes") as server:
        trainer = door(model, tmp_path, guide=at(server, system="Be brief."), algorithm=algorithm)
        trainer.train()
    assert all(row[SKIPPED] == 0 and 0 < row["guide/tokens"] < 1 for row in trainer.metrics)
    asked = [begun_in(request) for request in server.requests]
    assert all(text is None for text in asked) == (algorithm == "ppo++")
    request = server.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert request["messages"][1]["content"].split("\n")[0] in {p["prompt"][:-1] for p in PROMPTS}
    assert request["top_p"] == 0.92 and request["max_tokens"] == 6 and request["model"] == "guide-1"


def test_what_the_guide_says_once_more_is_taken_off(model):  # noqa: F811
    def reply(request, number):
        return (begun_in(request) or "") + " boots"

    with serving(reply) as server:
        found = EndpointWriter(at(server))(["red"] * 2, ["cheap", ""], Sampling(6))
    assert found == [Written(" boots", True), Written(" boots", True)]


def test_an_endpoint_that_dies_is_asked_again_then_the_step_is_skipped(model, tmp_path, capfd):  # noqa: F811
    """Steps 2 and 3 are without a guide: both are counted, and nothing of the others is lost."""
    state = {"failed": 0}

    def reply(request, number):
        if 8 < number <= 8 + 2 * 3:  # three tries of one request end a step
            state["failed"] += 1
            return 503, {}, {}
        return "eel shoes"

    rlgf = tppo.RLGFConfig(beta=1.0)
    with serving(reply) as server:
        guide = at(server, concurrency=1)
        trainer = door(model, tmp_path, guide=guide, algorithm="ppo++", rlgf=rlgf)
        report = trainer.train()
    assert [row[SKIPPED] for row in trainer.metrics] == [0, 1, 1, 0]
    assert state["failed"] == 6 and report["skipped_steps"] == 2
    assert len(server.requests) == 8 + 6 + 8
    assert [row["policy/updates"] for row in trainer.metrics] == [4, 0, 0, 4]
    said = capfd.readouterr().err
    assert said.count("is skipped: the guide gave no answer") == 2
    assert "guide guide-1: HTTP 503" in said and KEY not in said


def test_a_guide_that_stays_away_stops_the_run_and_the_next_call_takes_the_steps(
    model, tmp_path, monkeypatch  # noqa: F811
):
    """To the weights of a run whose guide never was away."""
    broken = {"from": 9}

    def reply(request, number):
        return (503, {}, {}) if number >= broken["from"] else "eel shoes"

    rlgf = tppo.RLGFConfig(beta=1.0, max_skipped=2)
    with serving(reply) as server:
        given = {"guide": at(server, concurrency=1, max_retries=0), "algorithm": "ppo++",
                 "rlgf": rlgf}  # fmt: skip
        trainer = door(model, tmp_path / "a", **given)
        with pytest.raises(RuntimeError, match="2 steps in a row are .*goes on after step 1"):
            trainer.train()
        broken["from"] = 10**6
        trainer.train()
        assert [row[SKIPPED] for row in trainer.metrics] == [0] * 4
        whole = door(model, tmp_path / "b", **given)
        whole.train()
        assert_same(*(weights(tmp_path / f / "train/model") for f in "ab"))
        broken["from"] = 0
        with pytest.raises(RuntimeError, match="no step was taken yet"):
            door(model, tmp_path / "c", **given).train()


WRONG = {
    "no algorithm": ({"guide": "nowhere"}, "guide was GuideConfig.*expected.*algorithm"),
    "no algorithm for a rollout": ({"guide": TextGuide(None, None, [], {})},
                                   "guide was .*expected None with algorithm ppo"),
    "rlgf without an algorithm": ({"rlgf": tppo.RLGFConfig(beta=0.5)}, "rlgf was .*--algorithm"),
    "unknown": ({"algorithm": "ppo+"}, "was 'ppo.', expected .*did you mean 'ppo..'"),
    "no such model": ({"algorithm": "ppo++", "guide": "./nowhere"}, "nowhere: no such file"),
    "a number": ({"algorithm": "ppo++", "guide": 3}, "guide was 3, a int, expected the place"),
    "without a critic": ({"algorithm": "ppo++", "config": replace(CONFIG, advantage="grpo")},
                         "advantage was 'grpo', expected 'gae' with algorithm ppo"),
    "a fitted critic": ({"algorithm": "aggrevated", "config": replace(CONFIG, fit_critic=8)},
                        "fit_critic was 8, expected 0 with algorithm aggrevated"),
    "nothing to learn": ({"algorithm": "lols", "rlgf": tppo.RLGFConfig(beta_aggrevated=0.0)},
                         "beta_aggrevated was 0, expected more with algorithm lols"),
    "no true answers": ({"algorithm": "ppo++", "rlgf": tppo.RLGFConfig(target_nll=0.1)},
                        "the prompts have no column 'target'"),
    "adaptive KL": ({"algorithm": "ppo++", "rlgf": tppo.RLGFConfig(kl_in_reward=False),
                     "config": replace(CONFIG, adaptive_kl=1.0)}, "adaptive_kl was given"),
    "no key": ({"algorithm": "ppo++", "guide": tppo.GuideConfig(
        base_url="http://127.0.0.1:1/v1", name="x", api_key_env="TPPO_NO_KEY")},
        "TPPO_NO_KEY was empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_together_is_refused_before_it_costs(model, tmp_path, name):  # noqa: F811
    given, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        door(model, tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "a", "base_url": "http://h/v1", "name": "m"}, "expected one of them"),
        ({"base_url": "http://h/v1"}, "expected both: the endpoint"),
        ({"revision": "main"}, "expected the id on the hub"),
        ({"top_p": 0.0}, "top_p.*was 0.0, expected more than 0"),
    ],
)
def test_a_guide_that_cannot_be_is_refused(given, said):
    with pytest.raises(DataError, match=said):
        tppo.GuideConfig(**given)


def test_the_true_answers_join_the_loss_and_a_reward_function_may_see_them(model, tmp_path):  # noqa: F811
    prompts = [row | {"target": f"{row['prompt'][:-1]} eel"} for row in PROMPTS]
    trainer = door(model, tmp_path, prompts=prompts, algorithm="ppo++",
                   rlgf=tppo.RLGFConfig(target_nll=1.0),
                   config=replace(CONFIG, steps=3))  # fmt: skip
    trainer.train()
    first, *_, last = (row["loss/target_nll"] for row in trainer.metrics)
    assert last < first
    rows = (tmp_path / "train/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[2])["loss/target_nll"] == last


def test_a_run_of_stages_trains_with_a_guide(tmp_path, capfd):
    """Its manifest says with which; one without does not know of any."""
    settings = {name: value for name, value in TINY.items() if name != "lora"}
    config, out = tmp_path / "tiny.json", tmp_path / "out"
    config.write_text(json.dumps(settings))
    for name in ("data", "sft", "generate", "label", "map", "train-rm"):
        stage(name, out, config)
    stage("train", out, config, "--algorithm", "lols", "--rlgf.target-nll", "0.1")
    first = json.loads((out / "train/manifest.json").read_text())["config"]
    assert first["algorithm"] == "lols" and first["rlgf"]["target_nll"] == 0.1
    assert "max_skipped" not in first["rlgf"] and "base_url" not in first["guide"]
    lines = (out / "train/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss/target_nll"] > 0 for line in lines)
    stage("train", out, config, "--algorithm", "ppo++", "--guide.model", str(out / "sft/model"))
    assert "guide/tokens" in (out / "train/metrics.jsonl").read_text()
    stage("train", out, config)
    assert not {"algorithm", "rlgf", "guide"} & json.loads(
        (out / "train/manifest.json").read_text())["config"].keys()  # fmt: skip
    with pytest.raises(SystemExit):
        stage("train", out, config, "--rlgf.beta", "0.5")
    assert "expected the defaults with algorithm ppo, which has no" in capfd.readouterr().err
