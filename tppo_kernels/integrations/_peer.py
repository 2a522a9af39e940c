"""What all integrations share: is the trainer the one we know, and replace names in it, undoably.

A name of a trainer is written "package.module:attribute", "package.module:Class.method" or
"package.module:REGISTRY[key]".
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import operator
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

_COMPARED = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
             ">": operator.gt, "<": operator.lt}
_MISSING = object()


class PeerError(ImportError):
    """A trainer that is absent, of a version we do not know, or without a name that we need."""


class Peer(NamedTuple):
    """A trainer that we know; the integration has the name of its package."""

    versions: str  # a range as `within` takes it
    distribution: str  # what it is called when it is installed
    repository: str | None = None  # of one that the package index does not have


PEERS = {
    "trl": Peer(">=1.12,<1.17", "trl"),
    "verl": Peer(">=0.9.1,<0.10", "verl"),
    "skyrl": Peer(">=0.4,<0.5", "skyrl"),
    "openrlhf": Peer(">=0.11,<0.12", "openrlhf"),
    "slime": Peer(">=0.3,<0.5", "slime", "https://github.com/THUDM/slime"),
    "nemo_rl": Peer(">=0.5,<1", "nemo-rl", "https://github.com/NVIDIA-NeMo/RL"),
}


def states(*, probe: bool = False) -> list[dict[str, str | None]]:
    """What is installed of each trainer that we know, as plain data.

    `trainer`; `installed`, its version, or None; `supported`, the range that we know; `state`:
    "absent", "another version" or "known version"; `why`: one sentence with the remedy, or None.
    Nothing is imported for that. With probe=True each trainer of a known version is imported, and
    the names that its integration needs are looked up: its `state` is then "works" or "fails".
    """
    return [_state(name, probe) for name in PEERS]


def _state(name: str, probe: bool) -> dict[str, str | None]:
    versions, distribution, _ = PEERS[name]
    version, state, why = None, "absent", None
    try:
        version, state = _installed(name, distribution, versions), "another version"
        require(name, versions, distribution=distribution)
        state = "known version"
        if probe:
            state = "fails"
            with redirect_stdout(sys.stderr):  # what a trainer prints is no part of our report
                importlib.import_module(f"{__package__}.{name}").probe()
            state = "works"
    except PeerError as error:
        why = str(error)
    return {"trainer": name, "installed": version, "supported": versions, "state": state,
            "why": why}


def within(version: str, versions: str) -> bool:
    """Whether a version lies in a range as ">=0.9.1,<0.10"; of each only the numbers count, so
    that 0.10.0rc1 counts as 0.10."""
    def numbers(text: str) -> tuple[int, ...]:
        found = re.match(r"\s*v?(\d+(?:\.\d+)*)", text)
        if found is None:
            raise ValueError(f"{text!r} is no version, expected numbers with points between them")
        parts = [int(part) for part in found[1].split(".")]
        while len(parts) > 1 and parts[-1] == 0:  # 0.10.0 is 0.10
            parts.pop()
        return tuple(parts)

    for bound in versions.split(","):
        split = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)(.+)", bound)
        if split is None:
            raise ValueError(f"{bound!r} is no bound of a version, expected one as >=1.2")
        if not _COMPARED[split[1]](numbers(version), numbers(split[2])):
            return False
    return True


def require(peer: str, versions: str, names: Mapping[str, str | None] | None = None, *,
            distribution: str | None = None) -> str:
    """The version of an installed trainer whose interface is the one that an integration knows.

    peer: the package that is imported; distribution: what it is called when it is installed, where
    that is another name. versions: a range as in `within`. names: for each name that the
    integration needs its parameters as "self, values, rewards", or "values, rewards, ..." where
    others may follow, or None where any will do. A package that was never installed and runs from
    its sources has no version: then the names alone decide, and the version is "of unknown
    version".

    Raises PeerError, in one sentence: the trainer is absent, does not import, its version is
    outside the range, or a name or one of its parameters is not there.
    """
    installed = distribution or peer
    version = _installed(peer, installed, versions)
    if version[0].isdigit() and not within(version, versions):
        raise PeerError(f"{peer} {version} is installed, expected {installed}{versions}, whose "
                        f"interface this integration knows: {_remedy(peer, installed + versions)}")
    for name, parameters in (names or {}).items():
        _probe(f"{peer} {version}", name, parameters)
    return version


def _installed(peer: str, distribution: str, versions: str) -> str:
    """The version of a trainer, of which nothing is imported; PeerError where it is absent."""
    if importlib.util.find_spec(peer) is None:
        wanted = distribution + versions
        raise PeerError(f"{peer} is not installed, expected {wanted}: {_remedy(peer, wanted)}")
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(peer), "__version__", "of unknown version"))


def _remedy(peer: str, wanted: str) -> str:
    repository = PEERS[peer].repository if peer in PEERS else None
    return f"install it from {repository}" if repository else f"pip install '{wanted}'"


def _probe(peer: str, name: str, parameters: str | None) -> None:
    """Raises PeerError where a name of the trainer is not there or takes other parameters."""
    site = _site(name, peer)
    found = site.value()
    if found is _MISSING:
        raise PeerError(f"{peer} has no {name}, which this integration uses: the trainer's "
                        "interface has changed, or something has replaced it")
    if parameters is None:
        return
    expected = [part.strip() for part in parameters.split(",")]
    has = list(inspect.signature(getattr(found, "__func__", found)).parameters)
    compared = has[:len(expected) - 1] + ["..."] if expected[-1] == "..." else has
    if compared != expected:
        raise PeerError(f"{peer}: {name} takes ({', '.join(has)}), expected ({parameters}): the "
                        "trainer's interface has changed, or something has replaced it")


class _Site(NamedTuple):
    """One place that holds a value: an attribute of a module or class, or an item of a dict."""

    owner: Any
    key: str
    item: bool = False

    def value(self) -> Any:
        """What stands there itself: a staticmethod as such, nothing inherited, nothing loaded."""
        held = self.owner if self.item else vars(self.owner)
        return held.get(self.key, _MISSING)

    def put(self, value: Any) -> None:
        """Puts a value there, or removes what is there where the value is `_MISSING`."""
        if value is _MISSING:
            if self.item:
                del self.owner[self.key]
            else:
                delattr(self.owner, self.key)
        elif self.item:
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


def _site(name: str, peer: str) -> _Site:
    """The place of a name; raises PeerError in one sentence where there is no way to it."""
    module, _, path = name.partition(":")
    indexed = re.fullmatch(r"(.+)\[(.+)\]", path)
    *parents, last = (indexed[1] if indexed else path).split(".")
    try:
        owner: Any = importlib.import_module(module)
    except Exception as error:  # what a trainer raises while it is imported is its own matter
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        said = kind + " ".join(str(error).split())
        raise PeerError(f"{peer}: {module} does not import here ({said})") from None
    for parent in [*parents, last] if indexed else parents:
        owner = getattr(owner, parent, _MISSING)
        if owner is _MISSING:
            raise PeerError(f"{peer} has no {name}, which this integration uses: the trainer's "
                            "interface has changed")
    return _Site(owner, indexed[2], item=True) if indexed else _Site(owner, last)


class _Replaced(NamedTuple):
    name: str
    original: Any
    ours: Any
    site: _Site


class Replacements:
    """Names of one trainer that are replaced together and put back together.

    Installing twice is installing once: one `undo` puts everything back. A function that other
    modules of the trainer have imported by name is replaced in each of them, by whatever name; a
    module that is loaded later takes ours from where it was defined, and is put right by `undo`.
    What has been captured otherwise (a default argument, an instance, functools.partial) keeps
    what it has.
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._replaced: dict[str, _Replaced] = {}

    @property
    def installed(self) -> bool:
        """Whether `install` has run, and `undo` not since."""
        return bool(self._replaced)

    def original(self, name: str) -> Any:
        """What stood at a replaced name."""
        return self._replaced[name].original

    def install(self, ours: Mapping[str, Any]) -> list[str]:
        """Puts ours in place; returns what is to be told: names that were not the trainer's own.

        Does nothing where it is installed already, but names what another library has put over
        ours since: what that library has installed is left alone.
        """
        if self._replaced:
            return [f"{each.name} is no longer ours: {_who(each.site.value())} has replaced it"
                    for each in self._replaced.values() if each.site.value() is not each.ours]
        sites = {name: _site(name, self.peer) for name in ours}  # all are there before one changes
        originals: dict[int, Any] = {}
        for name, new in ours.items():
            old = sites[name].value()
            if originals.setdefault(id(new), old) is not old:
                raise ValueError(f"{self.peer}: {name} and another name, which hold two objects, "
                                 "get the same one, expected one each: undoing could not tell "
                                 "them apart")
        told = []
        held = {name: site.value() for name, site in sites.items()}
        for name, new in ours.items():
            site, old = sites[name], held[name]
            if old is not _MISSING and not _belongs(old, self.peer):
                told.append(f"{name} was {_who(old)}'s already, and ours stands over it")
            self._replaced[name] = _Replaced(name, old, new, site)
            if isinstance(site.owner, ModuleType):
                self._everywhere(old, new)
            site.put(new)
        return told

    def undo(self) -> list[str]:
        """Puts back what stood there; returns the names that another library has replaced since,
        each with who did: those are left as they are."""
        told = []
        for each in reversed(self._replaced.values()):
            now = each.site.value()
            if now is each.ours:
                each.site.put(each.original)
            else:
                told.append(f"{each.name} stays {_who(now)}'s, which has replaced ours since")
            if isinstance(each.site.owner, ModuleType):
                self._everywhere(each.ours, each.original)
        self._replaced.clear()
        return told

    def _everywhere(self, old: Any, new: Any) -> None:
        """Replaces an object wherever a loaded module of the trainer names it."""
        if old is _MISSING or new is _MISSING:
            return
        for name, module in list(sys.modules.items()):
            if not isinstance(module, ModuleType) or name.split(".")[0] != self.peer:
                continue
            for key, value in list(vars(module).items()):  # vars: loads nothing that is lazy
                if value is old:
                    setattr(module, key, new)


