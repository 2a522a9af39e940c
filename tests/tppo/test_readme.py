"""The figures of README.md and of the pages of studies are those of the files in docs/studies."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tppo.cli import main
from tppo.errors import DataError
from tppo.labels.config import ENOUGH
from tppo.stages.study.readme import demo, evidence, write_readme
from tppo.stages.study.summary import write_into

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
STUDIES = DOCS / "studies"
REMEDY = "README.md: `tppo study readme`; a page: `tppo study write`"


def read(name):
    return json.loads((STUDIES / f"{name}.json").read_text())


def test_the_readme_says_what_the_committed_studies_say(tmp_path, monkeypatch):
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["study", "readme", "--studies", str(STUDIES)])
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), REMEDY


@pytest.mark.parametrize("mark", [path.stem for path in sorted(STUDIES.glob("*.json"))
                                  if path.stem != "demo"])  # fmt: skip
def test_the_pages_show_the_tables_of_the_committed_studies(mark, tmp_path):
    pages = [page for page in DOCS.glob("*.md") if f"<!-- {mark} -->" in page.read_text()]
    assert pages
    for page in pages:
        copied = Path(shutil.copy(page, tmp_path))
        write_into(STUDIES / f"{mark}.json", copied, mark)
        assert copied.read_text() == page.read_text(), REMEDY


def test_other_figures_leave_other_sentences():
    labels, credit = read("labels"), read("credit")
    said = evidence(labels, credit)
    (setting,) = [s for s in credit["figures"]["credit"]
                  if s["queries"] == 3 and s["question"] == "credit"]  # fmt: skip
    for level in setting["ratios"]["end, critic fitted"]:
        setting["ratios"]["end, critic fitted"][level] = [0.97, 0.85, 1.14]
    fitted = evidence(labels, credit)
    assert ".97 (.85 to 1.14) with its critic fitted" in fitted
    assert "old answers, which may be none less." in fitted
    for arm, value in {"token": 0.9, "end": 0.1}.items():
        setting["arms"][arm]["at_kl"] = [value, value - 0.05, value + 0.05]
    assert "(not told apart) at KL 3" not in evidence(labels, credit)
    for found in labels["figures"]["labels"]:
        for row in (row for rows in found["needed"].values() for row in rows):
            row["ratio"] = [row["smallest"], row["smallest"], 0.5]
    assert evidence(labels, credit).count("at most ") == 4
    labels["figures"]["label_cost"]["templates"]["words"]["price"] *= 2
    assert evidence(labels, credit) != said


def test_as_many_labels_are_called_enough_as_the_study_found(capsys):
    said = evidence(read("labels"), read("credit"))
    found = re.search(r"([\d,]+) by word do what", said)
    assert int(found[1].replace(",", "")) <= ENOUGH, "labels/config.py: ENOUGH, and what quotes it"
    assert f"{ENOUGH} answers labelled by word" in (DOCS / "labelling-endpoints.md").read_text()
    main(["plan", "--shape", "0.5B"])
    assert f"{ENOUGH} answers are enough to begin with" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["label", "--help"])
    assert f"--generate.samples {ENOUGH}" in " ".join(capsys.readouterr().out.split())


def test_the_demo_s_rows_are_those_of_its_results(tmp_path):
    results = read("demo")["results"]
    lines = demo(results).splitlines()
    ppo = next(line for line in lines if "**token-level PPO**" in line)
    tppo = results[0]["tppo"]
    assert f"**{tppo['relevance']:.3f}".replace("0.", ".") in ppo
    results[0]["training"]["reached"] = {"0.8": 25, "0.9": None}
    paid = dict(tppo, training={"reached": {"0.8": 30, "0.9": 35}}, relevance=0.5)
    results[0] |= {"paid_at_end": paid, "sentence_labels": paid}
    lines = demo(results).splitlines()
    ends = [line.split(" | ")[-1] for line in lines if "**token-level" in line or "fitted" in line]
    assert ends == ["25, never |", "30, 35 |", "30, 35 |"]
    for row in (0, 1):
        run = tmp_path / f"run-{row}"
        run.mkdir()
        one = results[0] | {"test": results[0]["test"] | {"seed": 1 - row}}
        (run / "result.json").write_text(json.dumps(one))
    for name in ("labels", "credit"):
        shutil.copy(STUDIES / f"{name}.json", tmp_path)
    page = tmp_path / "page.md"
    marks = "<!-- demo -->\n<!-- /demo -->\n<!-- evidence -->\nbefore\n<!-- /evidence -->"
    page.write_text(marks)
    write_readme(tmp_path, page, [tmp_path / "run-0", tmp_path / "run-1"])
    assert "| PPO, seed 1 |" in page.read_text() and "before" not in page.read_text()
    page.write_text("no mark")
    with pytest.raises(DataError, match="expected a line <!-- demo -->"):
        write_readme(tmp_path, page)
    with pytest.raises(DataError, match="no such file"):
        write_readme(tmp_path / "nowhere", page)
