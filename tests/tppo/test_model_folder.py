"""Folders of models: no code of theirs runs, and what is written stops where rollouts stop."""

import io
import json
import pickle
import sys

import pytest
import torch
from _weights import enlarged
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
)

from tppo.cli import main
from tppo.models.batch import Batch
from tppo.models.config import ScratchConfig
from tppo.models.folder import folder_eos_ids, model_eos_ids, save_model
from tppo.models.load import load_policy, load_reward_model
from tppo.models.own_tokens import load_frozen, start_reward_model
from tppo.models.policy import new_policy
from tppo.models.rollout import HFRollout, Sampling
from tppo.models.tokenizer import decode, load_tokenizer, token_offsets, train_tokenizer
from tppo.sessions.prompts import encode_answer

CPU = torch.device("cpu")
PROMPTS = [[70, 80, 90]] * 12 + [[100, 110]] * 12 + [[120]] * 12


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["red shoes\nblue hat", "search: boots!"] * 4, 280)


def write(path, tokenizer, generation=None, eos=None, weights="safetensors", **config):
    """A folder as a user has it: a tokenizer and a small random model, two words likely to end.

    generation: content of its generation_config.json, None for no such file.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=128, bos_token_id=1,
            eos_token_id=eos, pad_token_id=0,
        )
    )  # fmt: skip
    enlarged(model).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    if config:
        change(path / "config.json", **config)
    if weights == "pickle":
        (path / "model.safetensors").unlink()
    return path


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def ids_of(tokenizer, *texts):
    return [tokenizer.convert_tokens_to_ids(text) for text in texts]


def rollouts(model, tokenizer, length=60, seed=3, prefix="dense", **options):
    options = {"eos_id": model_eos_ids(tokenizer, model)} | options
    engine = HFRollout(model, pad_id=tokenizer.pad_token_id, prefix=prefix, **options)
    return engine.generate(PROMPTS, Sampling(length, seed=seed))


def plainly_generated(folder, prompts, seed=3):
    """What transformers alone samples from a folder, its filler cut off."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    width = max(map(len, prompts))
    rows = [[0] * (width - len(p)) + p for p in prompts]
    real = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=torch.tensor(rows), attention_mask=torch.tensor(real), max_new_tokens=60,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        no_repeat_ngram_size=0, pad_token_id=0,
    )  # fmt: skip
    rows = [row[width:] for row in output.tolist()]
    return [row[: max(i for i, token in enumerate(row, 1) if token)] for row in rows]