def _belongs(value: Any, peer: str) -> bool:
    return getattr(value, "__module__", peer).split(".")[0] == peer


def _who(value: Any) -> str:
    """The package that an object comes from."""
    if value is _MISSING:
        return "nobody"
    return (getattr(value, "__module__", None) or type(value).__module__).split(".")[0]


def say(peer: str, line: str) -> None:
    """One line on stderr about what was done to a trainer, which shows in each worker's log."""
    print(f"tppo_kernels in {peer}: {line}", file=sys.stderr, flush=True)


class Part(NamedTuple):
    """Names of a trainer that are replaced together, and what is said of it."""

    swap: Replacements
    interface: Mapping[str, str | None]  # as `require` takes it
    ours: Mapping[str, Any]  # as `Replacements.install` takes it
    line: str


def patch_parts(versions: str, *parts: Part, distribution: str | None = None) -> None:
    """Puts parts of an integration in place: all of them or, where the trainer is not the one we
    know, none. A part that is in place stays so. Errors: as of `require`."""
    peer = parts[0].swap.peer
    fresh = [part for part in parts if not part.swap.installed]
    names = {name: each for part in fresh for name, each in part.interface.items()}
    version = require(peer, versions, names, distribution=distribution)
    for part in parts:
        told = part.swap.install(part.ours)
        for line in [part.line, *told] if part in fresh else told:
            say(f"{peer} {version}", line)


