"""What any HTML of ours has to be: whole, nothing from elsewhere, headings in order, pictures with words."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import pairwise

_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_REFERENCES = ("src", "href", "xlink:href", "action", "srcset", "poster", "data")


class Parsed(HTMLParser):
    """tags: (name, attributes) of each start. texts: what stands between them. errors: what is wrong, in words."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.errors: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.errors += [f"<{tag}> is never closed" for tag in self._open]
        self._look()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.errors.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def _look(self) -> None:
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        self.errors += [f"id {one!r} occurs twice" for one in set(ids) if ids.count(one) > 1]
        for tag, attributes in self.tags:
            for name in _REFERENCES:
                target = attributes.get(name, "")
                if target and not target.startswith(("data:image/", "#")):
                    self.errors.append(f"<{tag}> takes {target!r} from elsewhere")
                if target.startswith("#") and target[1:] not in ids:
                    self.errors.append(f"<{tag}> points to {target!r}, which is not there")
            for name in ("aria-labelledby", "aria-describedby"):
                self.errors += [f"{name} names {one!r}" for one in attributes.get(name, "").split() if one not in ids]
            if tag == "img" and not attributes.get("alt"):
                self.errors.append("an <img> without alt")
            if tag == "svg" and not (attributes.get("aria-label") and attributes.get("role") == "img"):
                self.errors.append("an <svg> that says nothing")
            if tag in ("script", "iframe", "object") or any(name.startswith("on") for name in attributes):
                self.errors.append(f"<{tag}> runs or embeds something")
        levels = [int(tag[1]) for tag, _ in self.tags if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit()]
        self.errors += [f"h{b} behind h{a}" for a, b in pairwise(levels) if b > a + 1]
        if levels and (levels[0] != 1 or levels.count(1) > 1):
            self.errors.append("not one h1 at the top")
