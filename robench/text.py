"""Text from outside: what no page and no file of text can hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

TURNS: Final = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
TURNING: Final = re.compile(f"[{TURNS}]")
"""Marks that turn the direction of what follows, by which a name can look like another."""
FORBIDDEN: Final = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff{TURNS}]")
"""These, and what XML 1.0 has no place for: control characters, halves of pairs, and two that are none."""


def replace_forbidden(text: str) -> str:
    """A text for XML, with U+FFFD in place of what is forbidden."""
    return FORBIDDEN.sub("\ufffd", text)


def replace_turning(text: str) -> str:
    """A text with U+FFFD in place of marks of direction."""
    return TURNING.sub("\ufffd", text)


def parse_json(content: bytes) -> Any:
    """What a file of JSON holds, in which every text can be written as UTF-8.

    Raises:
        ValueError: it is no JSON, or a text in it has half of a surrogate pair.
    """
    parsed = json.loads(content)
    json.dumps(parsed, ensure_ascii=False).encode()
    return parsed


def find_forbidden(content: Any) -> Iterator[str]:
    """The texts in JSON types, keys among them, with something forbidden in them."""
    if isinstance(content, str) and FORBIDDEN.search(content):
        yield content
    elif isinstance(content, dict):
        yield from find_forbidden([*content, *content.values()])
    elif isinstance(content, list | tuple):
        for one in content:
            yield from find_forbidden(one)
