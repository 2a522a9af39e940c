"""Models from a hub's cache, a GGUF file, pickles and adapters; the type of weights and exports."""

import json
import shutil
import struct

import gguf
import pytest
import torch
from _weights import enlarged
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from tppo.cli import main
from tppo.models.card import base_of, write_card
from tppo.models.folder import save_model, save_weights
from tppo.models.hub import locate
from tppo.models.load import compute_dtype, load_policy, load_reward_model
from tppo.models.tokenizer import load_tokenizer, train_tokenizer
from tppo.store.run_folder import RunFolder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
COMMITS = ["a" * 40, "b" * 40]
SMALL = ["--sft.max-steps", "1", "--sft.batch-size", "4", "--generate.max-new-tokens", "40"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["red shoes\nblue hat", "search: boots!"] * 4, 280)


def small(tokenizer, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1,
             "max_position_embeddings": 512}  # fmt: skip
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes | ids | options)
    return enlarged(LlamaForCausalLM(config))


def write(path, tokenizer, dtype=F32, **options):
    """A folder as a user has it."""
    small(tokenizer, **options).to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A run folder whose sessions are read."""
    out = tmp_path_factory.mktemp("run") / "out"
    main(["data", "--out", str(out), "--sessions.train-users", "24", "--sessions.test-users", "2"])
    return out


@pytest.fixture
def cache(tokenizer, tmp_path, monkeypatch):
    """A hub's cache with two commits of own/tiny, main and old, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--own--tiny"
    for commit, branch in zip(COMMITS, ("main", "old"), strict=True):
        write(root / "snapshots" / commit, tokenizer)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / branch).write_text(commit)
    return root


def test_an_id_of_a_hub_is_the_folder_of_its_commit(cache):
    assert locate("own/tiny") == cache / "snapshots" / COMMITS[0]
    assert locate("own/tiny", "old") == cache / "snapshots" / COMMITS[1]
    assert locate("own/tiny", COMMITS[1]) == cache / "snapshots" / COMMITS[1]
    assert load_tokenizer(locate("own/tiny")).eos_token_id == 2


@pytest.mark.parametrize(("given", "revision", "message"), [
    ("own/gone", None, "own/gone: no local path; .* is not whole in the cache, and the hub cannot "
     "be reached .*HF_HUB_OFFLINE.*`hf download own/gone`.* local folder"),
    ("own/tiny", "never", "own/tiny: .* cache at 'never'"),
    ("own--tiny/a..b", None, "own--tiny/a..b: .* cannot be fetched"),
    ("tiny", None, "tiny: no such file or folder; is the path right.* owner/name"),
    ("./own/gone/deep", None, "own/gone/deep: no such file or folder"),
    ("/own/tiny", None, "/own/tiny: no such file or folder"),
])  # fmt: skip
def test_an_id_that_cannot_be_had_is_one_sentence(given, revision, message, cache):
    with pytest.raises(ValueError, match=message) as raised:
        locate(given, revision)
    assert "\n" not in str(raised.value)


def test_a_revision_is_of_a_hub_alone(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="given: a local model, .*--model.revision was 'v1'"):
        locate(write(tmp_path / "given", tokenizer), "v1")


def test_a_reward_model_has_a_revision_of_its_own(cache, tmp_path):
    from tppo.config import Config
    from tppo.errors import DataError
    from tppo.methods.config import RewardModelConfig
    from tppo.models.config import ModelConfig
    from tppo.stages.run import Run

    def found(**settings):
        config = Config(reward_model=RewardModelConfig(**settings))
        return Run(tmp_path, config).own_reward_model

    assert found() is None
    assert found(model="own/tiny") == cache / "snapshots" / COMMITS[0]
    assert found(model="own/tiny", revision="old") == cache / "snapshots" / COMMITS[1]
    with pytest.raises(DataError, match="--reward-model.revision was 'v1'; expected no revision"):
        found(model=str(tmp_path), revision="v1")
    with pytest.raises(DataError, match="revision was 'v1' and model None, expected the id"):
        found(revision="v1")
    lone = Run(tmp_path, Config(model=ModelConfig(revision="v1")))
    with pytest.raises(DataError, match="--model.revision was 'v1' without --model, expected"):
        lone.base  # noqa: B018


