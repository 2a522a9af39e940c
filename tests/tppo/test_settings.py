"""Settings: one check for YAML, flags and Python; what is written reads back; places are named."""

import dataclasses
import json
import re
import subprocess
import sys
from itertools import pairwise
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo.cli import main
from tppo.config import Config
from tppo.methods.config import PPOConfig
from tppo.options import Options
from tppo.settings import from_dict
from tppo.store.jsonl import DataError, plain
from tppo.store.yaml_file import read_yaml, write_yaml

WRONG = {
    "ppo: {reward: max}": "line 1: field 'ppo.reward': was 'max', expected 'argmax' or 'expected'; "
    "did you mean 'argmax'?",
    "ppo:\n  normalize: 'off'": "line 2: field 'ppo.normalize': was 'off', expected true or false",
    "ppo:\n  normalize: off": "line 2: field 'ppo.normalize': was 'off', expected true or false",
    "ppo:\n  lam: 1\n  steps: \"3\"": "line 3: field 'ppo.steps': was '3', expected a whole number",
    "ppo:\n  steps: 3.5": "line 2: field 'ppo.steps': was 3.5, expected a whole number",
    "ppo:\n  steps: yes": "line 2: field 'ppo.steps': was 'yes', expected a whole number",
    "ppo:\n  steps: true": "line 2: field 'ppo.steps': was True, expected a whole number",
    "ppo:\n  lr: fast": "line 2: field 'ppo.lr': was 'fast', expected a number, or null",
    "ppo:\n  lr: 0": "line 2: field 'ppo.lr': was 0, expected more than 0, or null",
    "ppo:\n  lr: .nan": "line 2: field 'ppo.lr': was nan, expected a finite number, or null",
    "ppo:\n  lr: 1e400": "line 2: field 'ppo.lr': was inf, expected a finite number, or null",
    "ppo:\n  reward_values: [0, 1]": "line 2: field 'ppo.reward_values': was .0, 1., expected 3 v",
    "ppo:\n  reward_values:\n  - 0\n  - x\n  - 2": "line 4: field 'ppo.reward_values.1': was 'x'",
    "ppo:\n  stepz: 3": "line 2: ppo: unknown key 'stepz'; did you mean 'steps'",
    "pop: {}": "line 1: unknown key 'pop'; did you mean 'ppo'",
    "\n\nprefix: shard": "line 3: field 'prefix': was 'shard', expected 'shared' or 'dense'; did",
    "label:\n  labeller: rul": "line 2: field 'label.labeller': was 'rul', .*did you mean 'rule'",
    "sessions:\n  read: {format: aoll}": "line 2: field 'sessions.read.format': .* mean 'aol'",
    "sft: 3": "line 1: field 'sft': was 3, expected a mapping of settings",
    "[1]": r"line 1: was \[1\], expected a mapping of settings",
    "settings: {}\nseed: -1": "line 2: field 'seed': was -1, expected at least 0",
    "settings: {}\ndevice: gpu": "line 2: device: was 'gpu', expected auto, cpu, cuda or cuda:N",
    "settings: {}\nthreads: 0": "line 2: field 'threads': was 0, expected at least 1, or null",
    "settings: {ppo: {lr: x}}": "line 1: field 'settings.ppo.lr': was 'x'",
    "eval: {temperatures: []}": "line 1: field 'eval.temperatures': was .., expected at least 1",
    "scratch:\n  heads: 3": "line 1: scratch: hidden_size, heads were 64, 3, expected a hidden_si",
    "sessions:\n  heldout_share: 0.8\n  test_share: 0.2": "line 1: sessions: heldout_share, test_s",
    "ppo: {lr: 1}\nsft: {}\nppo: {lam: 1}": "line 3: 'ppo' again, which line 1 has too",
    "sft: {lr: 1, lr: 2}": "line 1: 'sft.lr' again, which line 1 has too",
    "? [a]\n: 1": "line 1: the key of a mapping was a list",
    "sft: &a {lr: *a}": "line 1: an alias that holds itself",
    "sft: !!python/object/apply:os.getpid []": "line 1: column 6: not YAML: could not determine",
    "sft: [": "line 1: column 7: not YAML",
    "sft: " + "[" * 700: "not YAML: nested too deeply",
    "ppo: {steps: " + "9" * 5000 + "}": "not YAML: Exceeds the limit",
    "ppo: {steps: " + "9" * 50 + "}": "line 1: field 'ppo.steps': was 9+, expected less than 9,22",
    "ppo: {steps: 0x" + "f" * 5000 + "}": "Exceeds the limit",
    "label: {endpoint: {max_dropped: 500%}}": "line 1: field 'label.endpoint.max_dropped': was 5",
    "label: {endpoint: {max_dropped: x%}}": "line 1: field 'label.endpoint.max_dropped': was 'x%'",
    "a: \0": "not YAML: unacceptable character",
    "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(f"{y}: &{y} [{', '.join(['*' + x] * 8)}]\n" for x, y in pairwise("abcdefghi")):
    "holds more than 100,000 values",
    "settings: {}\nout: ''": "line 2: out: was '', expected a path",
}


