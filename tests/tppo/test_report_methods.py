"""report.html of a run with the baselines, SER, PIT and a guide: their curves are their files'."""

from dataclasses import replace

import pytest
from pages import Page
from test_report import curves_of_files, figures_of_files
from test_ser_run import TINY

from tppo.config import fill_defaults
from tppo.methods.config import PITConfig, RLGFConfig, SERConfig, SFTConfig
from tppo.models.config import GenerateConfig
from tppo.sessions.config import SessionsConfig
from tppo.stages.report.found import sources
from tppo.stages.report.page import write_report
from tppo.stages.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = replace(
    TINY,
    algorithm="lols",
    sessions=SessionsConfig(120, 6, 6, 1),
    sft=SFTConfig(max_steps=80, eval_every=80),
    generate=GenerateConfig(samples=120, max_new_tokens=16),
    reward_model=replace(TINY.reward_model, epochs=1, repeated_share=0.0),
    ppo=replace(TINY.ppo, steps=2, batch_size=4, minibatch_size=4, epochs=1),
    rlgf=RLGFConfig(tau=0.5),
    ser=SERConfig(labels="words", seed_share=0.6, tau_token=0.5, rounds=1, heldout_share=0.3),
    pit=PITConfig(stage_0=1, stage_1=1, improve_steps=1),
)


def test_curves_of_baselines_ser_pit_and_guides_go_through_their_files(tmp_path):
    run = Run(out=tmp_path, config=fill_defaults(METHODS, pretrained=False))
    for name in ("data", "sft", "generate", "label", "map", "train-rm", "train", "baselines",
                 "ser", "ser-train", "pit", "improve"):  # fmt: skip
        run.perform(name)
    text = write_report(tmp_path).read_text()
    ppo = [f"{file}#episode,objective/scores" for file in (
        "train/metrics.jsonl", "baselines/sentence_labels/metrics.jsonl",
        "baselines/paid_at_end/metrics.jsonl", "ser-train/metrics.jsonl",
        "pit/stage-0.jsonl", "pit/stage-1.jsonl",
    )]  # fmt: skip
    assert curves_of_files(tmp_path, text) >= {
        *ppo, "train/metrics.jsonl#step,guide/tokens", "train/metrics.jsonl#step,guide/skipped",
        "baselines/paid_at_end/metrics.jsonl#episode,heldout/relevance",
        "ser/rounds.jsonl#round,accuracy", "ser/rounds.jsonl#round,auc",
        "ser/rounds.jsonl#round,kept_accuracy", "ser/rounds.jsonl#round,trained_on",
        "pit/sft.jsonl#step,heldout_loss", "pit/gap.jsonl#epoch,heldout_loss",
        "improve/steps.json#step,relevance", "improve/steps.json#step,gap",
    }  # fmt: skip
    shown = {attributes["data-source"] for attributes, _ in figures_of_files(tmp_path, text)}
    assert {"ser/report.json#/all_labels/auc", "ser/report.json#/true_labels/trained_on"} <= shown
    headings = Page(text).held_by("h3")
    for wanted in ("baselines: labels of whole answers", "baselines: the same rewards at the end",
                   "ser", "ser-train", "pit: stage 1, references of the policy",
                   "pit: gap model", "improve"):  # fmt: skip
        assert wanted in headings
    watched = {path.removeprefix(f"{tmp_path}/") for path, _ in sources(tmp_path)}
    assert {"pit/stage-1.jsonl", "improve/steps.json", "ser/rounds.jsonl"} <= watched
    (tmp_path / "ser").rename(tmp_path / "ser.tmp")  # as it is while the rounds go on
    assert "ser, under way" in Page(write_report(tmp_path).read_text()).held_by("h3")
