"""A reward model with a tokenizer of its own: what it reads, and where its classes land."""

import functools
import itertools
import json

import pytest
import torch
from _weights import enlarged
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForTokenClassification,
    LongformerConfig,
    LongformerForTokenClassification,
    PreTrainedTokenizerFast,
)

from tppo.cli import main
from tppo.config import Config, fill_defaults
from tppo.labels.words import map_labels, word_spans
from tppo.methods.config import RewardModelConfig
from tppo.methods.reward_model import LabelledAnswer, evaluate_reward_model, train_reward_model
from tppo.models.batch import Batch
from tppo.models.own_tokens import AlignedRewardModel, OwnTokens, load_frozen, start_reward_model
from tppo.models.policy import RewardModel
from tppo.models.tokenizer import decode, token_offsets
from tppo.sessions.config import SessionsConfig
from tppo.sessions.prompts import answer_text, encode_answer, encode_prompt, prompt_text
from tppo.sessions.synthetic import generate_sessions
from tppo.settings import from_dict
from tppo.stages.run import Run
from tppo.store.yaml_file import read_yaml

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("byte-level", "metaspace", "word-piece")
PAIRS = list(itertools.permutations(FAMILIES, 2))
CPU = torch.device("cpu")
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 64, "num_labels": 3}  # fmt: skip
WINDOW = 16
TEXTS = [
    "cheap camera", "where cinema tickets student\ncorvano", "", "\n", "Café  crème, 3.5 t-shirt!",
    "東京駅 😀 na\u0308ive", "<s> literally </s>", "news headlines local\n\nfree ",
]  # fmt: skip


@functools.cache
def sessions():
    config = SessionsConfig(train_users=400, heldout_users=1, test_users=1)
    return generate_sessions(config, 0).train


@functools.cache
def tokenizer(family, small=True):
    """One tokenizer of a family, trained on the generated sessions; a small one splits words."""
    kwargs = {"special_tokens": ["<pad>", "<s>", "</s>", "<unk>"], "show_progress": False}
    if family == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        size = 420 if small else 1000
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **kwargs)
    elif family == "metaspace" and small:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=160, unk_token="<unk>", **kwargs)
    elif family == "metaspace":  # no word of one piece with a line break, as Unigram likes them
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        lines = pre_tokenizers.Split("\n", "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace()])
        made.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=900, **kwargs)
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200 if small else 700, **kwargs)
    texts = [prompt_text(s) + answer_text(s.targets) for s in sessions()]
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(name, made.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def bert(tokenizer):
    torch.manual_seed(0)
    sizes = {**WIDTHS, "max_position_embeddings": 256, "initializer_range": 0.3}
    return BertForTokenClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()


def longformer(tokenizer, positions=256):
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=len(tokenizer), attention_window=[WINDOW] * 2, pad_token_id=0,
        max_position_embeddings=positions + 1, **WIDTHS,
    )  # fmt: skip
    return LongformerForTokenClassification(config).eval()


@functools.cache
def reader(family):
    return OwnTokens(bert(tokenizer(family)), tokenizer(family))


def answers_of(policy):
    """Answers as a policy samples them: what its tokenizer gives for a text, or any ids."""
    of_texts = st.sampled_from(TEXTS).map(lambda text: policy.encode(text)[1:])
    ids = st.lists(st.integers(0, len(policy) - 1), min_size=1, max_size=10)
    return st.lists(st.one_of(of_texts, ids), min_size=1, max_size=3)


@pytest.mark.parametrize("ours, theirs", list(itertools.product(FAMILIES, FAMILIES)))
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_policy_token_has_the_logits_of_the_token_on_its_last_character(ours, theirs, data):
    """Against a search over the offsets of the whole input, each row alone and unpadded."""
    policy, own = tokenizer(ours), tokenizer(theirs)
    answers = data.draw(answers_of(policy))
    prompts = [encode_prompt(policy, prompt_text(sessions()[i])) for i in range(len(answers))]
    logits = AlignedRewardModel(reader(theirs), policy)(Batch(prompts, answers, 0))
    for row, prompt, answer in zip(logits, prompts, answers, strict=True):
        text, spans = token_offsets(policy, answer)
        head = f"question: {decode(policy, prompt).strip()}. \n\n answer: "
        encoded = own(head + text, return_offsets_mapping=True)
        alone = reader(theirs).model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0]
        for got, (start, end) in zip(row, spans, strict=False):
            over = [
                alone[i]
                for i, (a, b) in enumerate(encoded["offset_mapping"])
                if start < end and a <= len(head) + end - 1 < b
            ]
            if over:
                assert any(torch.allclose(got, one, rtol=1e-3, atol=1e-4) for one in over)
            else:
                assert got.softmax(-1)[0] == 1