@pytest.mark.parametrize(("content", "message"), WRONG.items(), ids=lambda text: text[:30])
def test_what_is_wrong_in_a_yaml_file_is_refused_with_its_place(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(SystemExit, match=rf"^tppo: .*c\.yaml: {message}"):
        main(["run", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_every_wrong_value_is_told_at_once_and_no_secret(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "ppo:\n  steps: 0\n  lam: 2\nlabel: {endpoint: {api_key: s3cret}}"
    )
    with pytest.raises(SystemExit) as stopped:
        main(["data", "--config", str(tmp_path / "c.yaml")])
    lines = str(stopped.value).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"tppo: {tmp_path}") for line in lines)
    assert "s3cret" not in str(stopped.value) and "did you mean 'api_key_env'" in lines[2]
    assert "line 2: field 'ppo.steps'" in lines[0]
    (tmp_path / "c.yaml").write_bytes(b"ppo: \xff")
    with pytest.raises(SystemExit, match=r"c\.yaml: not YAML: 'utf-8' codec can't decode byte"):
        main(["data", "--config", str(tmp_path / "c.yaml")])


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    (tmp_path / "c.yaml").write_text("ppo: {lr: 5e-6, kl_coef: 1E-2, steps: 010, lam: 1}\n")
    config = from_dict(Config, read_yaml(tmp_path / "c.yaml")[0])
    assert (config.ppo.lr, config.ppo.kl_coef, config.ppo.steps) == (5e-6, 1e-2, 10)
    assert type(config.ppo.lam) is float


def test_a_share_may_be_a_percentage(tmp_path):
    (tmp_path / "c.yaml").write_text("label: {endpoint: {max_dropped: 7%}}\n")
    config = from_dict(Config, read_yaml(tmp_path / "c.yaml")[0])
    assert config.label.endpoint.max_dropped == 0.07


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ppo.lr", "0"], "field 'lr': was 0.0, expected more than 0, or None"),
        (["--ppo.lr", "nan"], "field 'lr': was nan, expected a finite number, or None"),
        (["--ppo.steps", "0"], "field 'steps': was 0, expected at least 1"),
        (["--label.endpoint.concurrency", "0"], "field 'concurrency': was 0, expected at le"),
        (["--targets", "0"], "field 'targets': was 0, expected at least 1"),
        (["--threads", "0"], "field 'threads': was 0, expected at least 1, or None"),
        (["--device", "tpu"], "device: was 'tpu', expected auto, cpu, cuda or cuda:N"),
        (["--seed", "-1"], "field 'seed': was -1, expected at least 0"),
        (["--reward-model.model", " "], "field 'model': was ' ', expected a text that is not bl"),
    ],
)
def test_flags_are_held_to_the_same(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main(["data", "--out", str(tmp_path / "out"), *flags])
    said = re.sub(r"[│\s]+", " ", capsys.readouterr().err)
    assert stopped.value.code == 2 and message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--out", "--data", "--model", "--config"])
def test_a_path_that_is_empty_is_not_the_current_folder(flag):
    """As `--out "$OUT"` gives it where the variable is not set."""
    with pytest.raises(SystemExit, match=f"^tppo data: {flag} was '', expected a path"):
        main(["data", flag, ""])


MAY_BE_EMPTY = {f"settings.{section}.endpoint.{name}"
                for section in ("label", "eval") for name in ("base_url", "model")}  # fmt: skip
MAY_BE_EMPTY |= {"settings.guide.base_url", "settings.guide.name"}
MAY_BE_EMPTY |= {"settings.reward_server.base_url", "settings.reward_server.name"}


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "", [], {}, True])
def test_what_no_setting_means_is_refused_by_every_setting(value):
    for place, hint in LEAVES:
        name, values = ".".join(place), value
        for part in reversed(place):
            values = {part: values}
        fits = value is True and bool in (hint, *get_args(hint))
        if fits or value == "" and name in MAY_BE_EMPTY:
            from_dict(Options, values)
            continue
        with pytest.raises(DataError, match=rf"config: (field '{name}'|{name}): was "):
            from_dict(Options, values)


