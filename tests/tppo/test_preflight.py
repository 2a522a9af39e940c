"""What would stop a training late is one sentence before it starts, and costs a few tokens."""

import pytest
import torch
from _weights import enlarged
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import tppo_kernels as tk
from tppo.cli import main
from tppo.models.batch import Batch
from tppo.models.load import load_policy
from tppo.models.policy import policy_head, policy_logprobs
from tppo.models.preflight import check_newline, preflight
from tppo.models.rollout import HFRollout, Sampling
from tppo.models.tokenizer import load_tokenizer, train_tokenizer
from tppo.models.vocabulary import largest_id, limit_vocabulary

CPU = torch.device("cpu")
PROMPT = [1, 70, 80, 90, 100]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["red shoes\nblue hat", "search: boots!"] * 4, 280)


def small(rows, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return enlarged(LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes | ids | options))).eval()


def write(path, tokenizer, rows, **options):
    small(rows, **options).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def refused(given, log=None, **options):
    """The sentence with which a folder is refused."""
    with pytest.raises(ValueError) as raised:
        preflight(load_policy(given, CPU), load_tokenizer(given), PROMPT, where=str(given),
                  **options)  # fmt: skip
    text = str(raised.value)
    assert text.startswith(f"{given}: ") and "\n" not in text
    return text


def test_a_fit_model_passes_and_stays_as_it_is(tokenizer, tmp_path, capsys):
    given = write(tmp_path, tokenizer, len(tokenizer))
    model, own = load_policy(given, CPU), load_tokenizer(given)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    preflight(model, own, PROMPT, where="here")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert policy_head(model).valid_vocab is None and not hasattr(model, "valid_vocab")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "bos_token"])
def test_a_token_that_was_added_without_an_embedding(name, tokenizer, tmp_path):
    """A pad token added without a resize was an IndexError in the middle of SFT."""
    rows = len(tokenizer)
    given = write(tmp_path, tokenizer, rows)
    more = AutoTokenizer.from_pretrained(given)
    more.add_special_tokens({name: "<more>"})
    more.save_pretrained(given)
    text = refused(given)
    assert f"{name} '<more>'" in text and f"is token {rows}," in text
    assert f"tokens 0 to {rows - 1}" in text and "resize_token_embeddings" in text


def test_a_token_that_no_text_needs_may_lack_an_embedding(tokenizer, tmp_path, capsys):
    """As the tokenizer of some text models has a token for images."""
    rows = len(tokenizer)
    given = write(tmp_path, tokenizer, rows)
    more = AutoTokenizer.from_pretrained(given)
    more.add_special_tokens({"additional_special_tokens": ["<image>"]})
    more.save_pretrained(given)
    preflight(load_policy(given, CPU), load_tokenizer(given), PROMPT, where="here")
    assert f"to {rows}, '<image>', and the model has embeddings of 0 to {rows - 1}" in (
        "".join(capsys.readouterr()).replace("\n", " ")
    )


@pytest.mark.parametrize("prefix", ["shared", "dense"])
def test_tokens_that_no_tokenizer_gives_are_neither_sampled_nor_rated(prefix, tokenizer, tmp_path):
    """A padded vocabulary: every third sampled token was one that decodes to nothing."""
    size = len(tokenizer)
    given = write(tmp_path, tokenizer, 3 * size // 2)
    model, own = load_policy(given, CPU), load_tokenizer(given)
    prompts = [PROMPT] * 16
    free = HFRollout(model, pad_id=0, eos_id=2, prefix=prefix).generate(prompts, Sampling(20))
    assert any(token >= size for row in free.response_ids for token in row)
    preflight(model, own, PROMPT, where="here", prefix=prefix)
    found = HFRollout(model, pad_id=0, eos_id=2, prefix=prefix).generate(prompts, Sampling(20))
    assert all(token < size for row in found.response_ids for token in row)
    batch = Batch(prompts, found.response_ids, 0, prefix=prefix)
    logprobs, _ = policy_logprobs(model, batch, 0.7)
    row = found.response_ids[0]
    logits = model(torch.tensor([PROMPT + row])).logits[0, len(PROMPT) - 1 : -1, :size] / 0.7
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(row)[:, None])[:, 0]
    torch.testing.assert_close(logprobs[0, : len(row)], expected, atol=2e-5, rtol=1e-4)


def test_ids_may_be_sparse(tokenizer):
    """The largest id counts, not how many tokens there are."""
    sparse = train_tokenizer(["red shoes\nblue hat"] * 4, 280)
    sparse.get_vocab = lambda: {"a": 0, "b": 5, "c": 9}
    model = small(12)
    assert largest_id(sparse) == 9 and limit_vocabulary(model, sparse).valid_vocab == 10
    exact = small(10)
    assert not hasattr(limit_vocabulary(exact, sparse), "valid_vocab")


