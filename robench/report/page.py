"""What the pages share: their templates, with everything from outside escaped."""

from __future__ import annotations

import importlib.resources
from typing import TYPE_CHECKING, Any

from robench.errors import UsageError
from robench.text import replace_turning

if TYPE_CHECKING:
    from jinja2 import Template


def load_template(name: str, what: str) -> Template:
    """A template of the folder `templates/`; `what` is the page's name in the error.

    Raises:
        UsageError: Jinja2 or matplotlib, which draws the pages' plots, is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401 - found missing here, in one place
        from jinja2 import Environment
    except ImportError:
        raise UsageError(f"{what} page needs an extra: pip install 'robench[report]'") from None
    text = importlib.resources.files("robench.report").joinpath(f"templates/{name}").read_text(encoding="utf-8")
    pages = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_without_turns)
    return pages.from_string(text)


def _without_turns(value: Any) -> Any:
    """What a template shows, but for marks of direction in plain text; the pages' own markup stays."""
    return replace_turning(value) if type(value) is str else value
