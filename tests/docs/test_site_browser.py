"""The site in headless Chromium, opened from disk, as wide as a desktop's window and as a phone's."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.browser import HEIGHT, open_page, require_browser

# Added to copies of the pages: what lies beyond the window without being in something that scrolls.
MEASURE = """<script>
addEventListener("load", () => {
  const inside = document.documentElement.clientWidth;
  const scrolls = (each) => each.closest(".md-sidebar, .md-search, .md-header, [hidden]") || (() => {
    for (let e = each; e && e !== document.body; e = e.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  })();
  const wide = [...document.querySelectorAll("article *")].filter(
    (each) => each.getBoundingClientRect().right > inside + 1 && !scrolls(each));
  document.title = JSON.stringify({
    inside, width: document.documentElement.scrollWidth, wide: wide.map((each) => each.outerHTML.slice(0, 80)),
    diagrams: [...document.querySelectorAll("svg.schedule")].filter((each) => each.clientWidth > 300).length,
  });
});
</script>
"""
# Asks the site's own search, as someone does who types.
SEARCH = """<script>
addEventListener("load", () => {
  const query = document.querySelector(".md-search__input");
  query.focus();
  query.value = "halving";
  query.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
  query.dispatchEvent(new Event("input", {bubbles: true}));
});
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    return require_browser()


@pytest.fixture(scope="module")
def copy(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the site, to which tests add scripts."""
    return shutil.copytree(site, tmp_path_factory.mktemp("copy") / "site")


def changed(copy: Path, page: str, script: str) -> Path:
    path = copy / f"{page}-changed.html"
    path.write_text((copy / f"{page}.html").read_text(encoding="utf-8").replace("</body>", f"{script}</body>"))
    return path


@pytest.mark.parametrize(("page", "width"), [("index", 1280), ("algorithms", 390)])
def test_a_page_opens_without_a_word_on_the_console(
    browser: str, site: Path, page: str, width: int, tmp_path: Path
) -> None:
    picture = tmp_path / "screenshot.png"
    _, console = open_page(browser, tmp_path, site / f"{page}.html", width, f"--screenshot={picture}")
    assert not console
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (HEIGHT, width)
    assert pixels.std() > 0.05


@pytest.mark.parametrize("page", ["strategies", "algorithms", "run", "options", "api"])
def test_a_page_is_no_wider_than_a_phone(browser: str, copy: Path, page: str, tmp_path: Path) -> None:
    written, _ = open_page(browser, tmp_path, changed(copy, page, MEASURE), 390, "--dump-dom")
    title = re.search("<title>({.*?)</title>", written)
    assert title is not None
    found: dict[str, Any] = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["inside"] == 390
    assert found["width"] <= 390
    assert not found["wide"]
    assert (found["diagrams"] > 5) == (page == "algorithms")


def test_search_works_from_disk(browser: str, copy: Path, tmp_path: Path) -> None:
    page = changed(copy, "index", SEARCH)
    written, console = open_page(browser, tmp_path, page, 1280, "--dump-dom", "--virtual-time-budget=10000")
    assert not console
    assert re.search(r'<a href="[^"]*algorithms\.html[^"]*" class="md-search-result__link"', written)
