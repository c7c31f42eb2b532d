"""The built site is whole: its links lead somewhere, it needs nothing from a network, and all options stand in it."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from allreduce_sgd.config import options
from tests.launching import ROOT

PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


@dataclass
class Page(HTMLParser):
    """What a page has: anchors, links, and what a browser loads for it."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag in ("link", "use", "base") and "href" in found:
            self.loads.append(found["href"])
        self.loads += [found[name] for name in ("src", "srcset", "data", "poster") if name in found]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.stem: Page(path) for path in site.glob("*.html")}


def test_every_page_is_in_the_site(pages: dict[str, Page]) -> None:
    assert {*PAGES, "404"} == set(pages)


def test_no_page_loads_anything_from_a_network(site: Path, pages: dict[str, Page]) -> None:
    for page in pages.values():
        assert page.loads
        for load in page.loads:
            parts = urlsplit(load)
            assert (parts.netloc, parts.scheme) in (("", ""), ("", "data")), (page.path.name, load)
            # The page that stands for an absent one is read from wherever; mkdocs gives it addresses from the root.
            if page.path.name != "404.html" and parts.scheme == "":
                assert (site / unquote(parts.path)).is_file(), (page.path.name, load)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", text), sheet.name


def test_every_link_within_the_site_leads_somewhere(pages: dict[str, Page]) -> None:
    followed = 0
    for page in pages.values():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or page.path.name == "404.html":
                continue
            target = pages[Path(parts.path).stem] if parts.path not in ("", ".") else page
            assert not parts.fragment or unquote(parts.fragment) in target.anchors, (page.path.name, link)
            followed += 1
    assert followed > 300


def test_nothing_is_left_to_be_filled_in(pages: dict[str, Page]) -> None:
    for page in pages.values():
        assert not re.search(r"\{\{|arithmatex", page.text), page.path.name
    assert pages["strategies"].text.count("<math") > 50
    # What the converter does not know it leaves as a backslash and a name.
    for formula in re.findall(r"<math.*?</math>", "".join(page.text for page in pages.values()), re.DOTALL):
        assert "\\" not in formula, formula


def test_the_list_of_options_is_complete(pages: dict[str, Page]) -> None:
    for each in options():
        assert each.name in pages["options"].anchors
        assert f"<code>--{each.name}" in pages["options"].text


def test_public_names_stand_in_the_api(pages: dict[str, Page]) -> None:
    import allreduce_sgd

    headings = re.findall(r'<h3 id="([\w.]+)"', pages["api"].text)
    assert set(allreduce_sgd.__all__) <= {name.rpartition(".")[2] for name in headings}
