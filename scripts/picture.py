"""Take a picture of a page for the README: `python scripts/picture.py PAGE OUT.png`.

PAGE is a file or an address; the chat page has `chat_pictures.py`. Needs chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page")
    parser.add_argument("out")
    parser.add_argument("--size", nargs=2, type=int, default=(1100, 1500), metavar=("WIDTH", "HEIGHT"))
    told = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    address = told.page if "://" in told.page else Path(told.page).absolute().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": told.size[0], "height": told.size[1]}, locale="en-US")
        page.goto(address)
        page.screenshot(path=told.out)
        browser.close()


if __name__ == "__main__":
    main()
