"""The cost of an answer that is not the list that was asked for."""

import json
from dataclasses import replace

import pytest
import torch
from test_stages import CONFIG

from tppo.labels.queries import has_format
from tppo.models.batch import Batch
from tppo.rewards import Answers, TokenReward
from tppo.rewards.format import FormatReward
from tppo.stages.run import Run

END = 0


def answers_of(rows):
    """rows: (text, queries asked for, whether it ended by itself); a token a character."""
    ids = [[*map(ord, text), *([END] if ended else [])] for text, _, ended in rows]
    columns = {"queries": [asked for _, asked, _ in rows]}
    answers = Answers([], ids, columns, None, [END], range(len(rows)))
    vars(answers)["texts"] = [text for text, _, _ in rows]
    vars(answers)["offsets"] = [
        [(t, t + 1) for t in range(len(text))] + [(len(text),) * 2] * ended
        for text, _, ended in rows
    ]
    return answers


class Ones:
    def __call__(self, batch, answers):
        rewards = batch.mask.float()  # [B, T]
        return TokenReward(rewards, batch.mask.long())


def costs(text, asked, ended=True):
    """By token, what the format takes."""
    answers = answers_of([(text, asked, ended)])
    batch = Batch([[1]], answers.response_ids, 0, torch.device("cpu"))
    found = FormatReward(Ones(), 2.0)(batch, answers)
    assert found.category is not None and (found.category == 1).all()
    paid = (1.0 - found.rewards)[0].tolist()
    return {t: cost for t, cost in enumerate(paid) if cost}


@pytest.mark.parametrize(
    ("text", "asked", "ended", "expected"),
    [
        ("ab\ncd", 2, True, {}),
        ("ab\nab", 2, True, {4: 2.0}),  # a repetition, at its last letter
        ("a b\nb a\nc", 3, True, {6: 2.0}),  # in another order, in the middle
        ("ab\ncd\nef", 2, True, {7: 2.0}),  # one more
        ("ab\nab\nab", 2, True, {4: 2.0, 7: 2.0}),  # a fault is one fault
        ("ab", 3, True, {2: 4.0}),  # two are missing, at EOS
        ("ab\ncd", 2, False, {4: 2.0}),  # cut
        ("ab\n\ncd", 3, True, {3: 2.0}),  # an empty line, at its separator
        ("ab\n", 2, True, {3: 2.0}),  # an empty last line has EOS alone
        ("", 1, True, {0: 2.0}),
    ],
)
def test_a_fault_costs_where_it_stands(text, asked, ended, expected):
    assert costs(text, asked, ended) == expected
    assert (not expected) == has_format(text, asked, "eos" if ended else "length")


def test_each_response_pays_for_itself_and_a_missing_column_is_named():
    answers = answers_of([("a\na", 2, True), ("a\nb", 2, True)])
    batch = Batch([[1], [1]], answers.response_ids, 0, torch.device("cpu"))
    found = FormatReward(Ones(), 0.5)(batch, answers)
    assert found.rewards.sum(1).tolist() == [3.5, 4.0]
    answers = replace(answers, columns={})
    with pytest.raises(ValueError, match="no column 'queries', .*--ppo.format-cost 0"):
        FormatReward(Ones(), 0.5)(batch, answers)


def test_a_run_with_a_cost_pays_it_in_training(tmp_path):
    """Hardly an answer of random weights is a list of three queries."""
    run = Run(tmp_path / "out", CONFIG)
    for name in ("data", "sft", "generate", "label", "map", "train-rm"):
        run.perform(name)
    paid = {}
    for cost in (0.0, 100.0):
        run = replace(run, config=replace(CONFIG, ppo=replace(CONFIG.ppo, format_cost=cost)))
        run.perform("train")
        (row,) = map(json.loads, (run.out / "train/metrics.jsonl").read_text().splitlines())
        paid[cost] = row
    assert paid[0.0]["response/format"] < 1  # the same answers: the first step's are SFT's
    assert paid[0.0]["response/length"] == paid[100.0]["response/length"]
    faults = (paid[0.0]["objective/scores"] - paid[100.0]["objective/scores"]) / 100
    assert faults * 8 == pytest.approx(round(faults * 8), abs=1e-3) and faults > 0.5
