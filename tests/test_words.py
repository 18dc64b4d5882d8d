"""Plain English in docstrings, comments and messages of the code; `test_docs` has a test for the docs."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("ldm_vae", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

PHRASES = {
    r"(?<![Tt]here )\b(?:is|are|was|were) no (?!longer\b|more\b)(?=\w)": "is not a ...",
    r"\b(?:whoever|nobody's|nobody else)\b": "name the person or program",
    r"^\"\"\"(?:Of|Those of|That of) ": "a docstring begins with the noun that it describes",
    r"\b(?:anew|by heart|for ever)\b": "again; memorized; without limit",
    r"\b(?:is|are|was|were|being) told\b": "is reported, is given",
    r"\bso many (?:of them|first|images|channels|points|steps|processes)\b": "this number of",
    r"\b(?:roll call|came along|give away|given away)\b": "rank consistency; is beside it; share",
    r"\b(?:behaviour|normalised|initialised|optimised|grey|whilst|labelled)\b": "American spelling",
}
"""Phrase that is translated idiom, or that only this project uses -> what to write."""

STORED = ("is no regular file", "save the image anew", "writes it anew")
"""Texts that saved files carry."""


def texts(path: Path) -> list[str]:
    """Docstrings, comments and strings of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
    return [one.string for one in tokens if one.type in kinds]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_english_of_the_code_is_plain(path: Path) -> None:
    found = {
        text[max(0, match.start() - 30) : match.end() + 30]: advice
        for text in texts(path)
        for phrase, advice in PHRASES.items()
        for match in re.finditer(phrase, text)
        if not any(stored in text for stored in STORED)
    }
    assert found == {}


@pytest.mark.parametrize(
    "text", ['"""Of the images."""', "it is no file", "whoever asks", "is told to end", "written anew"]
)
def test_the_phrases_are_found(text: str) -> None:
    assert any(re.search(phrase, text) for phrase in PHRASES)
