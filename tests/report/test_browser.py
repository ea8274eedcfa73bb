"""The page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from records import SCORES, comparison

from siliang.report.gather import gather
from siliang.report.page import write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    data = gather([comparison(folder / "out", SCORES)])
    for language in ("en", "zh"):
        write_page(data, folder / f"{language}.html", language=language)
    return {language: folder / f"{language}.html" for language in ("en", "zh")}


FIRST_CELLS = "[...document.querySelectorAll('#methods tbody tr')].map(r => r.cells[0].textContent.split(' ')[0])"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 360])
def test_opens_alone_and_fits(browser: Browser, pages: dict[str, Path], language: str, dark: bool, width: int) -> None:
    browser.open(pages[language], width=width, dark=dark)
    requests = {p["request"]["url"] for p in browser.told("Network.requestWillBeSent")}
    assert {url for url in requests if not url.startswith("data:")} == {pages[language].as_uri()}
    assert not browser.told("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.ask("document.querySelectorAll('svg.plot').length") == 5
    heading = {"en": "Which method is best on this data?", "zh": "在这份数据上，哪种方法最好？"}
    assert browser.ask("document.querySelector('h1').textContent") == heading[language]
    light = browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark
    # what is drawn stays within its drawing
    outside = """[...document.querySelectorAll('svg.plot')].flatMap(s => { const b = s.getBoundingClientRect();
        return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
        return r.left < b.left - 1 || r.right > b.right + 1; }).map(t => t.textContent); })"""
    assert browser.ask(outside) == []


LARGE = {
    "full": ([0.9123, 0.9045, 0.91], 6_742_609_920, 24_500),
    "prefix_tuning num_virtual_tokens=100": ([0.8, 0.81, 0.82], 104_857_600, 13_900),
    "lora r=64 target_modules=all-linear": ([0.87, 0.88, 0.86], 335_544_320, 15_200),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("scores", [SCORES, LARGE], ids=["small", "large"])
def test_the_whole_table_is_seen(browser: Browser, tmp_path: Path, language: str, scores: Any) -> None:
    """At 1280 pixels its last column, too, and without scrolling."""
    write_page(gather([comparison(tmp_path / "out", scores)]), tmp_path / "page.html", language=language)
    browser.open(tmp_path / "page.html", width=1280)
    last = """[...document.querySelectorAll('#methods tr')].map(
        r => r.cells[r.cells.length - 1].getBoundingClientRect().right)"""
    assert browser.ask(f"Math.max(...{last})") <= 1280 - 15  # a scroll bar's width
    assert browser.ask("(s => s.scrollWidth <= s.clientWidth)(document.querySelector('.scroll'))")
    assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")


def test_foreign_text_stays_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["en"])
    assert browser.ask("document.title") == "siliang: Which method is best on this data?"
    assert browser.ask("document.querySelectorAll('img').length") == 0
    assert browser.ask("document.body.textContent.includes(\"<script>document.title='owned'</script>\")")
    # and were it not escaped, the page would still not run it
    browser.ask(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=1'}))"
    )
    assert browser.ask("document.title") != "1"


def test_sorts(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["en"])
    assert browser.ask(FIRST_CELLS) == ["full", "lora", "ia3", "wide", "stuck", "gone"]
    click = "[...document.querySelectorAll('#methods th button')].find(b => b.textContent == '{}').click()"
    browser.ask(click.format("trained"))
    assert browser.ask(FIRST_CELLS) == ["ia3", "stuck", "lora", "wide", "full", "gone"]
    browser.ask(click.format("accuracy"))  # the best first
    assert browser.ask(FIRST_CELLS) == ["full", "lora", "ia3", "wide", "stuck", "gone"]
    browser.ask(click.format("accuracy"))
    assert browser.ask(FIRST_CELLS) == ["stuck", "wide", "ia3", "lora", "full", "gone"]
    browser.ask(click.format("method"))
    assert browser.ask(FIRST_CELLS) == ["full", "gone", "ia3", "lora", "stuck", "wide"]
    assert browser.ask("document.querySelector('#methods th').getAttribute('aria-sort')") == "ascending"


def test_prints(browser: Browser, pages: dict[str, Path]) -> None:
    import base64

    browser.open(pages["zh"], dark=True)
    printed = browser.do("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
    pdf = base64.b64decode(printed)
    assert pdf.startswith(b"%PDF") and 1 <= pdf.count(b"/Type /Page\n") <= 8