def probe_parts(versions: str, *parts: Part, distribution: str | None = None) -> str:
    """The trainer's version, where each name that parts need is there; nothing is replaced.
    Errors: as of `require`."""
    names = {name: each for part in parts for name, each in part.interface.items()}
    return require(parts[0].swap.peer, versions, names, distribution=distribution)


def unpatch_parts(*parts: Part) -> None:
    """Puts the trainer's own functions back; says which ones another library has replaced since."""
    for part in parts:
        for line in part.swap.undo():
            say(part.swap.peer, line)


def patch_when_imported(versions: str, parts: Mapping[str, Part], *,
                        distribution: str | None = None) -> None:
    """Puts each part in place once its module is imported, for a process that others have started:
    it pays nothing for what it does not need, and a trainer that we do not know is told and kept.
    """
    def install(part: Part) -> None:
        try:
            patch_parts(versions, part, distribution=distribution)
        except PeerError as error:
            say(part.swap.peer, f"nothing is replaced: {error}")

    for module, part in parts.items():
        when_imported(module, partial(install, part))


def when_imported(module: str, then: Callable[[], None]) -> None:
    """Calls `then` as soon as a module has been imported: at once where it is loaded already.

    So a process that never needs the module does not load it because of us.
    """
    if module in sys.modules and not getattr(sys.modules[module].__spec__, "_initializing", False):
        then()
        return
    sys.meta_path.insert(0, _Waiting(module, then))


class _Waiting:
    """Finds a module by the other finders, once, and has its loader report when it has run."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self.then = module, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The specification by the other finders, with a loader that calls `then`."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