def relevant(word):
    return sum(map(ord, word)) % 2


def labelled(own, session, separator):
    """An answer whose words are labelled by their letters, in the reward model's tokens."""
    text = separator.join(session.targets)
    words = [(text[a:b], relevant(text[a:b])) for a, b in word_spans(text)]
    (reading,) = own.read([prompt_text(session).replace("\n", separator)], [text])
    categories = map_labels(text, words, reading.offsets)
    return LabelledAnswer(reading.prompt_ids, reading.response_ids, categories, 2)


@functools.cache
def trained(family):
    """A reward model of whole words, trained in its own tokens."""
    large, make = tokenizer(family, False), longformer if family == "word-piece" else bert
    own = OwnTokens(make(large), large)
    # Line breaks as byte-level and metaspace policies write them, spaces as WordPiece decodes them.
    pairs = zip(sessions(), itertools.cycle("\n "))
    rows = [labelled(own, session, separator) for session, separator in pairs]
    config = RewardModelConfig(epochs=4, batch_size=16, lr=5e-3)
    train_reward_model(own, rows[:-40], config, seed=0)
    return own, evaluate_reward_model(own, rows[-40:], config)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_word_labels_reach_the_policy_through_a_trained_model(ours, theirs):
    """Labels -> its own tokens -> training -> classes at the policy's tokens of each word."""
    policy, (own, report) = tokenizer(ours), trained(theirs)
    assert report["auc"] > 0.99 and report["accuracy"] > 0.97
    batch = Batch(
        [encode_prompt(policy, prompt_text(s)) for s in sessions()[-40:]],
        [encode_answer(policy, s.targets) for s in sessions()[-40:]],
        policy.pad_token_id,
    )
    classes = AlignedRewardModel(own, policy)(batch).argmax(-1)
    right = count = 0
    for row, ids in zip(classes.tolist(), batch.response_ids, strict=True):
        text, spans = token_offsets(policy, ids)
        words = {i: 1 + relevant(text[a:b]) for a, b in word_spans(text) for i in range(a, b)}
        assert row[len(ids) - 1] == 0  # EOS
        for got, (start, end) in zip(row, spans, strict=False):
            if start < end and end - 1 in words:
                right, count = right + (got == words[end - 1]), count + 1
            elif theirs == "word-piece":  # its tokens have no white space
                assert got == 0
    assert count > 40 * 10
    assert right > 0.95 * count  # it misses rare words; a gather that is off by one has under 0.45


def padding_seen(module, args, kwargs):
    """A hook by which a model attends to its padding."""
    return args, {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}


