"""Where a browser for the page's tests is."""

from __future__ import annotations

import shutil


def find_browser() -> str | None:
    """The path of a Chromium; None if there is none."""
    known = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in known if (path := shutil.which(name))), None)
