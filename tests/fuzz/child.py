"""Fuzzes one reader for some seconds, or reads its corpus: a process with limits of memory and time.

python -m tests.fuzz.child fuzz READER SECONDS FOLDER    found cases go to FOLDER
python -m tests.fuzz.child corpus READER FOLDER
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.readers import ODD_VALUES, READERS, SECONDS

MEMORY = 1 << 30
"""Bytes that a reader may take besides what its libraries have taken before."""


def limit() -> None:
    """Less memory than a file of a few kilobytes should be able to ask for."""
    with open("/proc/self/status", encoding="ascii") as status:
        taken = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY, taken + MEMORY))

    def end(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, end)


def try_one(reader: str, name: str, content: bytes) -> None:
    """Read a file. Raises whatever the reader raises and has not promised, and TimeoutError."""
    # A library that holds the interpreter past the bound is ended as a process.
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        READERS[reader].read(name, content)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@st.composite
def changed(draw: st.DrawFn, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """A seed with some bytes changed, cut, repeated or put in from another, or with odd values in its JSON."""
    name = draw(st.sampled_from(sorted(seeds)))
    content = bytearray(seeds[name])
    found = json_within(bytes(content))
    if found is not None and draw(st.booleans()):
        start, end, value = found
        for _ in range(draw(st.integers(1, 3))):
            value = with_odd_value(draw, value)
        text = json.dumps(value).encode("utf-8", "surrogatepass")
        return name, with_json(bytes(content), start, end, text)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["byte", "bytes", "cut", "repeat", "other", "number"]))
        if kind == "byte" and content:
            content[place] = draw(st.integers(0, 255))
        elif kind == "bytes":
            content[place : place + 4] = draw(st.binary(max_size=8))
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1]))
            content[place : place + 8] = number.to_bytes(8, draw(st.sampled_from(["little", "big"])))
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, 64))]
        elif kind == "repeat":
            content[place:place] = content[place : place + 32] * draw(st.integers(1, 20))
        else:
            other = seeds[draw(st.sampled_from(sorted(seeds)))]
            start = draw(st.integers(0, max(0, len(other) - 1)))
            content[place : place + 32] = other[start : start + 32]
    return name, bytes(content)


def json_within(content: bytes) -> tuple[int, int, Any] | None:
    """The JSON that a file is, or that a safetensors file begins with: where, and what it says."""
    places = [(0, len(content)), (8, 8 + int.from_bytes(content[:8], "little"))]
    for start, end in places:
        try:
            return start, end, json.loads(content[start:end])
        except ValueError:
            continue
    return None


def with_json(content: bytes, start: int, end: int, text: bytes) -> bytes:
    head = len(text).to_bytes(8, "little") if start == 8 else b""
    return head + text + content[end:]


def with_odd_value(draw: st.DrawFn, value: Any) -> Any:
    """The same JSON with another value or key at one place; JSON within a text counts."""
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.dumps(with_odd_value(draw, json.loads(value)))
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 5)) == 0:
            other = draw(st.sampled_from([odd for odd in ODD_VALUES if isinstance(odd, str)]))
            return {other if name == key else name: item for name, item in value.items()}
        return value | {key: with_odd_value(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], with_odd_value(draw, value[place]), *value[place + 1 :]]
    return draw(st.one_of(st.sampled_from(ODD_VALUES), st.integers(), st.text(max_size=5)))


def fuzz(reader: str, seconds: float, folder: Path) -> int:
    """Try changed files for `seconds`; the smallest of each finding is written to `folder`. Returns how many."""
    seeds = READERS[reader].seeds()
    ends, tried, found = time.monotonic() + seconds, 0, {}

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(seeds))
    def try_some(case: tuple[str, bytes]) -> None:
        nonlocal tried
        if time.monotonic() > ends:
            return
        tried += 1
        last = folder / f".last-{reader}"
        last.write_bytes(case[0].encode() + b"\n" + case[1])  # of a reader that ends the process
        try:
            try_one(reader, *case)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__}-{Path(place.filename).stem}-{place.lineno}"
            if kind not in found or len(found[kind][1]) > len(case[1]):
                found[kind] = case
                print(kind, repr(error)[:200], case[0], flush=True)

    while time.monotonic() < ends:
        try_some()
    for kind, (name, content) in found.items():
        digest = hashlib.sha256(content).hexdigest()[:8]
        (folder / f"{kind}-{digest}.{name}").write_bytes(content)
    (folder / f".last-{reader}").unlink(missing_ok=True)
    print(f"{reader}: {tried} files, {len(found)} findings", flush=True)
    return len(found)


def read_corpus(reader: str, folder: Path) -> int:
    """Read every seed and every case of the corpus; returns how many were findings."""
    cases = [(name, name, content) for name, content in READERS[reader].seeds().items()]
    cases += [
        (path.name, path.name.partition(".")[2], path.read_bytes()) for path in sorted(folder.glob("*"))
    ]
    findings = 0
    for label, name, content in cases:
        try:
            try_one(reader, name, content)
        except Exception as error:
            findings += 1
            print(f"{reader}/{label}: {type(error).__name__}: {error}"[:500], flush=True)
    print(f"{reader}: {len(cases)} files, {findings} findings")
    return findings


def main() -> int:
    warnings.simplefilter("ignore")
    what, reader = sys.argv[1:3]
    if what == "fuzz":
        READERS[reader].seeds()
        limit()
        return min(fuzz(reader, float(sys.argv[3]), Path(sys.argv[4])), 100)
    findings = 0
    for each in READERS if reader == "all" else [reader]:
        READERS[each].seeds()
    limit()
    for each in READERS if reader == "all" else [reader]:
        findings += read_corpus(each, Path(sys.argv[3]) / each)
    return min(findings, 100)


if __name__ == "__main__":
    sys.exit(main())
