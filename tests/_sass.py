"""Machine code of GPU kernels as text: its loops, and how many instructions a turn of one takes."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"^(@!?U?P\w+ )?BRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)$")


class Loop(NamedTuple):
    """The instructions from the target of a backward branch to the branch."""

    code: tuple[tuple[int, str], ...]  # (address, instruction)

    def count(self, name: str) -> int:
        """How many instructions begin with that name; a predicate before it does not count."""
        return sum(bool(re.match(rf"(@!?U?P\w+ )?{name}\b", text)) for _, text in self.code)

    def turn(self) -> int:
        """The fewest instructions from the first to the branch back: without what a branch skips
        that no tile of a common call takes."""
        places = {address: i for i, (address, _) in enumerate(self.code)}
        fewest = [len(self.code)] * len(self.code)
        fewest[0] = 1
        for i, (_, text) in enumerate(self.code[:-1]):
            branch = _BRANCH.match(text)
            always = branch and not branch[1] and not re.search(r"BRA\.(DIV|CONV)", text)
            ahead = [] if always else [i + 1]
            if branch and places.get(int(branch[2], 16), 0) > i:
                ahead.append(places[int(branch[2], 16)])
            for j in ahead:
                fewest[j] = min(fewest[j], fewest[i] + 1)
        return fewest[-1]


def functions(cuobjdump: Path, binary: Path) -> dict[str, list[tuple[int, str]]]:
    """The code of every function of a binary by its name."""
    said = subprocess.run([cuobjdump, "-sass", binary], capture_output=True, text=True,
                          check=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    code: list[tuple[int, str]] = []
    for line in said.splitlines():
        if line.strip().startswith("Function :"):
            code = found.setdefault(line.split(":", 1)[1].strip(), [])
        instruction = _LINE.match(line)
        if instruction:
            code.append((int(instruction[1], 16), instruction[2]))
    return found


def hot_loop(code: list[tuple[int, str]]) -> Loop:
    """Of the innermost loops with the most loads of 16 bytes the shortest: the one over whole
    tiles, beside which the last tile has a loop of its own, with masks."""
    spans = []
    for address, text in code:
        branch = _BRANCH.match(text)
        if branch and int(branch[2], 16) < address:
            spans.append((int(branch[2], 16), address))
    innermost = [s for s in spans
                 if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [Loop(tuple(x for x in code if first <= x[0] <= last)) for first, last in innermost]
    wide = r"LDG\.E(\.\w+)*\.128"
    return min(loops, key=lambda loop: (-loop.count(wide), len(loop.code)))
