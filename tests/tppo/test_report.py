"""report.html: its figures are those of the files, nothing in it acts, and it fits every screen."""

import html
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import unquote

import pytest
from pages import DARK, HOSTILE, RGB, Page, browse, find_chromium, loads_and_runs_nothing, probed

from tppo.cli import main
from tppo.errors import DataError
from tppo.evaluation.chart import MOST_POINTS, Line, chart
from tppo.stages.report import command
from tppo.stages.report.found import read_folder
from tppo.stages.report.page import report_html, write_report
from tppo.store.folder_lock import FolderLock

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "sessions": {"train_users": 120, "heldout_users": 16, "test_users": 24, "transfer_users": 8},
    "scratch": {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 400},
    "sft": {"max_steps": 20, "eval_every": 5, "decay_steps": 20},
    "generate": {"samples": 64}, "reward_model": {"epochs": 1},
    "ppo": {"steps": 4, "batch_size": 8, "minibatch_size": 8, "checkpoint_every": 2,
            "eval_every": 1, "min_format": 0.0, "max_kl": 100.0, "without_signal": True},
    "eval": {"temperatures": [1.0, 0.5], "heat_users": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    main(["run", "--out", str(folder / "a run"), "--config", str(folder / "tiny.yaml")])
    return folder / "a run"


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def read(path: Path):
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def accept_changes(out: Path, *stages: str):
    """Files of the stages may be others than those that they have written."""
    for name in stages:
        manifest = read(out / name / "manifest.json") | {"outputs": {}}
        (out / name / "manifest.json").write_text(json.dumps(manifest))


def standing_at(out: Path, source: str):
    """What stands in a file at a JSON pointer; a row of a JSONL file is a number."""
    file, _, way = source.partition("#")
    value = read(out / file)
    for key in way.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def in_words(shown: str) -> tuple[float, float]:
    """A number as a page shows it, and what half its last digit is worth."""
    if found := re.fullmatch(r"(?:(\d+) h )?(\d+) min(?: (\d+) s)?", shown):
        hours, minutes, rest = (int(x or 0) for x in found.groups())
        return 3600 * hours + 60 * minutes + rest, 30.0
    text = shown.replace("−", "-").replace(",", "").removesuffix(" s")
    percent = text.endswith(" %")
    digits = text.removesuffix(" %").partition(".")[2]
    scale = 100 if percent else 1
    return float(text.removesuffix(" %")) / scale, 0.5 * 10.0 ** -len(digits) / scale * 1.001


def figures_of_files(out: Path, text: str):
    """(attributes, text) of the figures of a page, each compared with its file."""
    page = Page(text)
    for attributes, shown in page.data:
        value, (read_, half) = standing_at(out, attributes["data-source"]), in_words(shown)
        assert float(attributes["value"]) == value
        if attributes["data-source"].startswith("result.json#/gain") or "/net" in (
                attributes["data-source"]):  # in percentage points
            read_, half = read_ / 100, half / 100
        if "." not in shown and "%" not in shown and value != round(value):  # 1,234 of 1234.4
            half = 0.5
        assert abs(read_ - value) <= half, (attributes, shown)
    return page.data


def test_every_figure_of_the_report_stands_in_its_file(finished):
    data = figures_of_files(finished, (finished / "report.html").read_text())
    files = {attributes["data-source"].partition("#")[0] for attributes, _ in data}
    assert len(data) > 100
    assert files >= {
        "result.json", "heat/tokens.jsonl", "train/samples.jsonl", "sft/manifest.json",
        "train-rm/report.json", "train/metrics.jsonl", "generate/report.json",
    }  # fmt: skip
    result = read(finished / "result.json")
    for name in ("sft", "sft_t0.5", "sft_continued", "tppo", "tppo_transfer", "repeat_last"):
        shown = [s for a, s in data if a["data-source"] == f"result.json#/{name}/relevance"]
        assert f"{result[name]['relevance']:.3f}" in shown


def drawn(text: str):
    """(source, points in the units of the axes, exact points of its dots) of every curve."""
    for svg in re.findall(r"<svg viewBox=\"0 0 400.*?</svg>", text, re.DOTALL):
        root = ET.fromstring(svg)
        first, last, bottom, top = map(float, root.get("data-ends").split())
        for group in root.iter("g"):
            (line,) = group.iter("polyline")
            points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
            x = [first + (px - 50) / 338 * ((last - first) or 1.0) for px, _ in points]
            y = [bottom + (220 - py) / 210 * (top - bottom) for _, py in points]
            dots = [(float(c.get("data-x")), float(c.get("data-y"))) for c in group.iter("circle")]
            near = (last - first or 1) / 338 * 0.06, (top - bottom) / 210 * 0.06
            yield group.get("data-source"), list(zip(x, y, strict=True)), dots, near


def curves_of_files(out: Path, text: str):
    """The sources of all curves of a page, each compared with its file."""
    seen = set()
    for source, points, dots, (dx, dy) in drawn(text):
        if source is None:  # the diagonal of the calibration
            assert dots == [(0.0, 0.0), (1.0, 1.0)]
            continue
        file, _, names = source.partition("#")
        way, _, names = names.rpartition("/") if file == "train-rm/report.json" else ("", "", names)
        rows = read(out / file)[way] if way else read(out / file)
        x, y = names.split(",")
        wanted = [(row[x], row[y]) for row in rows if row.get(x) is not None
                  and row.get(y) is not None]  # fmt: skip
        assert dots == wanted and len(points) == len(wanted) > 0, source
        for (px, py), (wx, wy) in zip(points, wanted, strict=True):
            assert abs(px - wx) <= dx and (abs(py - wy) <= dy or wy < -1), source
        seen.add(source)
    return seen


def test_every_curve_of_the_report_goes_through_the_figures_of_its_file(finished):
    seen = curves_of_files(finished, (finished / "report.html").read_text())
    assert seen >= {
        "train/metrics.jsonl#episode,heldout/relevance", "train/metrics.jsonl#episode,reward/rule",
        "train/metrics.jsonl#heldout/kl,heldout/relevance",
        "train/metrics.jsonl#episode,objective/scores", "train/metrics.jsonl#episode,objective/kl",
        "train/metrics.jsonl#episode,response/length",
        "train/metrics.jsonl#episode,val/explained_variance", "sft/metrics.jsonl#step,heldout_loss",
        "train-rm/metrics.jsonl#epoch,local_loss",
        "train-rm/report.json#calibration/predicted,relevant",
    }  # fmt: skip


def test_the_page_holds_every_part_and_its_links_lead_somewhere(finished):
    text = (finished / "report.html").read_text()
    page = loads_and_runs_nothing(text)
    assert page.held_by("h2") == ["Curves", "SFT and TPPO, token by token", "Samples over training",
                                  "Reward model", "Stages", "Settings"]  # fmt: skip
    assert page.held_by("h1") == ["Report of a run"]
    assert "refresh" not in text and "finished" in page.held_by("span")
    targets = {attributes.get("id") for _, attributes in page.elements}
    for attributes in page.all("a"):
        kind, _, where = attributes["href"].partition("#")
        assert where in targets if not kind else (finished / unquote(kind)).exists(), attributes
    shown = "".join(data for _, data in page.texts)
    assert "95 % interval" in shown and "Of TPPO's answers to 24 held-out users" in shown
    result, manifest = read(finished / "result.json"), read(finished / "train" / "manifest.json")
    for words in (*result["findings"], *manifest["versions"].values(), "ppo.batch_size"):
        assert words in shown
    rows = read(finished / "heat" / "tokens.jsonl")
    assert [row["chosen"] for row in rows] == ["best"] * 2 + ["worst"] * 2 + ["random"] * 2
    tokens = [a for a in page.all("li") if a.get("class", "").startswith("t ")]
    assert len(tokens) == sum(len(row["tokens"]) for row in rows)
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        assert (row["name"], other["name"]) == ("sft", "tppo") and row["id"] == other["id"]
        answer = next(a for a in read(finished / "eval/answers.jsonl") if a["id"] == row["id"])
        for one in (row, other):  # the answers that were judged, not new ones
            letters = [[c for c in text if c.isascii() and c.isalpha()]
                       for text in ("".join(one["tokens"]), answer[one["name"]])]  # fmt: skip
            assert letters[0] == letters[1]
            assert one["figures"] == answer["figures"][one["name"]]
            assert len(one["values"]) == len(one["advantages"]) == len(answer["ids"][one["name"]])


def made_hostile(value):
    if isinstance(value, dict):
        return {key: made_hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [made_hostile(item) for item in value]
    kept = ("eos", "length", "best", "worst", "random", "rule", "sft", "tppo")
    return HOSTILE + "\u202e" if isinstance(value, str) and value not in kept else value


def test_hostile_texts_stay_texts(copied, tmp_path, chromium):
    accept_changes(copied, "heat", "train", "sft")
    for name in ("heat/tokens.jsonl", "train/samples.jsonl", "result.json", "sft/manifest.json"):
        values = made_hostile(read(copied / name))
        lines = values if isinstance(values, list) else [values]
        (copied / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = (copied / "run.yaml").read_text()
    settings = settings.replace("judge: rule", f"judge: {json.dumps(HOSTILE)}")
    (copied / "run.yaml").write_text(settings)
    odd = copied.rename(tmp_path / "<b>&amp;")
    text = write_report(odd).read_text()
    page = loads_and_runs_nothing(text)
    assert "\u202e" not in text and HOSTILE in "".join(data for _, data in page.texts)
    dom = browse(chromium, write_report(odd))
    assert "<img" not in dom and "<script" not in dom and "pwned'\"&gt;" in dom


@pytest.fixture(scope="module")
def chromium():
    return find_chromium()


# In a frame, because a window of Chromium is at least 500 pixels wide.
FRAME = """<!doctype html><meta http-equiv="Content-Security-Policy" content="">
<meta name="color-scheme" content="light dark">
<style>body { margin: 0 } iframe { border: 0; color-scheme: light dark }</style><body>
<iframe style="width: WIDTHpx; height: 900px" srcdoc="PAGE"></iframe></body>"""
LOOK = """
const frame = document.querySelector("iframe"), page = frame.contentDocument;
const wide = frame.contentWindow.innerWidth;
const style = e => frame.contentWindow.getComputedStyle(e);
const found = {wide: page.documentElement.scrollWidth, width: wide,
  page: rgb(style(page.body).backgroundColor),
  loaded: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
  out: Array.from(page.querySelectorAll("main *")).filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > wide + 1 && !e.closest("svg, thead, caption");
  }).map(e => e.outerHTML.slice(0, 120)),
  sides: Array.from(page.querySelectorAll("article .sides")).map(
    e => style(e).gridTemplateColumns.split(" ").length)};
"""


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_page_fits_a_phone_and_a_wall_and_asks_for_nothing(
    finished, chromium, tmp_path, width, mode
):
    text = (finished / "report.html").read_text().replace("<details>", "<details open>")
    frame = FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(text))
    flags = ["--window-size=1500,900", *([DARK] if mode == "dark" else [])]
    found = probed(chromium, tmp_path, frame, RGB + LOOK, *flags)
    assert found["width"] == width and found["wide"] <= width and found["out"] == []
    assert found["loaded"] == []
    assert (sum(found["page"]) < 200) == (mode == "dark")
    assert set(found["sides"]) == {1 if width == 390 else 2}


def test_a_run_under_way_has_a_page_too(copied):
    """A stage that has not finished lies in `train.tmp`; the page says so and loads again."""
    for name in ("eval", "heat"):
        shutil.rmtree(copied / name)
    (copied / "result.json").unlink()
    (copied / "train").rename(copied / "train.tmp")
    manifest = read(copied / "train.tmp" / "manifest.json")
    del manifest["seconds"], manifest["versions"], manifest["outputs"]
    (copied / "train.tmp" / "manifest.json").write_text(json.dumps(manifest))
    stopped = report_html(read_folder(copied))
    assert "refresh" not in stopped and "stopped; the same command goes on" in stopped
    with FolderLock(copied).held():
        page = loads_and_runs_nothing(report_html(read_folder(copied)))
    shown = "".join(data for _, data in page.texts)
    assert page.all("meta", **{"http-equiv": "refresh", "content": "15"})
    assert "at stage train" in shown and "PPO has taken 4 steps" in shown
    assert "relevance of held-out answers after step 4" in shown and "under way" in shown
    assert "Samples over training" in shown and "token by token" not in shown


def test_the_page_is_kept_fresh_while_a_command_works(copied, monkeypatch, capsys):
    monkeypatch.setattr(command, "EVERY_S", 0.02)
    monkeypatch.setattr(command, "WRITING", 1.0)
    accept_changes(copied, "train")
    page = copied / "report.html"
    metrics = copied / "train" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    written = []
    with command.kept_fresh(copied):
        page.unlink()
        metrics.write_text("".join(lines[:2]))
        for _ in range(500):
            if page.exists():
                written.append(page.read_text())
                break
            command.time.sleep(0.02)
        metrics.write_text("".join(lines))
    assert "#episode,objective/kl" in written[0] and page.read_text() != written[0]
    metrics.write_text("{\n")  # damaged: the run goes on, and one line says so
    with command.kept_fresh(copied):
        pass
    assert "report.html could not be written" in capsys.readouterr().err
    with command.kept_fresh(copied / "nothing"):
        pass
    assert capsys.readouterr().err == "" and not (copied / "nothing").exists()


def test_a_page_of_many_rows_is_written_the_less_often(monkeypatch):
    """Late in a long training the page takes seconds, which are those of the training too."""
    clock, waits, takes = [0.0], [], [0.1, 4.0, 20.0]

    class Ended:
        def wait(self, seconds):
            waits.append(seconds)
            return not takes

    def written(out):
        clock[0] += takes.pop(0)

    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(command, "sources", lambda out: len(waits))
    monkeypatch.setattr(command, "_try", written)
    command._follow(Path(), Ended(), 0)
    assert waits == pytest.approx([5.0, 5.0, 80.0, 400.0])


def test_the_command_writes_the_page_and_watches(copied, monkeypatch, capsys):
    (copied / "report.html").unlink()
    main(["report", "--out", str(copied)])
    assert capsys.readouterr().out == f"{copied / 'report.html'}\n"
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 2:
            raise KeyboardInterrupt
        (copied / "report.html").unlink()
        (copied / "result.json").touch()

    monkeypatch.setattr(command.time, "sleep", sleep)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["report", "--out", str(copied), "--watch"])
    assert (copied / "report.html").exists() or len(sleeps) == 1
    for folder, said in ((copied / "no", "no such folder"), (copied / "data", "holds no stage")):
        with pytest.raises(SystemExit, match=said):
            main(["report", "--out", str(folder)])


def test_a_file_that_is_not_the_stages_own_is_named(copied):
    """A flipped bit is another figure, or a traceback where it is in the name of one."""
    for name in ("train-rm/report.json", "train/metrics.jsonl", "train/samples.jsonl",
                 "heat/tokens.jsonl"):  # fmt: skip
        whole = (copied / name).read_bytes()
        (copied / name).write_bytes(whole.replace(b'"', b"'", 1))
        stage = name.partition("/")[0]
        with pytest.raises(DataError, match=f"{name}: not the file that stage {stage} wrote"):
            write_report(copied)
        (copied / name).write_bytes(whole)
    result = read(copied / "result.json")  # beside the stages: nothing says what it was
    (copied / "result.json").write_text(json.dumps({"rows": result}))
    with pytest.raises(DataError, match="copy: result.json, or a file of a stage under way, holds"):
        write_report(copied)
    accept_changes(copied, "train")
    (copied / "train" / "metrics.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="metrics.jsonl: line 1: not JSON"):
        read_folder(copied)


def test_a_long_curve_is_thinned_and_a_negative_one_stays_in_the_frame():
    n = 10 * MOST_POINTS
    long = chart([Line("a", range(n), [math.sin(i / 100) - 5 for i in range(n)])], "x", "y")
    ((_, points, dots, (dx, dy)),) = drawn(long)
    assert len(points) == MOST_POINTS and dots == []  # no room for dots
    assert [points[0][0], points[-1][0]] == pytest.approx([0, n - 1], abs=dx)
    for x, y in points:
        assert y == pytest.approx(math.sin(round(x) / 100) - 5, abs=dy + 5 * dx / 100)
    assert chart([Line("none", [], [])], "x", "y") == ""
    assert ">1</text>" in chart([Line("a", [1, 2], [0, 1])], "epochs", "y")
    assert ">1.2</text>" not in chart([Line("a", [1, 2], [0, 1])], "epochs", "y")
