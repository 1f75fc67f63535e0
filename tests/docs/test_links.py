"""Every relative link leads to a file and a heading, and every path that a page names exists."""

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links, named_paths


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in links(page):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page: Path):
    missing = [name for name in named_paths(page) if not (ROOT / name).exists()]
    assert missing == []


def test_there_is_something_to_check():
    assert len(PAGES) > 15
    assert sum(len(links(page)) for page in PAGES) > 40
    assert sum(len(named_paths(page)) for page in PAGES) > 60
