"""Commands that are printed are those that a shell reads."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.shell import join_words, quote_word


@given(st.lists(st.text()))
def test_any_words_come_back(words: list[str]) -> None:
    assert shlex.split(join_words(words)) == words


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("pgd", "pgd"),
        ("pgd(steps=3)", "'pgd(steps=3)'"),
        ("apgd(loss='dlr')", "\"apgd(loss='dlr')\""),
        ("of 'mine' for $5", "'of '\"'\"'mine'\"'\"' for $5'"),
        ('say "it\'s"', "'say \"it'\"'\"'s\"'"),
    ],
)
def test_a_name_with_options_needs_no_quotes_in_quotes(word: str, quoted: str) -> None:
    assert quote_word(word) == quoted
    shell = subprocess.run(["sh", "-c", f"printf %s {quoted}"], capture_output=True, text=True, check=True)
    assert shell.stdout == word
