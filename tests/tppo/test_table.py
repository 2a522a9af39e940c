"""The closing table: intervals, what it says about a run, narrow terminals, poor character sets."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from judged import score_answers
from rich.console import Console

from tppo.console import print_rows
from tppo.evaluation.heat import HeatRow, print_heat
from tppo.evaluation.table import findings, print_table
from tppo.labels.shares import difference, wilson
from tppo.sessions.session import Session

SESSION = Session("s", "u", "made", (), (), ("red shoes",))
ROW = score_answers([SESSION], ["red shoes"], ["eos"], 0.6) | {"kl": 4.25, "length": 15.04}
TEST = {"judge": "rule", "labeller": "rule", "threshold": 0.6}


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # by hand from Wilson's formula with z = 1.959964
        (100, 100, 0.96301, 1.0),
        (0, 10, 0.0, 0.27754),
        (5, 10, 0.23659, 0.76341),
        (1, 512, 0.000345, 0.010979),
    ],
)
def test_wilsons_interval(hits, n, low, high):
    assert wilson(hits / n, n) == pytest.approx((low, high), abs=1e-5)


def test_an_interval_holds_the_share_and_knows_nothing_of_no_trials():
    assert wilson(0.0, 0) == (0.0, 1.0)
    for n in (1, 7, 300):
        for hits in range(n + 1):
            low, high = wilson(hits / n, n)
            assert 0 <= low <= hits / n <= high <= 1 and high - low > 0


def test_newcombes_difference():
    # Newcombe (1998), table II, example (a): 56/70 against 48/80, method 10 gives 0.0524 to 0.3339
    assert difference((56 / 70, 70), (48 / 80, 80)) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=1e-4
    )


def result(tppo=None, sft=None, **training):
    """A result with rows of 500 users; by default PPO helped and nothing is odd."""
    row = {"users": 500, "relevance": 0.2, "distinct_queries": 3.0, "kl": 0.0}
    usual = {
        "auc": 0.9, "relevant_share": 0.3, "first_reward": 1.0,
        "last_reward": 3.0, "qualified": True, "sessions": 4000,
    }  # fmt: skip
    rows = {
        "sft": row | (sft or {}),
        "tppo": row | {"relevance": 0.6, "kl": 3.0} | (tppo or {}),
    }
    for found in rows.values():
        found["relevance_interval"] = wilson(found["relevance"], found["users"])
    return rows | {"training": usual | training}


WORSE = {"relevance": 0.01}


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        (result(WORSE, qualified=False), "no step kept the format"),
        (result(WORSE, relevant_share=0.02), "only 2.0% of the labelled tokens are relevant"),
        (result(WORSE, auc=None), r"hardly tells .* \(AUC unknown, 4000 labelled sessions"),
        (result(WORSE, auc=0.61), r"hardly tells .* \(AUC 0.61"),
        (result(WORSE), "the reward rose from 1.00 to 3.00 an answer without relevance"),
        (result(WORSE, last_reward=0.5), "the reward did not rise"),
        (result(WORSE | {"kl": 0.0}), "the policy did not move from SFT"),
    ],
)
def test_ppo_that_made_things_worse_says_so_with_the_likely_cause(case, cause):
    (sentence,) = findings(case)
    assert sentence.startswith(
        "PPO made the answers worse (relevance 0.010 against 0.200 of SFT). Likely cause: "
    )
    assert re.search(cause, sentence), sentence


def test_ppo_that_is_no_better_than_chance_says_so():
    (sentence,) = findings(result({"relevance": 0.22}))
    assert sentence.startswith("PPO did not help beyond chance")
    assert findings(result({"relevance": 0.26})) == []


def test_a_run_that_repeats_itself_says_so():
    (sentence,) = findings(result({"distinct_queries": 2.69}))
    assert "repeat themselves: 2.69 distinct queries an answer against 3.00 of SFT" in sentence
    assert findings(result({"distinct_queries": 2.7})) == []


def printed(width, rows, monkeypatch, capsys, labeller="rule"):
    monkeypatch.setenv("COLUMNS", str(width))
    test = TEST | {"labeller": labeller}
    print_table({**rows, "test": test, "findings": ["PPO did this."]}, "the title")
    return capsys.readouterr().out


def test_the_table_fits_80_columns_and_says_who_judged(monkeypatch, capsys):
    rows = {"sft_continued": ROW, "repeat_last": ROW | {"kl": None}}
    out = printed(80, rows, monkeypatch, capsys)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in out
    assert lines[0] == "PPO did this."
    (row,) = [line for line in lines if line.startswith("sft_continued")]
    assert row.split() == [
        "sft_continued", "1.000", ".207-1.000", "1.00", "1.000", "100.0", "4.2", "15.0", "1.000",
    ]  # fmt: skip
    said = " ".join(out.split())
    assert "relevance: judged by the rule (which also labelled the reward model's data)" in said
    assert "at least 60% of an answer's words" in said
    said = " ".join(printed(80, {"sft": ROW}, monkeypatch, capsys, "gpt-7").split())
    assert "judged by the rule (not by gpt-7, which labelled the reward model's data)" in said


def test_with_an_intent_the_table_fits_80_columns_too(monkeypatch, capsys):
    intent = (("topic", "a"), ("brand", "b"), ("need", "c"))
    row = score_answers([replace(SESSION, intent=intent)], ["red shoes"], ["eos"], 0.6)
    out = printed(80, {"sft_continued": row | {"kl": 14.2, "length": 15.0}}, monkeypatch, capsys)
    (row,) = [line for line in out.splitlines() if line.startswith("sft_continued")]
    assert "intent" in out and "chrF" not in out and max(map(len, out.splitlines())) <= 80
    assert row.split()[4:6] == ["1.000", "0.000"]  # nDCG, intent


def test_a_narrow_terminal_gets_a_line_a_figure(monkeypatch, capsys):
    out = printed(40, {"sft": ROW, "tppo": ROW}, monkeypatch, capsys)
    assert "…" not in out and max(map(len, out.splitlines())) <= 40
    assert out.count("relevance 95 %  1.000 .207-1.000") == 2
    assert out.count("  length          15.0") == 2


HEAT = [HeatRow("u1 sft", "p", ["red", ""], [0.5, -0.25], [2, 0], [1.0, -1.0], ["red", "鞋"])]


def test_the_heat_map_at_40_columns():
    console = Console(width=40, file=io.StringIO(), no_color=True)
    print_heat(HEAT, console)
    text = console.file.getvalue()
    assert "…" not in text and "  Reward a token    +0.12" in text
    assert max(map(len, text.splitlines())) <= 40


def test_the_last_row_is_set_apart():
    from rich.table import Table

    console = Console(width=60, file=io.StringIO())
    rows = [("a", ["1"]), ("all", ["2"])]
    print_rows(console, Table("name", "n", title="t"), rows, total=True)
    assert console.file.getvalue().count("├") == 1


PROGRAM = """
import sys
from tppo.console import accept_any_text
accept_any_text()
from tppo.evaluation.heat import HeatRow, print_heat
from tppo.evaluation.table import print_table
row = {"relevance": 0.5, "relevance_interval": [0.4, 0.6], "distinct_queries": 2.0}
test = {"judge": "rule", "labeller": "rule", "threshold": 0.6}
print_table({"sft": row, "test": test, "findings": ["−1 ± 2"]}, "title · of 東京")
print_heat([HeatRow("u1 sft", "p", ["red", ""], [0.5, -0.25], [2, 0], None, ["red", "鞋"])])
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_poor_character_set_ends_nothing(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True
    )
    out = done.stdout.decode(encoding)
    assert done.returncode == 0, done.stderr
    assert ("-1 +/- 2" if encoding == "ascii" else "-1 ± 2") in out
    assert "red+" in out and "\\u978b" in out  # the sign of a reward, a target's character


@pytest.mark.parametrize("command", [["data", "--help"], ["data", "inspect", "{log}"]])
def test_help_and_inspect_print_in_ascii(command, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"id": "a", "user": "u", "source": "x", "history": [], "targets": ["東京ホテル"]}\n',
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = [part.format(log=log) for part in command]
    done = subprocess.run(
        [sys.executable, "-m", "tppo", *arguments], env=environment, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.decode("ascii"), done.stderr
