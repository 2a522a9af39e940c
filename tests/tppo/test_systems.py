"""The studies of SER and PIT: what is computed of their outcomes, and that a seed is kept."""

import json
import math

import pytest

from tppo.cli import main
from tppo.stages.study import systems
from tppo.stages.study.systems import (
    SYSTEMS,
    SystemStudy,
    compared,
    run_system,
    seconds,
    summed_up,
    true_gap,
)

ACCURACY = {0: (0.6, 0.7), 1: (0.8, 0.7)}  # seed -> the seed model's and the last round's


def rows(study, out, seed):
    first, last = ACCURACY[seed]
    return [
        {"arm": f"{labels}{arm}", "x": 0, "accuracy": value, "auc": value}
        for labels in ("pairs", "words")
        for arm, value in (("", first), (": last round", last), (": all labels", 0.9),
                           (": true labels of the same", 0.9))
    ]


def test_means_and_paired_differences_have_errors_over_the_seeds(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(systems, "ser_rows", rows)
    run_system(SystemStudy("ser", seeds=(0, 1)), tmp_path)
    found = json.loads((tmp_path / "study.json").read_text())
    points = {(p["arm"], p["x"]): p["figures"]["accuracy"] for p in found["points"]}
    assert points["pairs", 0] == pytest.approx([0.7, 0.1])
    assert points["pairs: all labels", 0] == pytest.approx([0.9, 0.0])
    assert found["gains"]["pairs: last round less seed"] == pytest.approx([0.0, 0.1])
    assert found["gains"]["words: last round less all labels"] == pytest.approx([-0.2, 0.0])
    page = (tmp_path / "report.html").read_text()
    assert "0.700 +- 0.100" in page and "<svg" in page
    assert "pairs: last round less all labels: -0.200 +- 0.000" in capfd.readouterr().err


def test_a_seed_that_has_an_outcome_is_not_trained_again(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(systems, "ser_rows", lambda study, out, seed: trained.append(seed) or
                        rows(study, out, seed))  # fmt: skip
    run_system(SystemStudy("ser", seeds=(0,)), tmp_path)
    with open(tmp_path / "outcomes.jsonl", "a") as file:
        file.write('{"seed": 1, "stu')  # a kill while it was written
    run_system(SystemStudy("ser", seeds=(0,)), tmp_path)
    assert trained == [0]
    run_system(SystemStudy("ser", seeds=(0, 1)), tmp_path)
    assert trained == [0, 1]
    assert len(json.loads((tmp_path / "study.json").read_text())["outcomes"]) == 2
    run_system(SystemStudy("ser", seeds=(0,), steps=3), tmp_path)
    assert trained == [0, 1, 0]


def test_one_seed_alone_has_no_error():
    outcomes = [{"rows": rows(None, None, 0)}]
    assert summed_up(outcomes)[0]["figures"]["accuracy"] == (0.6, None)
    mean, error = compared("ser", outcomes)["pairs: last round less seed"]
    assert math.isclose(mean, 0.1) and error is None


def test_the_presets_are_three_seeds_or_more_and_refuse_flags_of_other_studies(tmp_path):
    assert {name: make().system for name, make in SYSTEMS.items()} == {"ser": "ser", "pit": "pit"}
    assert all(len(make().seeds) >= 3 for make in SYSTEMS.values())
    with pytest.raises(SystemExit, match="--model or --noise was given, expected neither"):
        main(["study", "ser", "--out", str(tmp_path / "o"), "--noise", "words=.1"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("system", "arms"), [
    ("ser", {f"{labels}{arm}" for labels in ("pairs", "words")
             for arm in ("", ": last round", ": all labels", ": true labels of the same")}),
    ("pit", {f"{arm}, paid {how}" for how in ("per answer", "per token", "by the rule")
             for arm in ("SFT alone", "stage 0", "stage 1", "both")}
            - {"SFT alone, paid by the rule"}),
])  # fmt: skip
def test_each_study_runs_to_its_report(tmp_path, system, arms):
    run_system(seconds(system), tmp_path)
    found = json.loads((tmp_path / "study.json").read_text())
    assert {point["arm"] for point in found["points"]} == arms
    assert all(error is None for _, error in found["gains"].values())
    if system == "pit":  # all arms better the same first answers
        first = [point["figures"]["relevance"] for point in found["points"] if point["x"] == 0]
        assert len(first) == 11 and all(value == first[0] for value in first)


def test_the_true_gap_is_of_the_words_that_the_rule_calls_relevant():
    gap = true_gap({"p": "red shoes\nblue hat"}, 4.0)
    found = gap(["p", "p"], ["red hat\nsocks", "x y"], ["x y z", "red"])
    assert found == pytest.approx([4 * 2 / 3, -4.0])