def test_a_run_keeps_the_id_and_its_commit(cache, log, tmp_path):
    """run.yaml keeps the id, the manifest the commit; another commit runs the stage again."""
    out = tmp_path / "out"
    shutil.copytree(log, out)
    main(["sft", "--out", str(out), "--model", "own/tiny", "--model.dtype", "float32", *SMALL])
    manifest = RunFolder(out).manifest("sft")
    assert manifest["inputs"][0]["sha256"] == COMMITS[0]
    assert "models--own--tiny" in manifest["inputs"][0]["path"]
    assert "model: own/tiny" in (out / "run.yaml").read_text()
    card = ModelCard.load(out / "sft" / "model" / "README.md")
    assert card.data.base_model == "own/tiny" == base_of(out / "sft" / "model")
    assert card.data.library_name == "transformers" and "token-level-ppo" in card.data.tags
    assert "24 generated sessions" in card.text and '"max_steps": 1' in card.text
    again = (out / "sft" / "manifest.json").read_text()
    flags = ["--config", str(out / "run.yaml"), "--out", str(out)]
    from tppo.commands import _defaults
    from tppo.config import fill_defaults
    from tppo.stages.run import Run

    def run():
        options = _defaults("run", flags)
        return Run(out, fill_defaults(options.settings, True), data=None, model=options.model)

    assert run().done("sft")
    (cache / "snapshots" / COMMITS[0] / "onnx.json").write_text("{}")  # of another program
    assert run().done("sft")
    (cache / "refs" / "main").write_text(COMMITS[1])
    assert not run().done("sft")
    assert (out / "sft" / "manifest.json").read_text() == again


def permuted(weight, heads):
    """Rows of q and k as llama.cpp has them: the two halves of each head interleaved."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, tokenizer, model, template=None):
    """The model as llama.cpp's converter writes it, with the tokenizer inside."""
    config, vocabulary = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    file.add_token_types([3] * 3 + [1] * (len(tokenizer) - 3))
    file.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_pad_token_id(0)
    if template is not None:
        file.add_chat_template(template)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        whole = name.removeprefix("model.").removesuffix(".weight")
        if whole == "lm_head":
            file.add_tensor("output.weight", tensor.numpy())
            continue
        if whole.startswith("layers."):
            _, layer, part = whole.split(".", 2)
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if count := heads.get(parts[part]):
                tensor = permuted(tensor, count)
            whole = f"blk.{layer}.{parts[part]}"
        file.add_tensor(f"{names.get(whole, whole)}.weight", tensor.contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_a_gguf_file_is_a_model_and_its_tokenizer(tokenizer, log, tmp_path):
    model = small(tokenizer)
    path = write_gguf(tmp_path / "tiny.gguf", tokenizer, model)
    assert locate(path) == path
    loaded, own = load_policy(path, CPU), load_tokenizer(path)
    assert own.encode("red shoes\nblue") == tokenizer.encode("red shoes\nblue")
    assert (own.eos_token_id, own.pad_token_id) == (2, 0)
    save_model(loaded, own, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(12)[None]
    for other in (loaded, again):
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
    main(["sft", "--out", str(log), "--model", str(path), *SMALL])
    assert (log / "sft" / "model" / "model.safetensors").exists()


def test_a_damaged_gguf_file_is_named(log, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="cut.gguf: it begins with b'vers', expected .* GGUF"):
        locate(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5))
    with pytest.raises(SystemExit, match="cut.gguf: cannot be read") as stopped:
        main(["sft", "--out", str(log), "--model", str(path)])
    assert "\n" not in str(stopped.value)


def test_an_adapter_is_merged_into_its_base(tokenizer, log, tmp_path):
    """Read as a model it was frozen: `element 0 of tensors does not require grad` in SFT."""
    base, folder = write(tmp_path / "base", tokenizer), tmp_path / "adapter"
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    ids = torch.arange(5)[None]
    expected, plain = (model(ids).logits for model in (adapted, load_policy(base, CPU)))
    found = load_policy(folder, CPU)
    torch.testing.assert_close(found(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.01
    assert all(p.requires_grad for p in found.parameters())
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()  # the base's
    assert load_reward_model(folder, CPU, new_head=True).num_labels == 3
    main(["sft", "--out", str(log), "--model", str(folder), *SMALL])
    (tmp_path / "elsewhere").mkdir()
    shutil.move(base, tmp_path / "elsewhere" / "base")
    message = "adapter_config.json: base_model_name_or_path is .*base.*: no such file or folder"
    for load in (load_policy, load_reward_model):
        with pytest.raises(ValueError, match=message):
            load(folder, CPU)
    config = json.loads((folder / "adapter_config.json").read_text())
    path = {"base_model_name_or_path": "../elsewhere/base"}  # from the adapter's folder
    (folder / "adapter_config.json").write_text(json.dumps(config | path))
    again = load_policy(folder, CPU)(ids).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("adapter_config.json", "{", "adapter_config.json: Expecting .*; expected the JSON object"),
    ("adapter_config.json", '{"peft_type": "LORA"}', "base_model_name_or_path was None"),
    ("adapter_model.safetensors", "cut", "adapter: the adapter does not fit its base"),
    ("adapter_model.safetensors", None, "the adapter has no adapter_model.safetensors"),
])  # fmt: skip
def test_a_damaged_adapter_is_named(tokenizer, tmp_path, name, text, message):
    base, folder = write(tmp_path / "base", tokenizer), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2)).save_pretrained(folder)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_policy(folder, CPU)