def test_a_head_with_a_vocabulary_of_its_own_takes_none(tokenizer):
    model = small(300)
    head = tk.FusedLMHead(model, valid_vocab=280)
    states, targets = torch.randn(2, 3, 16), torch.full((2, 3), 5)
    for call in (lambda: head(states, targets, valid_vocab=270),
                 lambda: head.loss(states, targets, targets.float(), targets.float(),
                                   valid_vocab=270)):  # fmt: skip
        with pytest.raises(TypeError, match="got valid_vocab, expected none: .* 280"):
            call()


def test_without_a_pad_token_that_of_the_folder_or_the_end_fills(tokenizer, tmp_path, capsys):
    given = write(tmp_path, tokenizer, len(tokenizer), pad_token_id=77)
    bare = AutoTokenizer.from_pretrained(given)
    bare.pad_token = None
    bare.save_pretrained(given)
    assert load_tokenizer(given).pad_token_id == 77
    assert "no pad token of the tokenizer" in "".join(capsys.readouterr())
    small(len(tokenizer), pad_token_id=None).save_pretrained(given)
    assert load_tokenizer(given).pad_token_id == 2
    preflight(load_policy(given, CPU), load_tokenizer(given), PROMPT, where="here")


def test_a_tokenizer_that_loses_line_breaks(tmp_path):
    """Two queries became one, in every answer."""
    words = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>",
                                  unk_token="[UNK]")  # fmt: skip
    with pytest.raises(ValueError, match=r"tokens \[1, 2\], which read 'a b'; expected the line"):
        check_newline(own, "here")
    given = write(tmp_path, own, 4)
    assert "expected the line break back" in refused(given)


def test_a_head_that_is_no_matrix_of_the_states(tokenizer, tmp_path, monkeypatch):
    given = write(tmp_path, tokenizer, len(tokenizer))
    forward = LlamaForCausalLM.forward

    def scaled(self, **inputs):
        output = forward(self, **inputs)
        output.logits = output.logits * 3.0
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    text = refused(given)
    assert "expected logits equal to its head" in text and "reads states and head apart" in text


def test_a_trunk_that_cannot_share_a_prompt(tokenizer, tmp_path, monkeypatch):
    """A layer that mixes neighbours outside attention: one answer would read the other."""
    given = write(tmp_path, tokenizer, len(tokenizer))
    norm = type(small(8).model.norm)
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x) + 0.3 * x.roll(1, 1))
    text = refused(given)
    assert "'llama' has log-probs with a shared prompt that differ" in text
    assert text.endswith("--prefix dense goes on without")
    preflight(load_policy(given, CPU), load_tokenizer(given), PROMPT, where="here",
              prefix="dense")  # fmt: skip


def test_a_trunk_that_fails_is_named(tokenizer, tmp_path, monkeypatch):
    given = write(tmp_path, tokenizer, len(tokenizer))

    def fails(*_):
        raise NotImplementedError("no packed sequences")

    monkeypatch.setattr("tppo.models.batch.tk.shared_prefix", fails)
    text = refused(given)
    assert "'llama' cannot share a prompt between answers; --prefix dense goes on" in text
    assert text.endswith(": no packed sequences")


def test_preflight_holds_in_16_bits(tokenizer, tmp_path):
    given = write(tmp_path, tokenizer, len(tokenizer) + 8)
    preflight(load_policy(given, CPU, "bfloat16"), load_tokenizer(given), PROMPT, where="here")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A run folder whose sessions are read."""
    out = tmp_path_factory.mktemp("run") / "out"
    main(["data", "--out", str(out), "--sessions.train-users", "24", "--sessions.test-users", "2"])
    return out


def test_sft_and_what_follows_do_without_phantoms(tokenizer, log, tmp_path, capsys):
    """From the command: said once, and the answers of `generate` have none."""
    given = write(tmp_path / "given", tokenizer, 2 * len(tokenizer), max_position_embeddings=512)
    flags = ["--out", str(log), "--model", str(given), "--generate.max-new-tokens", "40"]
    main(["sft", *flags, "--sft.max-steps", "1", "--sft.batch-size", "4"])
    assert f"embeddings of {2 * len(tokenizer)} tokens" in "".join(capsys.readouterr()).replace(
        "\n", " "
    )
    main(["generate", *flags, "--generate.samples", "24"])
    from tppo.store.jsonl import read_jsonl

    rows = [line.get("response_ids", lambda _: True, "")
            for line in read_jsonl(log / "generate" / "answers.jsonl")]  # fmt: skip
    assert rows and all(token < len(tokenizer) for row in rows for token in row)
    exported = AutoModelForCausalLM.from_pretrained(log / "sft" / "model")
    assert exported.config.vocab_size == 2 * len(tokenizer)
    torch.manual_seed(0)  # plain generate, too, gives no token that the tokenizer lacks
    plain = exported.generate(torch.tensor([PROMPT] * 16), do_sample=True, max_new_tokens=16)
    assert plain.max() < len(tokenizer)
