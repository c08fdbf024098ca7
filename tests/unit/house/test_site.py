"""The documents as a site: links hold, pages say what they say on a forge, all is at hand.

That a link leads somewhere is MkDocs' to check, in a strict build. Files have the same places on
the site and in the repository, so a link that holds here holds on a forge too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from documents import linked_files, pages
from tests.support.places import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="no generator of the site is installed"
)

PAGES = pages(ROOT)
SETTINGS = ("mkdocs.yml", "scripts/site_pages.py", "scripts/documents.py")


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """The site of the repository at `root`, which goes to the folder `site`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """The words of an article, and what a browser would load to show it."""

    def __init__(self, text: str, *, inside: bool) -> None:
        """`inside`: all of the text is the article."""
        super().__init__()
        self.loaded: list[str] = []
        self._articles = int(inside)
        self._permalinks = 0
        self._text = ""
        self.feed(text)

    @property
    def words(self) -> list[str]:
        return self._text.split()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self._articles += tag == "article"
        self._permalinks += found.get("class") == "headerlink"
        if "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(found["href"])

    def handle_endtag(self, tag: str) -> None:
        self._articles -= tag == "article"
        if tag == "a" and self._permalinks:
            self._permalinks -= 1

    def handle_data(self, data: str) -> None:
        if self._articles and not self._permalinks:
            self._text += data


def of_site(site: Path, page: Path) -> Path:
    place = site / page.relative_to(ROOT).with_suffix(".html")
    return place.with_name("index.html") if page.name == "README.md" else place


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_says_the_same_as_on_a_forge(site: Path, page: Path) -> None:
    """Forges read Markdown as CommonMark; what MkDocs reads differs in nested lists, for one."""
    forge = MarkdownIt("commonmark").enable("table").render(page.read_text())
    shown = Page(of_site(site, page).read_text(), inside=False)
    assert shown.words == Page(forge, inside=True).words


def test_files_that_pages_link_to_are_there(site: Path) -> None:
    names = {path.relative_to(ROOT).as_posix() for path in linked_files(ROOT)}
    folders = {name.partition("/")[0] for name in names}
    assert {"benchmark", "deploy", "examples"} <= folders
    for name in names:
        assert (site / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_browser_loads_nothing_from_elsewhere(site: Path) -> None:
    """Neither from a page nor from a style."""
    loaded = [
        (path.name, place)
        for path in site.rglob("*.html")
        for place in Page(path.read_text(), inside=False).loaded
    ]
    assert any(place.endswith(".js") for _, place in loaded)
    assert [p for p in loaded if re.match(r"(?:\w+:)?//", p[1])] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert styles
    assert not re.search(r"(?:url\(|@import )[\"']?(?:\w+:)?//", styles)


def test_the_search_is_at_hand_and_knows_the_pages(site: Path) -> None:
    settings = re.search(r'id="__config"[^>]*>(.*?)</script>', (site / "index.html").read_text())
    assert settings
    assert (site / json.loads(settings[1])["search"]).is_file()
    index = (site / "search" / "search_index.json").read_text()
    assert "docs/operating/alerts.html#kunservegone" in index
    assert "docs/features.html#draining" in index


PLANTED = {
    "[a](docs/prophecies.md)": "docs/prophecies.md",
    "[a](deploy/prophet.yaml)": "deploy/prophet.yaml",
    "[a](docs/features.md#prophecies)": "#prophecies",
    "[a](deploy)": "unrecognized relative link 'deploy'",
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What is said of a copy of the repository with links that lead nowhere."""
    folder = tmp_path_factory.mktemp("copy")
    for path in (*PAGES, *linked_files(ROOT), *(ROOT / name for name in SETTINGS)):
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    with (folder / "README.md").open("a") as readme:
        readme.write("\n" + "\n".join(PLANTED))
    (folder / "docs" / "forgotten.md").write_text("# Forgotten\n")
    done = build(folder, folder / "built")
    assert done.returncode != 0
    yield done.stderr
    shutil.rmtree(folder)


@pytest.mark.parametrize("complaint", [*PLANTED.values(), "docs/forgotten.md"])
def test_what_leads_nowhere_is_noticed(complaints: str, complaint: str) -> None:
    """A page that the navigation has forgotten is found as well."""
    assert complaint in complaints
