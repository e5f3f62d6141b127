"""Takes the README's picture of the leaderboards' page.

    make picture

The first board of the README, 1120 by 900 pixels, light. The picture keeps the digest of the rows that it shows, by
which tests/test_published.py sees a picture that is older than the rows.
"""

import hashlib
import io
import shutil
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "pictures" / "leaderboards.png"
BOARD = "fashion_mnist-linf-0.1"
SIZE = {"width": 1120, "height": 900}


def digest_rows() -> str:
    """The sha256 of the board's CSV file."""
    return hashlib.sha256((ROOT / "leaderboards" / f"{BOARD}.csv").read_bytes()).hexdigest()


def main() -> None:
    """Opens the page at the board in a Chromium and writes the picture."""
    browser = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]) as chromium,
    ):
        page = chromium.new_page(viewport=SIZE, color_scheme="light")
        page.goto(f"{(ROOT / 'leaderboards' / 'index.html').as_uri()}#{BOARD}")
        shot = page.screenshot()
    told = PngInfo()
    told.add_text("rows", digest_rows())
    Image.open(io.BytesIO(shot)).quantize(256).save(PICTURE, pnginfo=told, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