# What the folder says of ends -> what its export's generation config says; 2 is the tokenizer's.
ENDS = {
    "a list": ({"eos_token_id": [2, 77, 88]}, None, [2, 77, 88]),
    "one id": ({"eos_token_id": 2, "pad_token_id": 0}, None, 2),
    "another than the tokenizer's": ({"eos_token_id": 77}, None, [77, 2]),
    "none, but config.json does": ({"max_length": 90}, [77, 88], [2, 77, 88]),
    "no file": (None, [88, 2], [88, 2]),
    "nothing at all": (None, None, 2),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_export_stops_where_rollouts_stop(case, tokenizer, tmp_path):
    generation, eos, written = ENDS[case]
    given = write(tmp_path / "given", tokenizer, generation, eos)
    model, own = load_policy(given, CPU), load_tokenizer(given)
    found = rollouts(model, own)
    save_model(model, own, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == written
    ends = {written} if isinstance(written, int) else {*written}
    assert {row[-1] for row in found.response_ids} >= ends  # each of them ends some answer
    order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    plain = plainly_generated(tmp_path / "out", [PROMPTS[i] for i in order])
    assert plain == [found.response_ids[i] for i in order]
    assert folder_eos_ids(tmp_path / "out", own) == model_eos_ids(own, model)


def test_a_model_from_scratch_is_exported_with_all_its_ids(tokenizer, tmp_path):
    sizes = ScratchConfig(hidden_size=16, intermediate_size=32, layers=1, heads=2)
    save_model(new_policy(sizes, tokenizer), tokenizer, tmp_path / "sft")
    save_model(load_policy(tmp_path / "sft", CPU), tokenizer, tmp_path / "train")
    for name in ("sft", "train"):
        kept = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert (kept["pad_token_id"], kept["bos_token_id"], kept["eos_token_id"]) == (0, 1, 2)


AUTHORS = {
    "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.4,
    "max_length": 100, "eos_token_id": [2, 77], "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("eos", [[2, 77], 77])
@pytest.mark.parametrize("sampled", [True, False])
def test_the_authors_settings_are_kept(sampled, eos, tokenizer, tmp_path):
    """Without `do_sample` transformers reads a temperature with a warning and refuses to save."""
    settings = AUTHORS | {"eos_token_id": eos, "do_sample": sampled}
    given = write(tmp_path / "given", tokenizer, settings)
    save_model(load_policy(given, CPU), load_tokenizer(given), tmp_path / "sft")
    again = load_policy(tmp_path / "sft", CPU)
    save_model(again, load_tokenizer(tmp_path / "sft"), tmp_path / "train")
    assert again.generation_config.temperature == 0.6  # saving leaves the model as it was
    for name in ("sft", "train"):
        kept = json.loads((tmp_path / name / "generation_config.json").read_text())
        kept.pop("transformers_version")
        assert kept == settings | {"eos_token_id": [2, 77] if eos != 77 else [77, 2]}


SETTINGS = [
    {"do_sample": True, "top_k": 1}, {"repetition_penalty": 5.0}, {"suppress_tokens": [60, 61, 70]},
    {"min_new_tokens": 40}, {"no_repeat_ngram_size": 1}, {"forced_eos_token_id": 9},
    {"bad_words_ids": [[60], [70]]}, {"max_length": 9}, {"temperature": 0.1}, {"num_beams": 3},
    {"begin_suppress_tokens": [60, 61, 62]}, {"exponential_decay_length_penalty": [2, 9.0]},
    {"renormalize_logits": True, "typical_p": 0.2}, {"sequence_bias": [[[60], 9.0]]},
]  # fmt: skip


@pytest.mark.parametrize("prefix", ["shared", "dense"])
def test_no_setting_of_the_folder_bends_the_rollouts(prefix, tokenizer, tmp_path):
    model = load_policy(write(tmp_path, tokenizer), CPU)
    plain = rollouts(model, tokenizer, 24, prefix=prefix)
    assert len({tuple(row) for row in plain.response_ids}) == len(PROMPTS)
    for settings in SETTINGS:
        own = model.generation_config.__class__(**settings)
        model.generation_config = own
        assert rollouts(model, tokenizer, 24, prefix=prefix) == plain, settings
        assert model.generation_config is own


def test_the_models_settings_are_back_after_a_failure(tokenizer, tmp_path):
    model = load_policy(write(tmp_path, tokenizer, AUTHORS), CPU)
    with pytest.raises(IndexError):  # there is no such token
        HFRollout(model, pad_id=0, eos_id=2).generate([[5, 10**6]], Sampling(4))
    assert model.generation_config.top_k == 20


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_none_is_is_refused(temperature):
    """A negative one took the likeliest token, as 0 does."""
    with pytest.raises(ValueError, match="temperature was .*expected a finite one of at least 0"):
        Sampling(4, temperature=temperature)


BROKEN = {
    "Expecting value": "not json",
    "it holds a list": "[]",
    "num_return_sequences": '{"num_return_sequences": 2}',
    "cache_implementation": '{"cache_implementation": "none such"}',
    "eos_token_id is 'two'": '{"eos_token_id": "two"}',
    r"eos_token_id is \[2, None\]": '{"eos_token_id": [2, null]}',
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_generation_config_is_named(message, tokenizer, tmp_path):
    given = write(tmp_path, tokenizer)
    (given / "generation_config.json").write_text(BROKEN[message])
    with pytest.raises(ValueError, match=rf"generation_config.json: .*{message}.* correct the"):
        load_policy(given, CPU)


@pytest.mark.parametrize("prefix", ["shared", "dense"])
@pytest.mark.parametrize("pad_id", [0, 77])
def test_any_of_several_ids_ends_an_answer(prefix, pad_id, tokenizer, tmp_path):
    """Also where the filler is one of them: an answer ends at the first, and keeps it."""
    model = load_policy(write(tmp_path, tokenizer), CPU)
    ends = [2, 77, 88, 99]
    engine = HFRollout(model, pad_id=pad_id, eos_id=ends, prefix=prefix)
    found = engine.generate(PROMPTS, Sampling(60, seed=3))
    never = HFRollout(model, pad_id=0, eos_id=[], prefix=prefix)
    whole = never.generate(PROMPTS, Sampling(60, seed=3))
    assert set(whole.finish) == {"length"}
    for row, uncut, reason in zip(
        found.response_ids, whole.response_ids, found.finish, strict=True
    ):
        at = next((i for i, token in enumerate(uncut) if token in ends), None)
        assert row == (uncut if at is None else uncut[: at + 1])
        assert reason == ("length" if at is None else "eos")
    assert {row[-1] for row in found.response_ids} > {*ends}  # and some are cut
    batch = Batch(PROMPTS, found.response_ids, pad_id, prefix=prefix)
    assert batch.mask.sum(1).tolist() == [*map(len, found.response_ids)]


def test_the_end_of_an_answer_has_no_text(tokenizer):
    """Also where it is a word like any other to the tokenizer."""
    answer = tokenizer.encode("red boots!", add_special_tokens=False)
    bang = answer[-1]
    assert decode(tokenizer, answer) == "red boots!"
    assert decode(tokenizer, answer, [2, bang]) == "red boots"
    assert decode(tokenizer, [bang, *answer], [2, bang]) == "!red boots"
    text, spans = token_offsets(tokenizer, answer, [2, bang])
    assert text == "red boots" and spans[-1] == (9, 9) and spans[-2][1] == 9
    assert token_offsets(tokenizer, [bang], [bang]) == ("", [(0, 0)])
    assert token_offsets(tokenizer, answer[:-1] + [2], [2, bang])[1] == spans
    assert decode(tokenizer, [], [bang]) == ""


def test_a_tokenizer_without_an_end_takes_that_of_the_folder(tokenizer, tmp_path):
    given = write(tmp_path, tokenizer, {"eos_token_id": [88, 77]})
    bare = AutoTokenizer.from_pretrained(given)
    bare.eos_token = None
    bare.save_pretrained(given)
    loaded = load_tokenizer(given)
    assert loaded.eos_token_id == encode_answer(loaded, ["red"])[-1] == 88
    assert len(loaded) == len(tokenizer)
    change(given / "generation_config.json", eos_token_id=None)
    change(given / "config.json", eos_token_id=[77])
    assert load_tokenizer(given).eos_token_id == 77


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A run folder whose sessions are read."""
    out = tmp_path_factory.mktemp("run") / "out"
    main(["data", "--out", str(out), "--sessions.train-users", "24", "--sessions.test-users", "2"])
    return out


def test_a_separator_that_ends_the_answer_is_refused(tokenizer, log, tmp_path):
    line_break = tokenizer.encode("\n", add_special_tokens=False)
    given = write(tmp_path, tokenizer, {"eos_token_id": [2, *line_break]})
    with pytest.raises(SystemExit, match=f"token {line_break[0]}, .* separates its queries"):
        main(["sft", "--out", str(log), "--model", str(given)])


class Marks:
    """An object that leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


MAPS = {
    "model": ("config.json", {"AutoModelForCausalLM": "evil.Evil"}),
    "classifier": ("config.json", {"AutoModelForTokenClassification": "evil.Evil"}),
    "configuration": ("config.json", {"AutoConfig": "evil.Evil"}),
    "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Evil"]}),
}


@pytest.fixture
def evil(tokenizer, tmp_path, monkeypatch):
    """A folder whose code leaves a mark, somebody who answers yes, and no trace afterwards."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(kind, unknown, name="evil folder"):
        path = write(tmp_path / name, tokenizer)
        code = f"open({str(tmp_path / 'mark')!r}, 'w').close()\nclass Evil: pass\n"
        (path / "evil.py").write_text(code)
        (path / "custom_generate").mkdir()
        (path / "custom_generate" / "generate.py").write_text(code)
        file, auto_map = MAPS[kind]
        change(path / file, auto_map=auto_map)
        if unknown:
            change(path / "config.json", model_type="evil")
            change(path / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
        return path

    yield make
    assert not (tmp_path / "mark").exists(), "code of the folder has run"
    assert sys.stdin.tell() == 0, "something was asked on stdin"


def loads(path, tokenizer):
    return {
        "policy": lambda: load_policy(path, CPU),
        "tokenizer": lambda: load_tokenizer(path),
        "reward model": lambda: load_reward_model(path, CPU),
        "reward model to start from": lambda: start_reward_model(path, path, tokenizer, CPU),
        "frozen reward model": lambda: load_frozen(path, tokenizer, CPU),
        "ids": lambda: folder_eos_ids(path),
    }


@pytest.mark.parametrize("kind", MAPS)
def test_no_code_of_a_folder_runs(kind, evil, tokenizer):
    """Where transformers has no class of its own, the folder is refused; else its class serves."""
    path = evil(kind, True)
    refused = []
    for name, load in loads(path, tokenizer).items():
        try:
            load()
        except ValueError as error:
            refused.append(name)
            assert str(path) in str(error) or "evil" in str(error), error
            assert "trust_remote_code=True" not in str(error), error
    assert {"policy", "reward model", "frozen reward model"} <= set(refused)
    path = evil(kind, False, "known")
    for load in loads(path, tokenizer).values():
        load()
    model = load_policy(path, CPU)
    HFRollout(model, pad_id=0, eos_id=2).generate(PROMPTS[:2], Sampling(2))
    save_model(model, load_tokenizer(path), path / "export")
    assert "auto_map" not in (path / "export" / "config.json").read_text()
    assert "auto_map" not in (path / "export" / "tokenizer_config.json").read_text()


def test_the_command_runs_no_code_of_a_folder_and_asks_nothing(evil, log):
    for kind in ("configuration", "tokenizer"):
        path = evil(kind, True, kind)
        with pytest.raises(SystemExit, match="never executed|code of its folder|not a fast one"):
            main(["sft", "--out", str(log), "--model", str(path)])


def test_the_evil_folder_would_run_its_code(evil, tmp_path):
    """The control: with transformers alone, asked and answered yes, the mark is left."""
    path = evil("configuration", True)
    with pytest.raises(Exception, match="Evil"):
        AutoConfig.from_pretrained(path)
    assert (tmp_path / "mark").exists() and sys.stdin.tell() > 0
    (tmp_path / "mark").unlink()
    sys.stdin.seek(0)


def test_a_broken_configuration_is_named(tokenizer, tmp_path):
    path = write(tmp_path, tokenizer)
    (path / "config.json").write_text('{"model_type": "llama"')
    for load in loads(path, tokenizer).values():
        with pytest.raises(ValueError, match="config.json: .*expected a JSON object"):
            load()


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


DAMAGED = {  # what happens to a file of the folder -> what is said of it
    "config.json is a list": lambda p: (p / "config.json").write_text("[]"),
    "config.json is a number": lambda p: (p / "config.json").write_text("3"),
    "config.json is deep": lambda p: (p / "config.json").write_text("[" * 100_000),
    "a size is a text": lambda p: change(p / "config.json", hidden_size="x"),
    "no heads": lambda p: change(p / "config.json", num_attention_heads=0),
    "another size": lambda p: change(p / "config.json", hidden_size=32),
    "an unknown model": lambda p: change(p / "config.json", model_type="nope"),
    "no causal LM": lambda p: change(p / "config.json", model_type="t5"),
    "cut weights": lambda p: cut(p / "model.safetensors"),
    "empty weights": lambda p: (p / "model.safetensors").write_bytes(b""),
    "no weights": lambda p: (p / "model.safetensors").unlink(),
    "tokenizer.json is empty": lambda p: (p / "tokenizer.json").write_text("{}"),
    "tokenizer.json is cut": lambda p: cut(p / "tokenizer.json"),
    "tokenizer_config.json is a list": lambda p: (p / "tokenizer_config.json").write_text("[]"),
    "an end without embedding": lambda p: change(p / "tokenizer_config.json", eos_token="<nope>"),
    "a broken template": lambda p: change(p / "tokenizer_config.json", chat_template="{% for"),
    "a template that refuses": lambda p: change(
        p / "tokenizer_config.json", chat_template="{{ raise_exception('system first') }}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_one_sentence_that_names_it(damage, tokenizer, log, tmp_path):
    """SafetensorError, TypeError, KeyError, IndexError and others ended the command by a trace."""
    path = write(tmp_path / "given", tokenizer)
    DAMAGED[damage](path)
    with pytest.raises(SystemExit) as stopped:
        main(["sft", "--out", str(log), "--model", str(path), "--generate.max-new-tokens", "40"])
    message = str(stopped.value)
    assert message.startswith(f"tppo sft: {path}") and "expected" in message
    assert len(message) < 600 and "\n" not in message


@pytest.mark.parametrize("settings", [
    {"attn_implementation": "someone/kernel"}, {"_attn_implementation": "someone/kernel@v1:run"},
    {"text_config": {"attn_implementation": {"": "someone/kernel"}}},
    {"experts_implementation": "someone/kernel"},
])  # fmt: skip
def test_kernels_of_a_hub_are_refused(settings, tokenizer, tmp_path):
    path = write(tmp_path, tokenizer, **settings)
    for name, load in loads(path, tokenizer).items():
        with pytest.raises(ValueError, match="config.json: .*someone/kernel.* never executed"):
            load()
            raise AssertionError(name)


def test_pickled_weights_are_read_without_their_code(tokenizer, tmp_path):
    path = write(tmp_path / "given", tokenizer, weights="pickle")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Marks(tmp_path / "mark")}, 2))
    with pytest.raises(ValueError, match="given: its weights are a pickle.* expected safetensors"):
        load_policy(path, CPU, pickles=True)
    assert not (tmp_path / "mark").exists()


def test_a_reward_model_needs_no_generation_config(tokenizer, tmp_path):
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2, num_labels=3)  # fmt: skip
    LlamaForTokenClassification(config).save_pretrained(tmp_path)
    load_reward_model(tmp_path, CPU).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "generation_config.json").exists()
