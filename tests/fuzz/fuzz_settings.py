"""Files of settings and what a run folder says of itself: manifests, locks, hashes, checkpoints.

Settings are read to a configuration that is written and read again unchanged, or refused by
DataError that names file and, inside the document, the line. A manifest that anybody changed never
ends in anything but an answer: the stage is whole, or it runs again for a reason that is named.
"""

import contextlib
import json
import math
import shutil
from typing import Any

from files import folder
from guided import REFUSED, Target, Wrong

from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.options import Options
from tppo.settings import from_dict
from tppo.store.checkpoint import load_latest
from tppo.store.folder_lock import holder
from tppo.store.jsonl import plain, read_object
from tppo.store.run_folder import MANIFEST, RunFolder
from tppo.store.yaml_file import commented_yaml, read_yaml, write_yaml


def numbers(value: Any) -> list[float]:
    """All numbers of a tree."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float) else []


def settings(data: bytes) -> str | None:
    path = folder() / "run.yaml"
    path.write_bytes(data)
    try:
        values, line_of = read_yaml(path)
        values = {} if values is None else values
        whole = isinstance(values, dict) and "settings" in values
        made: Any = from_dict(Options if whole else Config, values, str(path), line_of)
    except DataError as error:
        if not all(line.startswith(str(path)) for line in str(error).splitlines()):
            raise Wrong(f"a message that does not name the file: {error}") from error
        return REFUSED
    with contextlib.suppress(DataError):
        fill_defaults(made.settings if whole else made, pretrained=True)
    tree = plain(made)
    if any(not math.isfinite(n) for n in numbers(tree)):
        raise Wrong(f"a number that is not finite: {tree}")
    if data[-1:] != b"\n":  # the whole configuration takes a while to be read twice
        return None
    write_yaml(path, tree)
    if from_dict(type(made), *read_yaml(path)[:1]) != made:
        raise Wrong(f"{made} is another one when it is read again")
    path.write_text("\n".join(commented_yaml(tree, lambda place: f"of {place}")))
    if from_dict(type(made), *read_yaml(path)[:1]) != made:
        raise Wrong(f"{made} is another one when it is read again with comments")
    return None


def any_yaml(data: bytes) -> str | None:
    """What YAML holds, and the line of each value, against the document itself."""
    path = folder() / "any.yaml"
    path.write_bytes(data)
    try:
        value, line_of = read_yaml(path)
    except DataError as error:
        if not str(error).startswith(str(path)):
            raise Wrong(f"a message that does not name the file: {error}") from error
        return REFUSED
    lines = data.count(b"\n") + data.count(b"\r") + 20 * data.count(b"\xc2\x85") + len(data)
    for key in value if isinstance(value, dict) else ():
        if isinstance(key, str) and not 1 <= (line_of([key]) or 0) <= lines + 1:
            raise Wrong(f"line {line_of([key])} of {key!r}")
    return None


def run_folder(data: bytes) -> str | None:
    """The manifest of a finished stage, and of one that was stopped, replaced by anything."""
    root = folder() / "run"
    shutil.rmtree(root, ignore_errors=True)
    run = RunFolder(root)
    source = folder() / "input"
    source.write_text("input")
    with run.stage("sft", [source], {"lr": 0.1, "list": [1, 2]}, 3) as out:
        (out / "weights").write_text("weights")
    path = run.path("sft") / MANIFEST
    truth = json.loads(path.read_text())
    given = data.replace(b"HASH-OF-INPUT", truth["inputs"][0]["sha256"].encode()).replace(
        b"HASH-OF-WEIGHTS", truth["outputs"]["weights"]["sha256"].encode()
    )
    path.write_bytes(given)
    changes = run.changes("sft", [source], {"lr": 0.1, "list": [1, 2]}, 3)
    found = read_object(path)
    if (changes == []) != same(found, truth):
        raise Wrong(f"changes {changes} of {found}, the truth is {truth}")
    with contextlib.suppress(DataError):
        run.verify(run.path("sft") / "weights")
    (root / ".lock").write_bytes(given)
    holder(root)
    for name in ("step-1", "step-2"):
        (root / name).mkdir()
        (root / name / "state.json").write_text("{}")
        (root / name / "COMPLETE.json").write_bytes(given)
    if load_latest(root) is not None:
        raise Wrong("a checkpoint without an optimiser is whole")
    (root / "sft.tmp").mkdir()
    (root / "sft.tmp" / "checkpoints").mkdir()
    (root / "sft.tmp" / MANIFEST).write_bytes(given)
    with run.stage("sft", [source], {"lr": 0.1, "list": [1, 2]}, 3, resume=True) as out:
        (out / "weights").write_text("weights")
    if run.changes("sft", [source], {"lr": 0.1, "list": [1, 2]}, 3):
        raise Wrong("a stage that ran again is not finished")
    return REFUSED if changes else None


def same(found: Any, truth: Any) -> bool:
    """Whether a manifest is of this work: inputs by their hashes, and outputs that are there."""
    if not isinstance(found, dict) or not isinstance(found.get("outputs"), dict):
        return False
    inputs, outputs = found.get("inputs"), found["outputs"]
    if not isinstance(inputs, list) or any(not isinstance(x, dict) for x in inputs):
        return False
    if any(not isinstance(x.get("path"), str) for x in inputs):
        return False
    own = [x.get("sha256") for x in inputs] == [x["sha256"] for x in truth["inputs"]]
    kept = all(
        isinstance(x, dict) and type(x.get("nbytes")) is int and x == {**x, **entry}
        for name, x in outputs.items()
        for entry in [truth["outputs"].get(name)]
        if entry
    )
    return (
        own
        and kept
        and set(outputs) <= set(truth["outputs"])
        and "seed" in found
        and found.get("config") == truth["config"]
        and found["seed"] == truth["seed"]
    )


def settings_examples() -> list[bytes]:
    path, found, parts = folder() / "example.yaml", [], plain(Config())
    for key in ("ppo", "sft", "label", "model", "lora", "sessions", "generate", "eval"):
        whole = {"seed": 3, "settings": {key: parts[key]}}
        found.append(json.dumps(whole, indent=1).encode())
        path.write_text("\n".join(commented_yaml({key: parts[key]}, lambda place: "why")))
        found.append(path.read_bytes())
    return [*found, b"ppo: {lr: 1e-5}\nsft:\n  lr: 5.0e-3 # c\n", b"{}", b"&a [*a]"]


def manifest_examples() -> list[bytes]:
    whole = {
        "inputs": [{"path": "../input", "sha256": "HASH-OF-INPUT"}],
        "config": {"lr": 0.1, "list": [1, 2]},
        "seed": 3,
        "seconds": 0.0,
        "versions": {},
        "outputs": {"weights": {"nbytes": 7, "sha256": "HASH-OF-WEIGHTS"}},
    }
    complete = {"step": 1, "files": {"state.json": {"nbytes": 2, "sha256": "x"}}}
    lock = {"pid": 1, "host": "h", "command": "c", "since": "s"}
    return [json.dumps(x, indent=2).encode() for x in (whole, complete, lock)]


_SETTINGS = ("tppo/settings", "tppo/store/", "tppo/config", "/config.py", "tppo/options")
TARGETS = [
    Target(
        "settings",
        settings,
        3_000,
        settings_examples,
        _SETTINGS,
        (b"null", b"1e999", b".nan", b"- ", b": ", b"true", b"0x10", b"1_000", b"!!python/x"),
    ),
    Target(
        "YAML",
        any_yaml,
        2_500,
        lambda: [
            b"a: 1\nb:\n  - c\n  - {d: e}\nf: |\n  text\n",
            b"&x {a: *x}",
            b"a: &b [1, *b]\n",
            b"? a\n: b",
            b'{"a": [1, 2, {"b": null}]}',
        ],
        _SETTINGS,
        (b"&a ", b"*a", b"<<: ", b"--- ", b"%YAML 1.1"),
    ),
    Target(
        "run folder",
        run_folder,
        4_000,
        manifest_examples,
        ("tppo/store/",),
        (b"HASH-OF-INPUT", b"HASH-OF-WEIGHTS", b'"outputs"', b"../../"),
    ),
]
