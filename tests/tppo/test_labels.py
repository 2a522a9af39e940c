"""Label files: what is read back, and how every way of being wrong is named."""

import json
import os

import pytest

from tppo.labels.label import Label, read_labels, write_labels
from tppo.store.jsonl import DataError

LABEL = Label("s1/0", "red shoes\nblue 鞋", (("red", 1), ("shoes", 0), ("blue", -1)), 1, "rule")
ROW = {"id": "a", "response": "red", "words": [["red", 1]], "sentence": 0, "labeller": "rule"}


def test_written_labels_read_back_equal(tmp_path):
    path = tmp_path / "labels.jsonl"
    labels = [LABEL, Label("s1/1", "", (), 0, "rule"), LABEL]
    write_labels(path, labels)
    assert read_labels(path) == labels
    assert "鞋" in path.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["labels.jsonl"]


BAD = {
    "no id": ({"id": None}, "field 'id': was None"),
    "response": ({"response": 3}, "field 'response': was 3, expected a text"),
    "words": ({"words": "red"}, r"field 'words': was 'red', expected a list of \[word, 0 or 1\]"),
    "a word alone": ({"words": ["red"]}, r"field 'words\[0\]': was 'red'"),
    "a word too long": ({"words": [["red", 1, 2]]}, r"field 'words\[0\]': was \['red', 1, 2\]"),
    "label 2": ({"words": [["red", 2]]}, r"field 'words\[0\]': was \['red', 2\]"),
    "label true": ({"words": [["red", True]]}, r"field 'words\[0\]': was \['red', True\]"),
    "label -1.0": ({"words": [["red", -1.0]]}, r"field 'words\[0\]': was \['red', -1.0\]"),
    "label 1.0": ({"words": [["red", 1.0]]}, r"field 'words\[0\]': was \['red', 1.0\]"),
    "blank word": ({"words": [["red", 1], [" ", 1]]}, r"field 'words\[1\]': was \[' ', 1\]"),
    "sentence": ({"sentence": "1"}, "field 'sentence': was '1', expected 0 or 1"),
    "no labeller": ({"labeller": ""}, "field 'labeller': was ''"),
    "a word that is not there": (
        {"words": [["blue", 1]]},
        "field 'words': .*expected words of the response .no word 'blue' in the response 'red'",
    ),
    "labels that contradict": ({"words": [["red", 1], ["red", 0]]}, "field 'words': .*labels that"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_wrong_label_is_named(tmp_path, change, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | change) + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl: line 2: {message}"):
        read_labels(path)


def test_an_empty_or_cut_file_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"bad\.jsonl: empty"):
        read_labels(path)
    path.write_text(json.dumps(ROW)[:30])
    with pytest.raises(DataError, match=r"bad\.jsonl: line 1: not JSON"):
        read_labels(path)
