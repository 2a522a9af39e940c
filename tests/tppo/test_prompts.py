"""Prompts, answers and tokenizers: nothing leaks, nothing is lost, bad input is named."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.labels.queries import has_format, parse_answer
from tppo.models.tokenizer import decode, load_tokenizer, token_offsets, train_tokenizer
from tppo.sessions.prompts import (
    encode_answer,
    encode_prompt,
    encode_prompts,
    prompt_text,
)
from tppo.sessions.session import Event, Session
from tppo.store.jsonl import DataError

SESSION = Session(
    id="s1",
    user="u1",
    source="made",
    profile=("likes hiking",),
    history=(
        Event("search", "warm boots for snow"),
        Event("click", "altara boots"),
        Event("search", "boots review"),
    ),
    targets=("secretword boots", "другой запрос"),
)
TEXTS = [
    prompt_text(SESSION),
    "\n".join(SESSION.targets),
    "naïve café 👩‍👩‍👧 東京 boots",
    "a b c d e f g",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 400)


def test_pad_bos_and_eos_differ(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_targets_never_reach_a_prompt():
    other = Session(**{**SESSION.__dict__, "targets": ("one", "two")})
    assert prompt_text(SESSION) == prompt_text(other)
    assert "secretword" not in prompt_text(SESSION)


def test_an_answer_is_one_query_a_line_and_eos(tokenizer):
    ids = encode_answer(tokenizer, SESSION.targets)
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert parse_answer(decode(tokenizer, ids)) == list(SESSION.targets)


@pytest.mark.parametrize(
    ("text", "finish", "good"),
    [
        ("a b\nc", "eos", True),
        ("a b\nc", "length", False),
        ("a b", "eos", False),
        ("a\nb\nc", "eos", False),
        ("a\n ", "eos", False),
        ("a\nb\n", "eos", False),
        ("a b\nB a", "eos", False),
    ],
)
def test_format(text, finish, good):
    assert has_format(text, 2, finish) is good


def test_a_long_prompt_loses_its_oldest_events_first(tokenizer):
    full = encode_prompt(tokenizer, prompt_text(SESSION))
    newest = encode_prompt(tokenizer, prompt_text(SESSION, 2))
    bare = encode_prompt(tokenizer, "search: boots review\nnext 2:\n")
    assert encode_prompts(tokenizer, [SESSION], len(full)) == [full]
    assert encode_prompts(tokenizer, [SESSION], len(full) - 1) == [
        encode_prompt(tokenizer, prompt_text(SESSION, 1))
    ]
    assert encode_prompts(tokenizer, [SESSION], len(newest)) == [newest]
    assert decode(tokenizer, newest) == "profile: likes hiking\nsearch: boots review\nnext 2:\n"
    assert encode_prompts(tokenizer, [SESSION], len(newest) - 1) == [bare]


def test_a_prompt_longer_than_the_model_is_named(tokenizer):
    newest = encode_prompt(tokenizer, prompt_text(SESSION, 3))
    with pytest.raises(DataError, match=rf"'s1'.* {len(newest)} tokens .* room for 5 "):
        encode_prompts(tokenizer, [SESSION], 5)


def test_the_chat_template_is_used_where_there_is_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    chat = load_tokenizer(tmp_path)
    chat.chat_template = "{% for m in messages %}<s>[{{ m.content }}]{% endfor %}"
    ids = encode_prompt(chat, "boots")
    assert chat.decode(ids) == "<s>[boots]"


def test_a_tokenizer_without_pad_token_keeps_its_size(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path)
    bare = load_tokenizer(tmp_path)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id and len(loaded) == len(tokenizer)
    assert "no pad token" in capsys.readouterr().err
    # trl#5303: where pad is eos, the answer's own eos stays.
    assert encode_answer(loaded, ["a"])[-1] == loaded.eos_token_id


def test_a_tokenizer_without_eos_token_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    bare = load_tokenizer(tmp_path)
    bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos token"):
        load_tokenizer(tmp_path)


def test_offsets_of_sampled_ids_tile_the_text(tokenizer):
    for text in TEXTS:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        decoded, spans = token_offsets(tokenizer, ids)
        assert decoded == text and spans[-1] == (len(text), len(text))
        covered = {i for start, end in spans for i in range(start, end)}
        assert covered == set(range(len(text)))
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)


def test_offsets_of_ids_that_the_tokenizer_would_not_choose(tokenizer):
    """A policy may spell a word letter by letter, or sample bytes that make no character."""
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "boots"]
    assert token_offsets(tokenizer, letters) == ("boots", [(i, i + 1) for i in range(5)])
    half = tokenizer.encode("東", add_special_tokens=False)[:1]
    text, spans = token_offsets(tokenizer, [*half, *letters])
    assert text.endswith("boots") and spans[-1] == (len(text) - 1, len(text))
    assert all(0 <= start <= end <= len(text) for start, end in spans)


def test_positions_of_the_model_bound_the_prompt(tokenizer):
    from tppo.stages.lengths import fit_prompts

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=40,
    )  # fmt: skip
    prompts = fit_prompts(tokenizer, [SESSION], LlamaForCausalLM(config), 10)
    assert len(prompts[0]) <= 30
