"""Commands as a shell takes them, to be copied from what is printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Final

PLAIN_IN_DOUBLE: Final = re.compile(r"[^\"$`\\!\x00-\x1f]*")
"""What stands for itself between double quotes, in an interactive shell too."""


def quote_word(word: str) -> str:
    """A word of a command: as it is, or in the quotes that need no others inside where there are such."""
    return f'"{word}"' if "'" in word and PLAIN_IN_DOUBLE.fullmatch(word) else shlex.quote(word)


def join_words(words: Iterable[str]) -> str:
    """A command of words."""
    return " ".join(map(quote_word, words))


def find_command(error: Exception) -> str:
    """The command in which the parser met an error, as it is typed: `robench leaderboard add`."""
    context, words = getattr(error, "ctx", None), []
    while context is not None and context.parent is not None:
        words.append(context.info_name)
        context = context.parent
    return " ".join(["robench", *reversed(words)])