def test_python_is_held_to_the_same():
    with pytest.raises(ValueError, match="field 'lr': was -1.0, expected more than 0, or None"):
        PPOConfig(lr=-1.0)
    with pytest.raises(ValueError, match="field 'gamma': was 1.5, expected at most 1"):
        dataclasses.replace(PPOConfig(), gamma=1.5)
    with pytest.raises(ValueError, match="unknown key 'stepz'; did you mean 'steps'"):
        PPOConfig(stepz=3)


def leaves(kind: type, place: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    """(place, type) of every setting."""
    hints = get_type_hints(kind)
    return [
        leaf
        for name in (field.name for field in dataclasses.fields(kind))
        for leaf in (
            leaves(hints[name], (*place, name))
            if dataclasses.is_dataclass(hints[name])
            else [((*place, name), hints[name])]
        )
    ]


LEAVES = leaves(Options)
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, -1, 0.5, 1.0, -0.0, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", " ", "3", "5e-6", "off", "null", "é\x85\u2028", "a: b", "#", "~"]),
    st.sampled_from([[], [1], [0, 1, 2], [0.5, None, 1], {}, {"a": 1}, None, True, 1e-320]),
    st.sampled_from([2**63 - 1, 2**63, -(2**70)]),
    st.integers(), st.floats(), st.text(max_size=8), st.booleans(),
)  # fmt: skip


@st.composite
def documents(draw) -> dict:
    """Options as a file may hold them: some settings, with values of any kind."""
    document: dict = {"settings": {}}
    for place, hint in draw(st.lists(st.sampled_from(LEAVES), max_size=4)):
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        here = document
        for part in place[:-1]:
            here = here.setdefault(part, {})
        here[place[-1]] = draw(st.one_of(VALUES, st.sampled_from(choices)) if choices else VALUES)
    return document


@settings(max_examples=100, deadline=None)
@given(documents())
def test_any_value_of_any_setting_is_refused_by_place_or_reads_back(tmp_path_factory, document):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    write_yaml(path, document)
    values, line_of = read_yaml(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        options = from_dict(Options, values, str(path), line_of)
    except DataError as error:
        for message in str(error).split(f"{path}: ")[1:]:
            found = re.match(r"line (\d+): (?:field '([a-z_.0-9]+)'|([a-z_.]+)): ", message)
            assert found, message
            names = [part for part in (found[2] or found[3]).split(".") if not part.isdigit()]
            text = lines[int(found[1]) - 1].strip()
            assert text.startswith((f"{names[-1]}:", "-")), (message, text)
        return
    write_yaml(path, plain(options))
    again, line_of = read_yaml(path)
    assert from_dict(Options, again, str(path), line_of) == options


def test_the_defaults_read_back(tmp_path):
    write_yaml(tmp_path / "run.yaml", plain(Options()))
    assert from_dict(Options, read_yaml(tmp_path / "run.yaml")[0]) == Options()


def test_config_takes_the_file_that_a_run_wrote(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    sizes = [f"--sessions.{name}-users=3" for name in ("train", "heldout", "test", "transfer")]
    main(["data", "--out", str(first), "--seed", "7", "--ppo.lr", "5e-6", "--threads", "1", *sizes])
    main(["data", "--config", str(first / "run.yaml"), "--out", str(second), "--ppo.lam", "1"])
    name = "data/train.jsonl"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    old, new = (from_dict(Options, read_yaml(f / "run.yaml")[0]) for f in (first, second))
    assert new.settings.ppo == dataclasses.replace(old.settings.ppo, lam=1.0) and new.seed == 7


def test_help_loads_no_torch():
    code = (
        "import sys; from tppo.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == []
