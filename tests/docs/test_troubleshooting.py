"""docs/troubleshooting.md has every message of the package's errors and every reason of a reject, and no others."""

from __future__ import annotations

import re

from acestep_ray.data.schema import RejectReason
from tests.docs.messages import Message, error_classes, messages
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
_CODE = re.compile(r"(?<!`)(`{1,2})(?!`) ?(.+?) ?(?<!`)\1(?!`)")
# Of values alone: the source has no words by which it could be found.
WITHOUT_WORDS = {"`…` …: …"}


def cells(first_column: str) -> list[str]:
    """The first cells of all tables whose first column has this name."""
    found, inside = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
        elif inside:
            found.append(line.split("|")[1].strip())
        elif line.startswith(f"| {first_column} |"):
            inside = True
    return [cell for cell in found if set(cell) - set("- ")]


def told() -> list[str]:
    """The messages of the page."""
    return [match[2] for cell in cells("message") for match in _CODE.finditer(cell)]


def is_told(message: Message) -> bool:
    return any(message.pattern.fullmatch(text) for text in told())


def test_every_message_is_on_the_page():
    missing = [f"{message.place}: {message}" for message in messages() if not is_told(message)]
    assert not missing, "add rows to docs/troubleshooting.md, under their headings:\n" + "\n".join(missing)


def test_no_message_on_the_page_is_gone_from_the_program():
    patterns = [message.pattern for message in messages()]
    gone = [text for text in told() if not any(pattern.fullmatch(text) for pattern in patterns)]
    assert set(gone) <= WITHOUT_WORDS


def test_every_reason_of_a_reject_is_on_the_page_and_no_other():
    assert [match[2] for cell in cells("reason") for match in _CODE.finditer(cell)] == [
        r.value for r in RejectReason
    ]


def test_a_cell_holds_messages_alone():
    """What stands outside of code would not be looked for."""
    for cell in cells("message"):
        assert set(_CODE.sub("", cell)) <= set(" ·"), cell


def test_messages_are_found_in_the_source():
    assert {"InputError", "AceStepError", "StorageError", "TrainingDivergedError"} <= error_classes()
    found = {str(message) for message in messages()}
    assert len(found) > 200
    assert "no such LoRA" in found
    assert "… rows have nothing in the column …" in found
    assert all("\n" not in text for text in found)