@pytest.mark.parametrize("make", [longformer, bert])
def test_a_row_is_read_as_if_it_were_alone(make):
    """Padded to the longest row, and to Longformer's window on both sides of a window's edge."""
    own = OwnTokens(enlarged(make(tokenizer("word-piece"))), tokenizer("word-piece"))
    words = "cheap camera lightweight corvano where cinema tickets student".split()
    texts = [" ".join(words[:n]) for n in (1, 2, 5, 8)]
    readings = own.read(["search: portrait camera\nnext 3:\n" * n for n in (1, 3, 2, 1)], texts)
    widths = [len(r.prompt_ids) + len(r.response_ids) + 1 for r in readings]
    assert len({-(-width // WINDOW) for width in widths}) > 1 and any(w % WINDOW for w in widths)
    given = [r.prompt_ids for r in readings], [r.response_ids for r in readings]
    logits, mask = own(*given)
    expected = []
    for row, real, reading in zip(logits, mask, readings, strict=True):
        alone, _ = own([reading.prompt_ids], [reading.response_ids])
        torch.testing.assert_close(row[real], alone[0], rtol=1e-4, atol=1e-4)
        expected.append(alone[0])
    own.model.register_forward_pre_hook(padding_seen, with_kwargs=True)
    for row, real, alone, width in zip(*own(*given), expected, widths, strict=True):
        # A hundred times what they may differ by above; how much it is varies with the vocabulary.
        seen = (row[real] - alone).abs().max() > 0.01
        assert seen == (width < max(widths)), (widths, width)


def test_scoring_in_parts_gives_the_same(monkeypatch):
    policy = tokenizer("byte-level")
    model = AlignedRewardModel(reader("metaspace"), policy)
    prompts = [encode_prompt(policy, prompt_text(s)) for s in sessions()[:7]]
    batch = Batch(prompts, [encode_answer(policy, s.targets[: i % 3 + 1])
                            for i, s in enumerate(sessions()[:7])], 0)  # fmt: skip
    whole = model(batch)
    monkeypatch.setattr("tppo.models.own_tokens.TOKENS_AT_ONCE", 300)
    sizes = []
    hook = model.reader.model.register_forward_hook(lambda *call: sizes.append(len(call[2].logits)))
    torch.testing.assert_close(model(batch), whole, rtol=1e-3, atol=1e-4)
    hook.remove()
    assert len(sizes) > 2 and sum(sizes) == 7


def test_a_long_history_loses_its_start_and_a_long_answer_its_end(capsys):
    own = OwnTokens(longformer(tokenizer("byte-level"), positions=64), tokenizer("byte-level"))
    policy = tokenizer("metaspace")
    prompt, answer = "search: old\n" * 30 + "search: new\nnext 3:\n", "cheap camera"
    (whole,) = OwnTokens(longformer(own.tokenizer), own.tokenizer).read([prompt], [answer])
    (cut,) = own.read([prompt], [answer])
    assert (cut.response_ids, cut.offsets) == (whole.response_ids, whole.offsets)
    assert len(cut.prompt_ids) + len(cut.response_ids) + 1 == 64 < len(whole.prompt_ids)
    encoded = own.tokenizer(f"question: {prompt.strip()}", return_offsets_mapping=True)
    first = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > 10)
    head = encoded["input_ids"][:first]  # of "question: "
    assert cut.prompt_ids[: len(head)] == whole.prompt_ids[: len(head)] == head
    kept = len(cut.prompt_ids) - len(head)
    assert cut.prompt_ids[len(head) :] == whole.prompt_ids[-kept:]
    assert "long histories lose their start" in capsys.readouterr().err

    ids = policy.encode("cheap camera\n" * 20)[1:]
    (long,) = own.read([prompt], [decode(policy, ids)])
    assert len(long.prompt_ids) + len(long.response_ids) + 1 == 64 and long.offsets[0][0] == 0
    assert "long answers lose their end" in capsys.readouterr().err
    logits = AlignedRewardModel(own, policy)(Batch([policy.encode(prompt)], [ids], 0))
    text, spans = token_offsets(policy, ids)
    none = (logits[0].softmax(-1)[:, 0] == 1).tolist()
    assert none == [a == b or b > long.offsets[-1][1] for a, b in spans]


def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **WIDTHS)
    return enlarged(LlamaForTokenClassification(config))


@pytest.mark.parametrize("make, family, own", [
    (llama, "byte-level", False),
    (llama, "metaspace", True),  # other tokens
    (bert, "byte-level", True),  # it looks ahead: no shared prompts
    (longformer, "byte-level", True),  # and counts positions from its padding on
])  # fmt: skip
def test_the_policys_ids_are_read_where_that_is_the_same(make, family, own, tmp_path):
    policy = tokenizer("byte-level")
    make(tokenizer(family)).save_pretrained(tmp_path / "given")
    tokenizer(family).save_pretrained(tmp_path / "given")
    model, its_tokenizer = start_reward_model(tmp_path / "given", tmp_path / "no sft", policy, CPU)
    assert model.config.own_tokens is own
    model.save_pretrained(tmp_path / "saved")
    its_tokenizer.save_pretrained(tmp_path / "saved")
    frozen = load_frozen(tmp_path / "saved", policy, CPU)
    assert type(frozen) is (AlignedRewardModel if own else RewardModel)
    prompt, answer = policy.encode(prompt_text(sessions()[0])), policy.encode("cheap camera")[1:]
    with torch.no_grad():
        logits = frozen(Batch([prompt], [answer], 0))
    assert logits.shape == (1, len(answer), 3) and logits.isfinite().all()
    assert (logits[0, -1].softmax(-1)[0] == 1).item() is own  # EOS: class 0, not asked


def test_a_head_of_other_classes_is_replaced(tmp_path):
    own = tokenizer("word-piece")
    torch.manual_seed(0)
    entities = BertForTokenClassification(
        BertConfig(vocab_size=len(own), **{**WIDTHS, "num_labels": 9})
    )
    entities.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    model, _ = start_reward_model(tmp_path, tmp_path, tokenizer("byte-level"), CPU)
    assert model.classifier.out_features == model.config.num_labels == 3
    trunk = entities.base_model.state_dict()
    assert all(torch.equal(trunk[name], v) for name, v in model.base_model.state_dict().items())


def test_a_model_of_its_own_trains_at_the_papers_rate():
    assert fill_defaults(Config(), False).reward_model.lr == 1e-3
    own = Config(reward_model=RewardModelConfig(model="folder"))
    assert fill_defaults(own, False).reward_model.lr == 1e-5
    own = Config(reward_model=RewardModelConfig(model="folder", lr=3e-4))
    assert fill_defaults(own, False).reward_model.lr == 3e-4


def test_a_folder_that_is_not_there_is_named(tmp_path):
    flags = ["--out", str(tmp_path / "out"), "--reward-model.model", str(tmp_path / "gone")]
    tiny = ["--sessions.train-users", "12", "--sessions.test-users", "2"]
    main(["data", *flags, *tiny])
    with pytest.raises(SystemExit, match="gone: no such file or folder; is the path right"):
        main(["train-rm", *flags])


TINY = {
    "sessions": {"train_users": 200, "heldout_users": 16, "test_users": 16, "transfer_users": 8},
    "scratch": {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 400},
    "sft": {"max_steps": 30, "eval_every": 10, "decay_steps": 30},
    "generate": {"samples": 96},
    "reward_model": {"epochs": 2, "lr": 3e-3, "min_auc": 0.0},
    "ppo": {"steps": 2, "batch_size": 16, "minibatch_size": 8, "min_format": 0.0,
            "max_kl": 100.0},
    "eval": {"temperatures": [1.0], "heat_users": 2},
}  # fmt: skip


def test_longformer_in_the_loop(tmp_path, capsys):
    """From a folder with a WordPiece tokenizer, through training and PPO, to the closing table."""
    own, given, out = tokenizer("word-piece"), tmp_path / "longformer", tmp_path / "out"
    longformer(own).save_pretrained(given)
    own.save_pretrained(given)
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    flags = ["--out", str(out), "--config", str(tmp_path / "tiny.yaml")]
    main(["run", *flags, "--reward-model.model", str(given), "--threads", "1"])
    said = capsys.readouterr().err
    assert "read in its own tokens" in said

    rows = (out / "train-rm" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["local_loss"] for row in rows]
    report = json.loads((out / "train-rm" / "report.json").read_text())
    assert losses[-1] < losses[0] and report["own_tokens"]
    assert report["relevant_tokens"] and report["irrelevant_tokens"]
    trained, first = (load_file(p / "model.safetensors") for p in (out / "train-rm/model", given))
    name = "longformer.embeddings.word_embeddings.weight"
    assert trained.keys() == first.keys() and not torch.equal(trained[name], first[name])

    steps = [json.loads(row) for row in (out / "train/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(row["objective/scores_std"] > 0 for row in steps)
    result = json.loads((out / "result.json").read_text())
    assert result["tppo"]["users"] == 16 and result["tppo"]["kl"] != 0
    assert len((out / "heat" / "tokens.jsonl").read_text().splitlines()) > 1
    assert "<html" in (out / "report.html").read_text()

    stored, _ = read_yaml(out / "run.yaml")
    run = Run(out=out, config=fill_defaults(from_dict(Config, stored["settings"]), False))
    assert run.done("train-rm")
    (given / "config.json").write_text((given / "config.json").read_text() + "\n")
    assert not run.done("train-rm") and "longformer changed" in capsys.readouterr().err
