"""What a training of a week needs: a step late in it costs what an early one does, and what it has
learned of itself outlives a kill."""

import json
import random
import tracemalloc
from dataclasses import replace

import pytest
from test_door import CONFIG, PROMPTS, door, model  # noqa: F401  # a fixture
from test_shared_prefix import new_trainer

from tppo.methods.config import PPOConfig
from tppo.rewards.format import FormatReward
from tppo.stages.journal import Journal
from tppo.stages.kept import part_sizes
from tppo.stages.loop import Loop
from tppo.stages.order import PromptOrder
from tppo.stages.report.found import _rows
from tppo.store.checkpoint import load_latest, save_checkpoint
from tppo.store.rows import RowFile, Rows, read_rows

ROWS = [{"step": n, "loss": 1 / n, "text": "a\u2028\n\u00e9", "none": float("nan")}
        for n in range(1, 6)]  # fmt: skip
READ = [{**row, "none": None} for row in ROWS]


def test_rows_are_what_a_later_process_reads_of_them(tmp_path):
    rows = Rows(ROWS[:3])
    rows.extend(ROWS[3:])
    assert [*rows] == READ and rows[-1] == READ[-1] and rows[1:3] == READ[1:3] and len(rows) == 5
    RowFile(tmp_path / "rows.jsonl").write(rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows != Rows(ROWS[:4])
    save_checkpoint(tmp_path, 5, {}, {}, {"metrics": rows, "best": 3})
    assert load_latest(tmp_path).state == {"metrics": rows, "best": 3}
    assert json.loads((tmp_path / "step-5/state.json").read_text()) == {"best": 3}
    (tmp_path / "step-5/metrics.jsonl").write_text("{}\n")
    assert load_latest(tmp_path) is None  # it is checked as every file of a checkpoint is


@pytest.mark.parametrize("room", [True, False], ids=["in a file", "no room for one"])
def test_rows_beyond_the_newest_are_not_held_in_memory(tmp_path, monkeypatch, capsys, room):
    if not room:
        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.pwrite", full)
    expected = [{"step": n, "text": "\u00e9" * 200} for n in range(2000)]
    rows, before = Rows(), 0
    for n, row in enumerate(expected, 1):
        rows.append(row)
        if n == 200:
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # 1,800 rows of 429 bytes; of each stays where it ends, eight bytes.
    assert (grown < 60_000) == room and (grown > 700_000) != room
    assert ("are held in memory: [Errno 28]" in capsys.readouterr().err) != room
    assert [*rows] == expected and rows[-1] == expected[-1] and rows[-3:] == expected[-3:]
    assert [rows[i] for i in (0, 34, 35, 1999)] == [expected[i] for i in (0, 34, 35, 1999)]
    file = RowFile(tmp_path / "rows.jsonl")
    for n in (1000, 1001, 2000):
        file.write(Rows(expected[:n]))
    assert read_rows(file.path) == rows and rows != Rows(expected[1:])


@pytest.mark.parametrize("rows", [ROWS, Rows(ROWS)], ids=["dicts", "lines"])
def test_a_row_is_written_once(rows, tmp_path):
    journal, path = Journal(tmp_path), tmp_path / "metrics.jsonl"
    journal.write(rows[:2], [{"step": 0}])
    first = path.stat()
    for n in (3, 3, 4):
        journal.write(rows if n > len(rows) else Rows(rows[:n]), [{"step": 0}])
    assert path.stat().st_ino == first.st_ino, "the file is written anew"
    assert [*read_rows(path)] == READ[:4]
    assert [*read_rows(tmp_path / "samples.jsonl")] == [{"step": 0}]


@pytest.mark.parametrize("harm", ["gone", "cut", "longer"])
def test_a_file_that_another_has_changed_is_made_whole(tmp_path, harm):
    file = RowFile(tmp_path / "metrics.jsonl")
    file.write(ROWS[:3])
    if harm == "gone":
        file.path.unlink()
    else:
        text = file.path.read_text()
        file.path.write_text(text[:-5] if harm == "cut" else text + "{}\n")
    file.write(ROWS[:4])
    assert [*read_rows(file.path)] == READ[:4]


def test_a_row_that_is_being_written_is_not_there_yet(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert _rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"st')
    assert _rows(path) == []


def test_the_order_of_prompts_is_one_pass_after_another_and_holds_one():
    rng = random.Random("7/ppo")
    whole = [i for _ in range(40) for i in rng.sample(range(9), 9)]
    order = PromptOrder(9, 7)
    steps = [order.rows(first, 4) for first in range(0, 360, 4)]
    assert [i for step in steps for i in step] == whole
    assert order.rows(0, 20) == whole[:20] and order.rows(301, 30) == whole[301:331]
    assert len(order._pass) == 9


def test_skips_and_parts_outlive_a_kill(model, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Batches skipped in a row, and the tokens that the memory holds, go on where they were."""
    real, seen = Loop.step, []

    def step(self, number):
        sizes = part_sizes(self.trainer)
        seen.append((self.trainer.skips.in_row, *(size.tokens for size in sizes)))
        if len(seen) == 4:
            raise KeyboardInterrupt
        row = real(self, number)
        if number == 2:
            self.trainer.skips.in_row, sizes[0].tokens = 1, 40
        if number == 2 and len(seen) == 2:
            self.save(2)
        return row

    monkeypatch.setattr(Loop, "step", step)
    trainer = door(model, tmp_path, config=replace(CONFIG, checkpoint_every=9))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    saved = tmp_path / "train.tmp/checkpoints/step-2"
    assert [row["step"] for row in read_rows(saved / "metrics.jsonl")] == [1, 2]
    assert "metrics" not in json.loads((saved / "state.json").read_text())
    trainer.train()
    assert seen[4] == (1, 40)
    assert "reads 40 tokens at once, as before" in capsys.readouterr().err
    assert [row["step"] for row in read_rows(tmp_path / "train/metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in trainer.metrics] == [1, 2, 3, 4]


def test_what_the_reward_reads_at_once_is_kept_too():
    ppo = new_trainer("dense", PPOConfig(lr=1e-3, critic_lr=1e-3), 4)
    ppo.reward = FormatReward(ppo.reward, 0.1)
    assert part_sizes(ppo) == [ppo.part_size, ppo.reward.reward.part_size]


class Formed:
    """A judge with a figure that PPO compares with that of the model as it was."""

    name = "formed"

    def __call__(self, answers):
        return {"long": [float(len(text)) for text in answers.texts],
                "format": [1.0] * len(answers.response_ids)}  # fmt: skip


def test_the_first_answers_stand_before_the_later_ones(model, tmp_path):  # noqa: F811
    """Those of the model as it was come first in samples.jsonl, though they are asked for later."""
    door(model, tmp_path, heldout=PROMPTS, judge=Formed()).train()
    steps = [row["step"] for row in read_rows(tmp_path / "train/samples.jsonl")]
    assert steps == sorted(steps) and {0, 2, 4} == set(steps)
