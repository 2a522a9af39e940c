"""Meeting a trainer: is it the one we know, and names in it that are replaced and put back.

The trainers here are packages written to a folder and imported from it.
"""

import importlib
import sys
from types import SimpleNamespace

import pytest

from tppo_kernels.integrations import _peer
from tppo_kernels.integrations._peer import PeerError, Replacements, require, within

SOURCES = {
    "__init__.py": "__version__ = '1.4.2'\n",
    "core.py": (
        "REGISTRY = {}\n"
        "def advantages(rewards, values, lam=0.9):\n    return 'theirs'\n"
        "def loss(values, *, clip):\n    return 'their loss'\n"
        "REGISTRY['gae'] = advantages\n"
        "class Maker:\n"
        "    def make(self, batch):\n        return 'made by them'\n"
        "    @staticmethod\n    def fixed(x):\n        return 'fixed by them'\n"
    ),
    "trainer.py": (
        "from .core import advantages, loss as their_loss\n"
        "def step():\n    return advantages(1, 2), their_loss(1, clip=2)\n"
    ),
    "late.py": "from .core import advantages\ndef run():\n    return advantages(1, 2)\n",
    "broken.py": "import a_package_that_is_not_there\n",
    "raises.py": "raise RuntimeError('no\\nGPU')\n",
}


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A trainer called `oldtrainer`, of which core and trainer are loaded."""
    folder = tmp_path / "oldtrainer"
    folder.mkdir()
    for file, text in SOURCES.items():
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("oldtrainer.trainer")
    for name in [n for n in sys.modules if n.split(".")[0] == "oldtrainer"]:
        del sys.modules[name]


def ours(*_, **__):
    return "ours"


def our_loss(*_, **__):
    return "our loss"


NAMES = {"oldtrainer.core:advantages": "rewards, values, lam",
         "oldtrainer.core:Maker.make": "self, batch", "oldtrainer.core:Maker.fixed": "x",
         "oldtrainer.core:loss": "values, ...", "oldtrainer.core:REGISTRY[gae]": None}
SWAP = {"oldtrainer.core:advantages": ours, "oldtrainer.core:loss": our_loss}


@pytest.mark.parametrize(("version", "versions", "expected"), [
    ("0.9.1", ">=0.9.1,<0.10", True), ("0.9.1.post2", ">=0.9.1,<0.10", True),
    ("0.10.0rc1", ">=0.9.1,<0.10", False), ("0.10.0", "<0.10", False), ("0.9", ">=0.9.0", True),
    ("1.16.0+cpu", "==1.16", True), ("1.9", "<1.16", True), ("1.12.0", ">1.12", False),
    ("2", "<=2.0,!=2.0.0", False),
])
def test_versions_are_compared_as_numbers(version, versions, expected):
    assert within(version, versions) is expected


@pytest.mark.parametrize("versions", ["0.9", "~=1.2", ">=new"])
def test_a_bound_that_is_none_is_an_error(versions):
    with pytest.raises(ValueError, match="is no "):
        within("1.0", versions)


def test_a_trainer_of_the_interface_we_know_gives_its_version(peer):
    assert require("oldtrainer", ">=1.4,<2", NAMES) == "1.4.2"


def test_the_version_of_an_installed_distribution_counts():
    assert require("_pytest", ">=8", distribution="pytest") == pytest.__version__


def complaint(*args, **kwargs):
    with pytest.raises(PeerError) as caught:
        require(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and caught.value.__cause__ is None
    return text


def test_an_absent_trainer_is_one_sentence():
    assert complaint("no_such_trainer", ">=1,<2", distribution="no-such-trainer") == (
        "no_such_trainer is not installed, expected no-such-trainer>=1,<2: "
        "pip install 'no-such-trainer>=1,<2'")


def test_a_version_out_of_range_is_one_sentence(peer):
    assert complaint("oldtrainer", ">=2,<3", NAMES) == (
        "oldtrainer 1.4.2 is installed, expected oldtrainer>=2,<3, whose interface this "
        "integration knows: pip install 'oldtrainer>=2,<3'")


@pytest.mark.parametrize(("name", "parameters", "words"), [
    ("oldtrainer.core:advantage", None, "oldtrainer 1.4.2 has no oldtrainer.core:advantage,"),
    ("oldtrainer.core:Worker.make", None, "has no oldtrainer.core:Worker.make"),
    ("oldtrainer.core:REGISTRY[grpo]", None, "has no oldtrainer.core:REGISTRY[grpo]"),
    ("oldtrainer.core:advantages", "rewards, values, lambd",
     "advantages takes (rewards, values, lam), expected (rewards, values, lambd)"),
    ("oldtrainer.core:advantages", "rewards, values", "takes (rewards, values, lam), expected"),
    ("oldtrainer.core:advantages", "values, ...", "takes (rewards, values, lam), expected"),
    ("oldtrainer.broken:f", None, "oldtrainer.broken does not import here (No module named"),
    ("oldtrainer.gone:f", None, "oldtrainer.gone does not import here (No module named"),
    ("oldtrainer.raises:f", None, "oldtrainer.raises does not import here (RuntimeError: no GPU)"),
])
def test_a_moved_interface_is_one_sentence(peer, name, parameters, words):
    assert words in complaint("oldtrainer", ">=1", {name: parameters})


def test_a_trainer_that_runs_from_its_sources_is_judged_by_its_names(peer):
    del sys.modules["oldtrainer"].__version__
    assert require("oldtrainer", ">=7", NAMES) == "of unknown version"


@pytest.mark.parametrize(("name", "versions", "state", "words"), [
    ("gonetrainer", ">=1", "absent", "gonetrainer is not installed, expected gone-trainer>=1: inst"
     "all it from https://example.org"),
    ("newtrainer", ">=1,<2", "another version", "newtrainer 2.5.0 is installed, expected gone-tra"),
    ("newtrainer", ">=1,<3", "known version", None),
])
def test_the_state_of_a_trainer_is_told_and_nothing_of_it_imported(
        name, versions, state, words, tmp_path, monkeypatch):
    (tmp_path / "newtrainer").mkdir()
    (tmp_path / "newtrainer/__init__.py").write_text("raise RuntimeError('is imported')\n")
    (tmp_path / "gone_trainer-2.5.0.dist-info").mkdir()
    (tmp_path / "gone_trainer-2.5.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: gone-trainer\nVersion: 2.5.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(_peer, "PEERS", {
        name: _peer.Peer(versions, "gone-trainer", "https://example.org")})
    found, = _peer.states()
    why = found.pop("why")
    assert found == {"trainer": name, "installed": None if state == "absent" else "2.5.0",
                     "supported": versions, "state": state}
    assert why is None if words is None else why.startswith(words) and "\n" not in why
    assert name not in sys.modules


def test_what_a_trainer_prints_while_it_is_probed_is_no_part_of_the_report(
        peer, monkeypatch, capsys):
    monkeypatch.setattr(_peer, "PEERS", {"oldtrainer": _peer.Peer(">=1,<2", "oldtrainer")})
    loud = SimpleNamespace(probe=lambda: print("welcome to oldtrainer"))
    monkeypatch.setitem(sys.modules, "tppo_kernels.integrations.oldtrainer", loud)
    assert _peer.states(probe=True)[0]["state"] == "works"
    assert tuple(capsys.readouterr()) == ("", "welcome to oldtrainer\n")


def test_names_are_replaced_wherever_they_were_imported_and_put_back(peer):
    core = sys.modules["oldtrainer.core"]
    theirs = core.advantages
    swap = Replacements("oldtrainer")
    assert swap.install(SWAP) == [] and swap.installed
    assert peer.step() == ("ours", "our loss")
    assert swap.original("oldtrainer.core:advantages") is theirs
    late = importlib.import_module("oldtrainer.late")  # takes ours by name
    assert late.run() == "ours"
    assert swap.undo() == [] and not swap.installed
    assert peer.step() == ("theirs", "their loss") and late.run() == "theirs"
    assert core.advantages is theirs and late.advantages is theirs


def test_installed_twice_and_undone_once_is_as_it_was(peer):
    swap = Replacements("oldtrainer")
    swap.install(SWAP)
    assert swap.install(SWAP) == []
    swap.undo()
    assert peer.step() == ("theirs", "their loss")
    assert swap.undo() == []
    swap.install(SWAP)
    assert peer.step() == ("ours", "our loss")
    swap.undo()


def test_methods_and_items_are_replaced_and_put_back(peer):
    core = sys.modules["oldtrainer.core"]
    swap = Replacements("oldtrainer")
    swap.install({"oldtrainer.core:Maker.make": ours,
                  "oldtrainer.core:Maker.fixed": staticmethod(our_loss),
                  "oldtrainer.core:REGISTRY[tppo]": lambda: "registered",
                  "oldtrainer.core:REGISTRY[gae]": lambda: "a registered estimator"})
    assert core.Maker().make(1) == "ours" and core.Maker().fixed(1) == "our loss"
    assert core.REGISTRY["tppo"]() == "registered"
    assert core.REGISTRY["gae"]() == "a registered estimator"
    swap.undo()
    assert core.Maker().make(1) == "made by them" and core.Maker().fixed(1) == "fixed by them"
    assert isinstance(vars(core.Maker)["fixed"], staticmethod)
    assert core.REGISTRY == {"gae": core.advantages}


def test_an_inherited_method_is_not_there_to_be_replaced(peer):
    """Replacing it in the subclass would leave the base as it was; undoing would copy it."""
    core = sys.modules["oldtrainer.core"]
    core.Sub = type("Sub", (core.Maker,), {"__module__": "oldtrainer.core"})
    assert "has no oldtrainer.core:Sub.make" in complaint(
        "oldtrainer", ">=1", {"oldtrainer.core:Sub.make": None})


def test_what_another_library_put_there_since_is_left_alone_and_named(peer):
    core = sys.modules["oldtrainer.core"]
    theirs = core.advantages
    swap = Replacements("oldtrainer")
    swap.install(SWAP)

    def wraps(*args, **kwargs):
        return "another's"

    wraps.__module__ = "faster.patches"
    core.advantages = wraps
    assert swap.install(SWAP) == [
        "oldtrainer.core:advantages is no longer ours: faster has replaced it"]
    assert core.advantages is wraps
    assert swap.undo() == [
        "oldtrainer.core:advantages stays faster's, which has replaced ours since"]
    assert core.advantages is wraps and peer.advantages is theirs
    assert peer.step() == ("theirs", "their loss")


def test_what_another_library_put_there_before_is_named_and_comes_back(peer):
    core = sys.modules["oldtrainer.core"]

    def before(*args, **kwargs):
        return "another's"

    before.__module__ = "faster.patches"
    core.advantages = before
    swap = Replacements("oldtrainer")
    assert swap.install(SWAP) == [
        "oldtrainer.core:advantages was faster's already, and ours stands over it"]
    assert core.advantages(1, 2) == "ours"
    swap.undo()
    assert core.advantages is before


def test_nothing_is_replaced_where_one_name_is_not_there(peer):
    swap = Replacements("oldtrainer")
    with pytest.raises(PeerError, match="has no oldtrainer.core:Gone.f"):
        swap.install({**SWAP, "oldtrainer.core:Gone.f": lambda: 1})
    assert peer.step() == ("theirs", "their loss") and not swap.installed


def test_two_names_of_two_objects_with_one_replacement_are_refused(peer):
    with pytest.raises(ValueError, match="which hold two objects, get the same one"):
        Replacements("oldtrainer").install(dict.fromkeys(SWAP, ours))
    assert peer.step() == ("theirs", "their loss")


def test_a_function_and_its_entry_in_a_registry_are_replaced_together(peer):
    core = sys.modules["oldtrainer.core"]
    theirs = core.advantages
    swap = Replacements("oldtrainer")
    swap.install(dict.fromkeys(["oldtrainer.core:advantages", "oldtrainer.core:REGISTRY[gae]"],
                               ours))
    assert core.REGISTRY["gae"] is core.advantages is ours
    swap.undo()
    assert core.REGISTRY["gae"] is core.advantages is theirs


def test_other_packages_that_hold_a_name_keep_it(peer, monkeypatch):
    """A user's own module is the user's: only the trainer's modules are changed."""
    users = type(sys)("users_script")
    users.advantages = sys.modules["oldtrainer.core"].advantages
    monkeypatch.setitem(sys.modules, "users_script", users)
    swap = Replacements("oldtrainer")
    swap.install(SWAP)
    assert users.advantages(1, 2) == "theirs"
    swap.undo()


