"""A strict reader of the HTML that we write."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Parses strictly: every element that opens closes, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.text: list[str] = []
        self.figures: list[str] = []
        #: How often each kind of element has each attribute.
        self.attributes: Counter[tuple[str, str]] = Counter()
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.attributes[tag, name] += 1
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            if name == "data-name":
                self.figures.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_self_contained(html: str) -> Page:
    """The page, parsed; it fetches nothing, runs nothing, and every reference leads somewhere."""
    page = Page(html)
    assert page.tags["script"] == page.tags["link"] == 0
    without_pictures = re.sub(
        r"data:image/png;base64,[\w+/=\s]*", "", html
    )  # any letters in any order
    assert not re.search(r"https?:|//[a-z]|@import", without_pictures)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert [name for name, count in page.ids.items() if count > 1] == []
    # Every reference inside a plot leads to an element of the page.
    for target in re.findall(r'(?:url\(|href=")#([^")]+)', html):
        assert target in page.ids
    return page
