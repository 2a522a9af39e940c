"""`tppo study`: what it compares is equal, what it is given is checked; a kill costs one arm."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tppo.errors import DataError
from tppo.evaluation.chart import Line, chart
from tppo.evaluation.config import EvalConfig
from tppo.labels.endpoint.prompt import LabelItem
from tppo.labels.rule import label_by_rule
from tppo.methods.config import SERConfig
from tppo.sessions.config import SessionsConfig
from tppo.sessions.synthetic import generate_sessions
from tppo.settings import from_dict
from tppo.stages.artifacts import TEST_SESSIONS
from tppo.stages.registry import REGISTRY, before
from tppo.stages.study import config, work
from tppo.stages.study.command import read_noise, read_study
from tppo.stages.study.config import DEFAULTS, PAPER, Arm, Noise, Part, StudyConfig
from tppo.stages.study.figures import all_figures
from tppo.stages.study.label_cost import label_costs
from tppo.stages.study.material import LAST_STAGE, with_noise
from tppo.stages.study.presets import PRESETS, TUNING_SEEDS
from tppo.stages.study.summary import write_into
from tppo.stages.study.tables import markdown, tables
from tppo.stages.study.work import Outcome, read_outcomes
from tppo.store.jsonl import plain


def test_no_stage_before_the_closing_ones_reads_test_users():
    readers = [name for name, stage in REGISTRY.items() if TEST_SESSIONS in stage.inputs]
    assert readers and readers[0] == "eval"
    assert "eval" not in before("eval") and not set(readers) & set(before("eval"))
    assert not set(readers) & {*before(LAST_STAGE), LAST_STAGE}  # what the arms of a seed share


def test_presets_are_studies_and_report_no_seed_that_they_were_tuned_on():
    for name, preset in PRESETS.items():
        study = preset()
        assert len(study.cells()) == len(set(study.cells()))
        used = {cell.seed for cell in study.cells()}
        assert bool(used & set(TUNING_SEEDS)) == (name == "tuning")


def test_labels_of_wholes_are_tuned_at_least_as_hard_as_those_of_words():
    (part,) = PRESETS["tuning"]().parts
    both = ("scale", "lam", "fit_critic")
    for kind, knobs in {"words": both, "sentences": (*both, "pooling")}.items():
        arms = [arm for arm in part.arms if arm.labels == kind]
        tried = [{getattr(arm, knob) for arm in arms} for knob in knobs]
        assert all(len(values) >= 2 for values in tried)
        assert len(arms) == math.prod(map(len, tried))  # each with each


def test_arms_of_a_part_sample_equally_many_answers_and_see_the_same_labels():
    for preset in PRESETS.values():
        for part in preset().parts:
            costs = {(c.steps, c.step_answers, c.seed, c.noise, c.answers) for c in part.cells()}
            assert len(list(part.cells())) == len(costs) * len(part.arms)


@pytest.mark.parametrize("name, yaml, message", (
    ("unknown", "parts:\n- arms:\n  - lamb: 0.9\n", "line 3: parts.0.arms.0: unknown key 'lamb'; "
     "did you mean 'lam'?"),
    ("paid", "parts:\n- arms:\n  - {labels: sentences}\n", "paid was 'token' in arm 'token', "
     "expected 'end'"),
    ("few", "settings:\n  generate:\n    samples: 500\n", "samples was 500, expected at least "
     "2000"),
    ("empty", "parts: []\n", "parts was an empty list"),
    ("twice", "parts:\n- arms: [{name: a}, {name: a}]\n", "the arms were called a, a"),
    ("group", "parts:\n- arms: [{advantage: grpo, responses_per_prompt: 5}]\n", "step_answers was "
     "32, expected a multiple of the 5"),
))  # fmt: skip
def test_a_study_in_a_file_is_checked_like_other_settings(tmp_path, name, yaml, message):
    (tmp_path / "study.yaml").write_text(yaml)
    with pytest.raises(DataError) as caught:
        read_study(str(tmp_path / "study.yaml"))
    assert message in str(caught.value) and "study.yaml" in str(caught.value)


def test_a_study_that_was_written_is_read_as_it_was(tmp_path):
    from tppo.store.yaml_file import write_yaml

    for name, preset in PRESETS.items():
        write_yaml(tmp_path / f"{name}.yaml", plain(preset()))
        assert read_study(str(tmp_path / f"{name}.yaml")) == preset()
    with pytest.raises(DataError, match="expected one of labels, credit"):
        read_study("nothing")


PINNED = {
    "sessions": {"train_users": 12000, "heldout_users": 256, "test_users": 512,
        "transfer_users": 256, "queries": 3, "heldout_share": 0.1, "test_share": 0.2},
    "scratch": {"hidden_size": 64, "intermediate_size": 160, "layers": 2, "heads": 4,
        "vocab_size": 1024, "max_length": 384},
    "sft": {"max_steps": 1500, "max_passes": 50.0, "decay_steps": 700, "final_lr_share":
        0.1, "batch_size": 32, "max_tokens": 65536, "lr": None, "eval_every": 50,
        "patience": 2, "min_delta": 0.003, "prompt_loss": None, "grad_norm": 1.0},
    "generate": {"samples": 4000, "samples_per_session": 4, "max_new_tokens": 0,
        "temperature": 1.0, "batch_size": 256},
    "reward_model": {"epochs": 3, "batch_size": 32, "max_tokens": 65536, "lr": None,
        "heldout_share": 0.1, "repeated_share": 1.0, "local_weight": 0.4, "global_weight":
        0.6, "balance": 3.0, "grad_norm": 1.0},
    "ppo": {"max_passes": None, "minibatch_size": 32, "max_tokens": 65536, "epochs": 2,
        "lr": None, "critic_lr": None, "lr_schedule": "constant", "final_lr_share": 0.0,
        "lr_warmup_steps": 0, "critic_lr_warmup_steps": 0, "critic_warmup_steps": 0,
        "fit_critic": 0, "gamma": 1.0, "clip": 0.2, "value_clip": None, "kl_coef": 0.2,
        "adaptive_kl": None, "adaptive_kl_horizon": 10000.0, "target_kl": None, "reward":
        "expected", "reward_values": [0.0, -0.5, 0.5], "length_alpha": 2.0, "format_cost":
        3.0, "train_on_unlabelled": True, "bootstrap_truncated": None, "normalize": True,
        "grad_norm": 1.0},
}  # fmt: skip


def test_a_new_option_leaves_outcomes_as_they_were_and_a_changed_value_does_not(monkeypatch):
    study = PRESETS["seconds"]()
    settings = study.settings

    def mark(**changes):
        return replace(study, settings=replace(settings, **changes)).mark

    changed = [mark(prefix="dense"), mark(scratch=replace(settings.scratch, layers=1)),
               mark(ppo=replace(settings.ppo, kl_coef=0.3)), replace(study, material_seed=0).mark,
               mark(sft=replace(settings.sft, lr=0.01)), replace(study, users=8).mark,
               PRESETS["small"]().mark]  # fmt: skip
    assert len({study.mark, *changed}) == len(changed) + 1
    assert replace(study, parts=study.parts[:1]).mark == study.mark  # cells say what they are
    unread = {"ser": SERConfig(rounds=9), "eval": EvalConfig(temperatures=(0.3,))}
    assert mark(report_to="wandb", **unread) == study.mark

    # The marks of a version that does not know some options yet.
    late, before = {"kl_coef", "prefix", "lora", "pit", "material_seed"}, study.mark
    monkeypatch.setattr(config, "fields", lambda of: [f for f in fields(of) if f.name not in late])
    assert study.mark == before
    assert mark(sft=replace(settings.sft, lr=0.01)) == changed[4]


def test_where_a_default_changes_that_outcomes_depend_on_their_mark_does():
    """Marks are of values that are no defaults: with another default the old ones must not hold."""
    shipped = plain(StudyConfig())["settings"]
    there = {f"{name}.{key}": shipped[name][key] for name, keys in PINNED.items() for key in keys}
    pinned = {f"{name}.{key}": keys[key] for name, keys in PINNED.items() for key in keys}
    assert (DEFAULTS, there) == (2, pinned), "raise DEFAULTS in stages/study/config.py by one"


def test_noise_on_the_command_line():
    assert read_noise("words=.088,sentences=.19") == PAPER
    assert read_noise("words=.1") == Noise(words=0.1)
    for bad in ("words", "words=x", "letters=.1", "words=.1,words=.2", "words=1.5"):
        with pytest.raises(DataError):
            read_noise(bad)
    noisy = PRESETS["small"]().with_noise(Noise(words=0.5))
    assert {cell.noise for cell in noisy.cells()} == {Noise(), Noise(words=0.5)}


def test_noise_flips_as_many_labels_as_it_says_and_the_same_ones_for_every_arm():
    sessions = generate_sessions(SessionsConfig(600, 1, 1, 1), 0).train
    labels = [label_by_rule(s.id, "\n".join(s.targets), s.targets[:1], 0.6) for s in sessions]
    noisy = [with_noise(label, PAPER, 3) for label in labels]
    words = [a != b for x, y in zip(labels, noisy, strict=True)
             for a, b in zip(x.words, y.words, strict=True)]  # fmt: skip
    sentences = [x.sentence != y.sentence for x, y in zip(labels, noisy, strict=True)]
    assert abs(sum(words) / len(words) - 0.088) < 0.01
    assert abs(sum(sentences) / len(sentences) - 0.19) < 0.05
    assert noisy == [with_noise(label, PAPER, 3) for label in labels]
    assert labels == [with_noise(label, Noise(), 3) for label in labels]


def test_a_label_by_word_costs_more_tokens_than_one_of_the_whole():
    sessions = generate_sessions(SessionsConfig(20, 1, 1, 1), 0).train
    labels = [label_by_rule(s.id, "\n".join(s.targets), s.targets, 0.6) for s in sessions]
    items = [LabelItem(s.id, ["search: a"], list(s.targets), "\n".join(s.targets))
             for s in sessions]  # fmt: skip
    costs = label_costs(items, labels, lambda text: len(text.split()))
    assert costs["words"].written > 3 * costs["sentence"].written
    assert costs["words"].price() == costs["words"].read + 4 * costs["words"].written


def outcome(cell, share, correlated):
    """One whose answers are relevant with a known share, and whose scores are right or reversed."""
    users, shares = 100, [i / 20 for i in range(20)]
    relevant = "".join("1" if u < share * users else "0" for u in range(users))
    row = {"words": 0.5, "distinct_queries": 3.0, "format": 1.0, "kl": 2.0, "length": 15.0}
    last = {"step": cell.steps, "answers": cell.steps * cell.step_answers, **row,
            "relevant": relevant}  # fmt: skip
    begin = {"step": 0, "answers": 0, **row, "relevant": "0" * users}
    scores = shares if correlated else shares[::-1]
    fit = {"explained_variance_after": 0.25} if cell.arm.fit_critic else {}
    return Outcome(cell, {"scores": scores, "shares": shares, "curve": [begin, last],
                          "critic_fit": fit, "seconds": 1.0})  # fmt: skip


def test_closing_figures_of_outcomes_whose_answer_is_known():
    words, sentences = Arm("words"), Arm("sentences", "sentences", paid="end")
    part = Part("labels", (words, sentences), (25, 100, 400, 1600), seeds=(0, 1, 2))
    study = StudyConfig((part, Part("credit", (words, replace(words, name="end", paid="end")))))
    shares = {"words": (0.6, 0.7, 0.8, 0.9), "sentences": (0.4, 0.5, 0.6, 0.7), "end": (0.45,) * 4}
    found = [
        outcome(cell, shares[cell.arm.name][part.answers.index(cell.answers)],
                cell.arm.labels == "words")
        for cell in study.cells()
        if cell.seed < 2 or cell.answers < 1600  # seed 2 is not whole yet
    ]  # fmt: skip
    for n in (1, 2, 5, 9):  # a study is summed up at any time
        assert tables(all_figures(study, found[:n]) | {"label_cost": None}) or n < 2
    figures = all_figures(study, found)
    (setting,) = figures["labels"]
    assert setting["seeds"] == [0, 1]
    assert setting["arms"]["words"]["correlation"][0][0] == pytest.approx(1)
    assert setting["arms"]["sentences"]["correlation"][0][0] == pytest.approx(-1)
    by_words = {row["sentences"]: row["ratio"][0] for row in setting["needed"]["relevance"]}
    assert by_words[400] == pytest.approx(25 / 400) and by_words[1600] == pytest.approx(100 / 1600)
    (credit,) = figures["credit"]
    assert credit["arms"]["words"]["reached"]["0.5"][0] is not None
    shown = markdown(tables(figures | {"label_cost": None}))
    assert "| 1,600 |" in shown and "2 seeds" in shown and "not reached" in shown


def test_a_relevance_beside_which_a_limit_is_broken_is_marked_and_what_more_labels_add_is_told():
    arms = tuple(Arm(name) for name in ("fine", "far", "loose", "repeats"))
    study = StudyConfig((Part("labels", arms, (25, 400), seeds=(0, 1)),))
    found = [outcome(cell, 0.5 + 0.2 * (cell.answers > 25), True) for cell in study.cells()]
    broken = {"far": {"kl": 10.5}, "loose": {"format": 0.85}, "repeats": {"distinct_queries": 2.8}}
    for one in found:
        one.found["curve"][-1].update(broken.get(one.cell.arm.name, {}))
    (setting,) = all_figures(study, found)["labels"]
    table, more, *_ = tables({"labels": [setting], "credit": []})
    row = dict(zip(table.head[1::5], table.rows[0][2::5], strict=True))
    assert {name.split(":")[0] for name, cell in row.items() if cell.endswith("*")} == set(broken)
    assert "SFT: relevance .00, format 1.00, 3.00 distinct queries" in table.note
    assert more.head[1:] == [arm.name for arm in arms] and len(more.rows) == 1
    assert all(cell.startswith(".20 (") for cell in more.rows[0][1:])


def test_arms_that_begin_above_a_level_have_no_ratio_there():
    arms = (Arm("token"), Arm("end", paid="end"), Arm("late", paid="end"))
    study = StudyConfig((Part("credit", arms),))
    found = [outcome(cell, 0.95, True) for cell in study.cells()]
    for one in found[:2]:  # the model that both start from
        one.found["curve"][0]["relevant"] = "1" * 45 + "0" * 55
    figures = all_figures(study, found)
    (credit,) = figures["credit"]
    assert credit["arms"]["token"]["reached"]["0.4"][0] == 0
    assert credit["ratios"]["end"]["0.4"][0] is None and credit["ratios"]["late"]["0.4"][0] == 0
    assert credit["ratios"]["end"]["0.9"][0] == pytest.approx(1)
    assert tables(figures | {"label_cost": None})


def test_an_arm_with_fewer_answers_a_step_has_a_table_of_its_own_and_gains_are_paired():
    """One name at two sizes: the later one does not take the place of the other."""
    arms = (Arm("token"), Arm("PPO++", algorithm="ppo++"))
    parts = (Part("guides", arms, seeds=(0, 1), step_answers=16),
             Part("guides", arms[:1], seeds=(0, 1), step_answers=10))  # fmt: skip
    study = StudyConfig(parts)
    shares = {("token", 16): 0.6, ("PPO++", 16): 0.5, ("token", 10): 0.4}
    found = [outcome(cell, shares[cell.arm.name, cell.step_answers], True)
             for cell in study.cells()]  # fmt: skip
    figures = all_figures(study, found)
    whole, fewer = figures["credit"]
    ends = [(s["arms"]["token"]["answers"][-1], s["arms"]["token"]["relevance"][-1][0])
            for s in (whole, fewer)]  # fmt: skip
    assert ends == [(24 * 16, pytest.approx(0.6)), (24 * 10, pytest.approx(0.4))]
    assert [*whole["gains"]] == ["PPO++"] and fewer["gains"] == {}
    gain, low, high = whole["gains"]["PPO++"]
    assert gain == pytest.approx(-0.1) and low < gain < high < 0
    first, second = tables(figures | {"label_cost": None})
    assert "16 answers a step" in first.title and "10 answers a step" in second.title
    row = dict(zip(first.head, first.rows[1], strict=True))
    assert row["less token's"].startswith("-.10 (-.1")
    assert all(part.seeds == PRESETS["rlgf"]().parts[0].seeds for part in PRESETS["rlgf"]().parts)
    paid = {(arm.labels, arm.paid, arm.algorithm) for part in PRESETS["rlgf"]().parts
            for arm in part.arms}  # fmt: skip
    for labels, at in (("words", "token"), ("words", "end"), ("sentences", "end")):
        assert {(labels, at, name) for name in ("ppo", "ppo++", "aggrevated")} <= paid


def test_arms_without_ppo_have_a_table_of_their_own_and_a_fit_is_shown():
    arms = (Arm("token"), Arm("end", paid="end", fit_critic=400),
            Arm("DPO", method="dpo", labels="pairs"))  # fmt: skip
    study = StudyConfig((Part("credit", arms, seeds=(0, 1)),))
    found = [outcome(cell, 0.5, True) for cell in study.cells()]
    for one in found[2::3]:
        del one.found["curve"][0]
    figures = all_figures(study, found)
    (credit,) = figures["credit"]
    assert [*credit["arms"]] == ["token", "end"] and credit["seeds"] == [0, 1]
    assert credit["others"]["DPO"]["relevance"][0] == pytest.approx(0.5)
    assert credit["critic_fits"] == {"end": {"explained_variance_after": 0.25}}
    # KL is 2 at both ends, and the relevance 0 and .5: 3 nats are nowhere, 2 at the first point.
    assert credit["arms"]["token"]["at_kl"][0] is None
    for one in found:
        one.found["curve"][0]["kl"], one.found["curve"][-1]["kl"] = 0.0, 4.0
    (credit,) = all_figures(study, found)["credit"]
    assert credit["arms"]["token"]["at_kl"][0] == pytest.approx(0.375)  # 3 of 4 nats
    curves, others = tables(figures | {"label_cost": None})
    assert ".25, " not in str(curves.rows[0]) and others.rows[0][0] == "DPO"


@pytest.mark.parametrize("wrong", (
    {"method": "dpo"}, {"method": "best-of-n", "labels": "pairs", "responses_per_prompt": 4},
    {"method": "best-of-n"}, {"advantage": "remax"}, {"algorithm": "lols", "fit_critic": 8},
    {"algorithm": "ppo++", "advantage": "grpo", "responses_per_prompt": 2},
))  # fmt: skip
def test_an_arm_that_is_none_is_refused(wrong):
    with pytest.raises(DataError, match="in arm 'token', expected"):
        Arm(**wrong)


def test_a_chart_is_xml_and_higher_is_up():
    line = Line("a & b", [25, 100, 1600], [0.2, 0.5, 0.9], [0.1, 0.4, 0.8], [0.3, 0.6, 1.0])
    root = ET.fromstring(chart([line], "labelled answers", "relevance", log=True))
    (points,) = [p.get("points") for p in root.iter("polyline")]
    x, y = zip(*(map(float, pair.split(",")) for pair in points.split()), strict=True)
    assert list(x) == sorted(x) and list(y) == sorted(y, reverse=True)
    assert (x[1] - x[0]) * 2 == pytest.approx(x[2] - x[1], abs=0.2)  # two and four doublings


def study_command(out):
    return [sys.executable, "-m", "tppo", "study", "seconds", "--out", str(out), "--workers", "1"]


@pytest.mark.skipif(os.environ.get("TPPO_TEST_FULL") != "1",
                    reason="half a minute, and one of the commands of make faults")
def test_a_killed_study_goes_on_behind_its_last_outcome(tmp_path):
    out, mark = tmp_path / "study", PRESETS["seconds"]().mark
    first = subprocess.Popen(study_command(out), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (out / "outcomes.jsonl").exists() and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 600
    left = [int(pid) for pid in children.stdout.split()]
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left and not any(Path(f"/proc/{pid}").exists() for pid in left)  # no orphan trains on
    kept = (out / "outcomes.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in kept if line.endswith(b"\n")]
    with open(out / "outcomes.jsonl", "ab") as file:
        file.write(b'{"cell": {"arm"')  # a line that a kill has cut

    done = subprocess.run(study_command(out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 15 arms were trained before" in done.stderr
    assert (out / "outcomes.jsonl").read_bytes().startswith(b"".join(kept))
    wanted = PRESETS["seconds"]().cells()
    outcomes = read_outcomes(out, mark)
    assert {o.cell for o in outcomes} == set(wanted) and len(outcomes) == len(wanted)
    fitted = [o for o in outcomes if o.cell.arm.fit_critic]
    assert fitted and all(o.found["critic_fit"]["answers"] for o in fitted)

    found = json.loads((out / "study.json").read_text())
    assert found["trained"] == found["wanted"] == 15 and found["versions"]["torch"]
    assert from_dict(StudyConfig, found["study"]) == PRESETS["seconds"]()
    page = (out / "report.html").read_text()
    assert "src=" not in page and "href=" not in page and page.count("<svg") > 4
    body = page[page.index("<body>") : page.index("</body>") + len("</body>")]
    ET.fromstring(body)
    readme = tmp_path / "evidence.md"
    both = "".join(f"<!-- {m} -->\nold {m}\n<!-- /{m} -->\n" for m in ("study", "real"))
    readme.write_text(f"before\n{both}after\n")
    write_into(out / "study.json", readme, "real")
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old study" in text and "old real" not in text
    assert "| labelled answers |" in text
    with pytest.raises(DataError, match="expected a line"):
        write_into(out / "study.json", _without_marks(tmp_path))


def _without_marks(folder):
    (folder / "plain.md").write_text("nothing\n")
    return folder / "plain.md"


def test_help_loads_no_torch():
    code = ("import sys\nfrom tppo.cli import main\ntry:\n    main(['study', '--help'])\n"
            "except SystemExit:\n    pass\nsys.exit(any(n in sys.modules for n in "
            "('torch', 'transformers', 'tppo_kernels')))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ)  # fmt: skip
    assert done.returncode == 0 and "--workers" in done.stdout


def sleeps(job, place):
    """A job that does not end by itself."""
    time.sleep(600)


def test_a_study_that_is_stopped_ends_the_processes_that_train(tmp_path, monkeypatch):
    """It must not wait until the arms under way are trained, which may take an hour."""

    def stopped(running, return_when):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "perform", sleeps)
    monkeypatch.setattr(work, "wait", stopped)
    before = set(multiprocessing.active_children())
    # As a program that was started by one that ignores the signal; processes inherit that.
    before_term = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    study = PRESETS["seconds"]()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(work._outcomes(work.Place(study, tmp_path, None), study.cells(), 1))
    finally:
        signal.signal(signal.SIGTERM, before_term)
    (process,) = set(multiprocessing.active_children()) - before or {None}
    if process is not None:
        # A thread of the pool may be told of the end instead, so `join` can come back early.
        deadline = time.monotonic() + 300  # less than it would sleep
        while process.exitcode is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
