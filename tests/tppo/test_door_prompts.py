"""Prompts of a user: every form that is taken, what the policy reads, and what is refused."""

import json

import pytest
from test_mapping import CORPUS, FAMILIES
from transformers import PreTrainedTokenizerFast

from tppo.errors import DataError
from tppo.stages.prompts import questions, read_prompts

CHAT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "red shoes"}]
OTHER = [{"role": "user", "content": "boots"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    backend, trainer = FAMILIES["byte-level"]()
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )


class Dataset:
    """What is used of a `datasets.Dataset`: its length, and its rows one by one as dicts."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self):
        return iter(self.rows)


ROWS = [{"prompt": "red", "answer": 3}, {"prompt": "boots", "answer": None}]


def test_every_form_of_prompts_and_their_columns(tmp_path):
    for source in (["red", "boots"], ("red", "boots"), iter(["red", "boots"])):
        found = read_prompts(source)
        assert (found.prompts, found.columns) == (["red", "boots"], {})
    assert read_prompts([CHAT, OTHER]).prompts == [CHAT, OTHER]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for source in (ROWS, Dataset(ROWS), file, str(file)):
        found = read_prompts(source)
        assert found.prompts == ["red", "boots"]
        assert found.columns == {"answer": [3, None]}
        assert found.fingerprint == read_prompts(ROWS).fingerprint
    assert read_prompts(ROWS).fingerprint != read_prompts(ROWS[::-1]).fingerprint
    assert read_prompts(["red", "boots"]).fingerprint != read_prompts(ROWS).fingerprint
    assert read_prompts(file).place(1) == f"{file}: line 2"


def test_a_text_is_read_behind_bos_and_a_chat_through_the_template(tokenizer):
    (ids,) = questions(read_prompts(["red </s> shoes"]), tokenizer, 99).ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == tokenizer.encode("red </s> shoes", add_special_tokens=False)
    tokenizer.chat_template = TEMPLATE
    try:
        (ids,) = questions(read_prompts([CHAT]), tokenizer, 99).ids
        typed = [{"role": "user", "content": "red </s> shoes"}]
        (forged,) = questions(read_prompts([typed]), tokenizer, 99).ids
        (text,) = questions(read_prompts(["red"]), tokenizer, 99).ids
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(ids) == "<system>be short\n<user>red shoes\n<assistant>"
    assert tokenizer.decode(text) == "<s>red"
    assert tokenizer.eos_token_id not in forged  # what is typed in a chat is text
    assert tokenizer.decode(forged) == "<user>red </s> shoes\n<assistant>"


def test_columns_go_with_their_prompts(tokenizer):
    asked = questions(read_prompts(ROWS), tokenizer, 99)
    twice = asked.rows([1, 1, 0])
    assert twice.prompts == ["boots", "boots", "red"]
    assert twice.columns == {"answer": [None, None, 3]}
    assert twice.ids == [asked.ids[1], asked.ids[1], asked.ids[0]]


class Table(Dataset):
    """A data frame, whose iterator gives the names of its columns."""

    columns = ("prompt", "answer")

    def __init__(self):
        super().__init__(list(self.columns))

    def to_dict(self, kind):
        return ROWS


WRONG = {
    "a number": (3, "prompts was 3, a int, expected a list of texts"),
    "columns": ({"prompt": ["red"]}, "a dict, expected a list of texts, of chats, or of dicts"),
    "a set": ({"red", "boots"}, "a set, expected a list of texts"),
    "a table": (Table(), r"prompts was a Table, expected its rows as dicts: prompts.to_dict"),
    "nothing": ([], r"prompts\[0\]: absent, expected at least one prompt"),
    "blank": (["red", ""], r"prompts\[1\]: prompt was '', expected a text, or a chat"),
    "bytes": (["red", b"x"], r"prompts\[1\]: prompt was b'x', expected a text, or a chat"),
    "mixed": (["red", OTHER], r"prompts\[1\]: .*expected a text, as the first is"),
    "mixed chats": ([OTHER, "red"], r"prompts\[1\]: .*expected a chat, as the first is"),
    "no content": ([[{"role": "user"}]], r"message 0 was .*expected a text, or a chat"),
    "answered": ([[*OTHER, {"role": "assistant", "content": "a"}]],
                 "the last of them not by the assistant"),
    "no prompt": ([{"question": "red"}], r"prompts\[0\]: there is no 'prompt' among \['question'"),
    "a text among dicts": ([*ROWS, "red"], r"prompts\[2\]: was 'red', expected a dict"),
    "a column less": ([ROWS[0], {"prompt": "x"}], r"prompts\[1\]: column 'answer' is missing"),
    "a column more": ([{"prompt": "x"}, ROWS[0]], "column 'answer' is not in the first row"),
    "taken": ([{"prompt": "x", "completions": 1}], "a column is named 'completions', expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_prompts_is_said_with_its_place(case):
    source, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        read_prompts(source)


def test_a_line_of_a_file_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "red"}\n\n{"prompt": 3}\n')
    with pytest.raises(DataError, match=f"{file}: line 3: prompt was 3, expected a text"):
        read_prompts(file)
    with pytest.raises(DataError, match="absent.jsonl: cannot be read: No such file"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="prompts was 'red shoes', which is no file, .* as a list"):
        read_prompts("red shoes")


def test_what_the_model_cannot_read_is_said_with_its_place(tokenizer):
    with pytest.raises(DataError, match=r"prompts\[0\]: a chat, and the tokenizer .*no chat templ"):
        questions(read_prompts([CHAT]), tokenizer, 99)
    long = ["red", "red shoes and boots " * 9, "red shoes and boots " * 7]
    with pytest.raises(DataError, match=r"prompts\[1\]: the prompt has .*\(2 of 3 prompts are too"):
        questions(read_prompts(long), tokenizer, 9)
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    try:
        with pytest.raises(DataError, match=r"prompts\[0\]: the chat template .*no system"):
            questions(read_prompts([CHAT]), tokenizer, 99)
    finally:
        tokenizer.chat_template = None