def test_pickled_weights_are_read_where_they_are_asked_for(tokenizer, log, tmp_path):
    path = write(tmp_path / "given", tokenizer)
    wanted = load_policy(path, CPU).state_dict()
    (path / "model.safetensors").unlink()
    torch.save(wanted, path / "pytorch_model.bin")
    for load in (load_policy, load_reward_model):
        with pytest.raises(ValueError, match="given: its weights are a pickle.*allow-pickle"):
            load(path, CPU)
    found = load_policy(path, CPU, pickles=True).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    main(["sft", "--out", str(log), "--model", str(path), "--model.allow-pickle", *SMALL])
    main(["sft", "--out", str(log), "--model", str(log / "sft" / "model"), *SMALL])


def test_weights_of_another_model_are_refused(tokenizer, tmp_path):
    """transformers would draw what is missing at random, and leave out what is too much."""
    path = write(tmp_path / "given", tokenizer)
    for layers, message in (
        (3, r"given: its weights lack 'model.layers.2.input_layernorm.weight' and 8 others of the "
            r"\w+ that config.json describes"),
        (1, r"weights hold, beyond what it has, 'model.layers.1.input_layernorm.weight' and 8 oth"),
        (0, "given/config.json: num_hidden_layers is 0, expected one or more"),
    ):  # fmt: skip
        change(path / "config.json", num_hidden_layers=layers)
        for load in (load_policy, load_reward_model):
            with pytest.raises(ValueError, match=message):
                load(path, CPU)
    change(path / "config.json", num_hidden_layers=2)
    load_reward_model(path, CPU).save_pretrained(tmp_path / "classes")  # its head alone is new
    load_reward_model(tmp_path / "classes", CPU)
    with pytest.raises(ValueError, match="classes: its weights lack 'lm_head.weight' of the Llama"):
        load_policy(tmp_path / "classes", CPU)


def test_quantised_weights_are_refused(tokenizer, tmp_path):
    path = write(tmp_path, tokenizer)
    change(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="config.json: quantization_config .*'gptq'.* not quant"):
        load_policy(path, CPU)


def test_the_type_in_memory(tokenizer, tmp_path):
    table = {  # asked for, stored, device -> held
        ("auto", BF16, CPU): F32, ("auto", F32, CPU): F32, ("auto", F32, CUDA): F32,
        ("auto", BF16, CUDA): BF16, ("auto", F16, CUDA): BF16, ("float32", BF16, CUDA): F32,
        ("bfloat16", F32, CPU): BF16, ("bfloat16", F16, CUDA): BF16,
    }  # fmt: skip
    assert {case: compute_dtype(*case) for case in table} == table
    path = write(tmp_path, tokenizer, BF16)
    assert {p.dtype for p in load_policy(path, CPU).parameters()} == {F32}
    assert {p.dtype for p in load_policy(path, CPU, "bfloat16").parameters()} == {BF16}
    buffers = load_policy(path, CPU, "bfloat16").model.rotary_emb.inv_freq
    assert buffers.dtype == F32  # angles of positions are lost in 8 bits


def kinds(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("held", ["auto", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [BF16, F16, F32])
def test_an_export_has_the_type_of_its_input(stored, tied, held, tokenizer, tmp_path):
    """It was float32 whatever the input was: twice the size, and not what its config said."""
    given = write(tmp_path / "given", tokenizer, stored, tie_word_embeddings=tied)
    model = load_policy(given, CPU, held)
    save_model(model, load_tokenizer(given), tmp_path / "sft")
    save_weights(load_reward_model(tmp_path / "sft", CPU, held), tmp_path / "reward")
    before, after = kinds(given), kinds(tmp_path / "sft")
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == stored
        expected = before[name].to(model.dtype).to(stored)
        assert torch.equal(after[name], expected), name
    for name in ("sft", "reward"):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(
            stored
        ).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sft").dtype == stored
    reward = AutoModelForTokenClassification.from_pretrained(tmp_path / "reward")
    assert {p.dtype for p in reward.parameters()} == {stored}
    assert model.dtype == compute_dtype(held, stored, CPU)  # saving leaves the model as it was


def test_a_configuration_without_a_type_has_that_of_its_weights(tokenizer, tmp_path):
    given = write(tmp_path / "given", tokenizer, BF16)
    config = json.loads((given / "config.json").read_text())
    del config["dtype"]
    (given / "config.json").write_text(json.dumps(config))
    save_model(load_policy(given, CPU), load_tokenizer(given), tmp_path / "out")
    assert {tensor.dtype for tensor in kinds(tmp_path / "out").values()} == {BF16}


def test_a_card_says_what_is_known_and_no_more(tmp_path):
    """A name cannot add lines to the front matter; without a hub id there is no base."""
    write_card(tmp_path, base='a/b"\nlicense: x', method="m", data="d", settings={"lr": 1e-5},
               figures={"relevance": 0.25})  # fmt: skip
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == 'a/b"\nlicense: x' == base_of(tmp_path)
    assert card.data.license is None and "| relevance | 0.25 |" in card.text
    write_card(tmp_path, base=None, method="m", data="d", settings={}, figures={})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None is base_of(tmp_path) and "without a hub id" in card.text
    assert base_of(None) is None is base_of(tmp_path / "gone")