def test_a_loaded_module_calls_back_at_once_and_another_when_it_is_loaded(peer):
    called = []
    _peer.when_imported("oldtrainer.core", lambda: called.append("core"))
    assert called == ["core"]
    before = list(sys.meta_path)
    _peer.when_imported("oldtrainer.late", lambda: called.append(
        sys.modules["oldtrainer.late"].run()))
    assert called == ["core"]
    assert importlib.import_module("oldtrainer.late").run() == "theirs"
    assert called == ["core", "theirs"] and sys.meta_path == before


def part(name, new, parameters, line):
    return _peer.Part(Replacements("oldtrainer"), {name: parameters}, {name: new}, line)


def test_parts_are_put_in_place_together_or_not_at_all(peer, capsys):
    parts = [part("oldtrainer.core:advantages", ours, "rewards, values, lam", "advantages"),
             part("oldtrainer.core:loss", our_loss, "values, clip", "the loss")]
    moved = part("oldtrainer.core:Maker.make", lambda: 1, "self, rows", "never said")
    with pytest.raises(PeerError, match="Maker.make takes"):
        _peer.patch_parts(">=1.4,<2", *parts, moved)
    assert peer.step() == ("theirs", "their loss") and capsys.readouterr().err == ""
    for _ in range(2):
        _peer.patch_parts(">=1.4,<2", *parts)
    assert peer.step() == ("ours", "our loss")
    assert capsys.readouterr().err == ("tppo_kernels in oldtrainer 1.4.2: advantages\n"
                                       "tppo_kernels in oldtrainer 1.4.2: the loss\n")
    _peer.unpatch_parts(*parts)
    assert peer.step() == ("theirs", "their loss") and capsys.readouterr().err == ""


def test_parts_of_modules_to_come_are_told_and_do_not_raise(peer, capsys):
    moved = part("oldtrainer.late:run", lambda: "ours", "nothing, of, this", "never said")
    _peer.patch_when_imported(">=1.4,<2", {"oldtrainer.late": moved})
    assert importlib.import_module("oldtrainer.late").run() == "theirs"
    assert capsys.readouterr().err.startswith(
        "tppo_kernels in oldtrainer: nothing is replaced: oldtrainer 1.4.2: oldtrainer.late:run")


def test_what_is_told_is_one_line_on_stderr(capsys):
    _peer.say("oldtrainer 1.4.2", "two functions are ours")
    assert capsys.readouterr() == ("", "tppo_kernels in oldtrainer 1.4.2: two functions are ours\n")
