"""The page of a report in headless Chromium, as wide as a desktop's window and as a phone's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.browser import HEIGHT, open_page, require_browser

WIDTHS = pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])

# Added to a copy of the page; the page itself has no scripts.
MEASURE = """<script>
console.error("a line of the console");
addEventListener("load", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
  const inside = document.documentElement.clientWidth;
  const wide = [...document.querySelectorAll("body *")].filter(
    (each) => !each.closest(".scroll *") && each.getBoundingClientRect().right > inside + 1);
  document.title = JSON.stringify({
    inside, width: document.documentElement.scrollWidth, wide: wide.map((each) => each.outerHTML.slice(0, 80)),
    scrolling: [...document.querySelectorAll(".scroll")].filter((each) => each.scrollWidth > each.clientWidth).length,
    shown: [...document.images].filter((each) => each.complete && each.naturalWidth > 0).length,
    wideFigures: Math.min(...[...document.querySelectorAll(".wide img")].map((each) => each.clientWidth)),
    text: Math.min(...[...document.querySelectorAll("p, dd, td, figcaption")].map(
      (each) => parseFloat(getComputedStyle(each).fontSize))),
  });
});
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    return require_browser()


@WIDTHS
def test_the_page_opens_without_a_word_on_the_console(browser: str, report: Path, width: int, tmp_path: Path) -> None:
    picture = tmp_path / "screenshot.png"
    _, console = open_page(browser, tmp_path, report / "index.html", width, f"--screenshot={picture}")
    assert not console
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (HEIGHT, width)
    assert pixels.std() > 0.05


@WIDTHS
def test_the_page_is_no_wider_than_the_window(browser: str, report: Path, width: int, tmp_path: Path) -> None:
    copy = tmp_path / "copy.html"
    text = (report / "index.html").read_text()
    copy.write_text(text.replace("</body>", f"{MEASURE}</body>"))
    written, console = open_page(browser, tmp_path, copy, width, "--dump-dom")
    assert any("a line of the console" in line for line in console)
    title = re.search("<title>(.*?)</title>", written)
    assert title is not None
    found: dict[str, Any] = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["inside"] == width
    assert found["width"] <= width
    assert not found["wide"]
    assert found["shown"] == text.count("<img ") > 5
    assert found["text"] >= 14
    assert found["scrolling"] > 0
    assert found["wideFigures"] > 700
