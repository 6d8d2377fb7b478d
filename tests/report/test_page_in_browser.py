"""The page in a real browser, opened from disk."""

import itertools
import json
from pathlib import Path

import pytest

from pared.report.data import Report
from pared.report.html import ledger_html, write_html

# Contrast of every text with the nearest background that is painted behind it (WCAG 2.2, success criterion 1.4.3).
CONTRAST = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const low = [];
  let count = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility({visibilityProperty: true})) continue;
    if (["SCRIPT", "STYLE", "title"].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const ink = parse(node.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    count += 1;
    if (ratio < 4.5) low.push([walker.currentNode.data.trim(), ratio]);
  }
  return {count, low};
})()
"""


@pytest.fixture
def opened(browser, sample: Report, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    write_html(sample, path)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [380, 800, 1600])
def test_page_is_quiet_and_fits_when_opened_from_disk(browser, opened: Path, width: int, dark: bool) -> None:
    browser.open(opened, width=width, dark=dark)
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    browser.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.problems() == []
    assert browser.requests() == [opened.as_uri()]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_enough_contrast_when_the_scheme_is_light_or_dark(browser, opened: Path, dark: bool) -> None:
    browser.open(opened, dark=dark)
    found = browser.run(CONTRAST)
    assert found["count"] > 300
    assert found["low"] == []


def test_page_runs_nothing_foreign_when_every_string_is_hostile(browser, hostile: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(hostile, path)
    browser.open(path, width=380)
    assert browser.run("document.images.length + document.scripts.length") == 1
    assert browser.run("document.documentElement.scrollWidth") <= 380
    assert browser.problems() == []
    assert browser.requests() == [path.as_uri()]


def test_page_would_be_stopped_when_it_asked_for_something(browser, opened: Path) -> None:
    """The oracle of the tests above: a request and a script that are not ours are seen, and refused."""
    broken = opened.read_text().replace(
        "</main>", '<img src="https://example.invalid/x.png"><script>x()</script></main>'
    )
    opened.write_text(broken)
    browser.open(opened)
    assert len(browser.problems()) >= 2
    assert "Content Security Policy" in json.dumps(browser.problems())


def test_keyboard_reaches_content_links_plots_tables_and_buttons_in_order(browser, opened: Path) -> None:
    browser.open(opened)
    seen = []
    for _ in range(40):
        browser.press("Tab", 9)
        seen.append(
            browser.run(
                "(() => { const n = document.activeElement; return [n.tagName, n.className.baseVal ?? n.className,"
                " n.getAttribute('aria-label') ?? n.textContent.trim().slice(0, 40)]; })()"
            )
        )
        outlined = browser.run(
            "(() => { const n = document.activeElement; const halo = n.querySelector('.halo');"
            " const ring = halo && getComputedStyle(halo).stroke !== 'none';"
            " return ring || getComputedStyle(n).outlineStyle !== 'none'; })()"
        )
        assert outlined or seen[-1][0] == "BODY", seen[-1]
    assert seen[0][2] == "Skip to the report"
    order = [
        next(i for i, item in enumerate(seen) if wanted in item)
        for wanted in (
            "Ledger",
            "What each stage did",
            "baseline: 91.35 %, 8.13 ms",
            "Layers after 3 QuantizeStatic",
            "BUTTON",
        )
    ]
    assert order == sorted(order)


def test_skip_link_leads_to_the_report_when_pressed(browser, opened: Path) -> None:
    browser.open(opened)
    browser.press("Tab", 9)
    browser.press("Enter", 13, "\r")
    assert browser.run("document.activeElement.id") == "main"


def test_point_shows_its_figures_when_it_has_the_focus(browser, opened: Path) -> None:
    browser.open(opened)
    script = "getComputedStyle(document.querySelector('.point.ships .readout')).visibility"
    assert browser.run(script) == "hidden"
    browser.run("document.querySelector('.point.ships').focus()")
    assert browser.run(script) == "visible"


def test_layer_table_is_sorted_when_a_header_is_pressed(browser, opened: Path) -> None:
    browser.open(opened)
    table = "document.querySelector('.sortable')"
    column = f"[...{table}.tBodies[0].rows].map((row) => Number(row.cells[3].dataset.value))"
    header = f"{table}.tHead.rows[0].cells[3]"
    original = browser.run(column)
    assert original != sorted(original, reverse=True)
    browser.run(f"{header}.querySelector('button').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.run(column) == sorted(original, reverse=True)
    assert browser.run(f"{header}.getAttribute('aria-sort')") == "descending"
    browser.press("Enter", 13, "\r")
    assert browser.run(column) == sorted(original)
    assert browser.run(f"{header}.getAttribute('aria-sort')") == "ascending"


def test_page_opens_every_part_when_it_is_printed(browser, opened: Path) -> None:
    browser.open(opened)
    closed = "document.querySelectorAll('details:not([open])').length"
    before = browser.run(closed)
    assert before > 0
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(closed) == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(closed) == before


def test_page_fits_the_paper_when_it_is_printed(browser, opened: Path) -> None:
    browser.open(opened, width=718)  # A4 at 96 dots an inch, less margins of 1 cm
    browser.send("Emulation.setEmulatedMedia", media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.documentElement.scrollWidth") <= 718
    browser.send("Emulation.setEmulatedMedia", media="")


def test_wide_tables_scroll_by_keyboard_when_the_page_is_narrow(browser, opened: Path) -> None:
    browser.open(opened, width=380)
    ledger = "document.querySelector('.scroll[aria-label=Ledger]')"
    assert browser.run(f"{ledger}.scrollWidth > {ledger}.clientWidth && {ledger}.tabIndex === 0") is True
    assert browser.run(f"{ledger}.getAttribute('role')") == "region"


def test_landmarks_and_headings_are_in_order_when_read_aloud(browser, opened: Path) -> None:
    browser.open(opened)
    assert browser.run("['header', 'nav', 'main', 'footer'].map((n) => document.querySelectorAll(n).length)") == [1] * 4
    levels = browser.run("[...document.querySelectorAll('h1, h2, h3')].map((n) => Number(n.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert browser.run("document.querySelectorAll('section:not([aria-labelledby])').length") == 0
    assert browser.run("[...document.links].every((link) => document.querySelector(link.hash))") is True


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_fragment_takes_the_colours_of_its_notebook(browser, sample: Report, tmp_path: Path, dark: bool) -> None:
    ink, paper = ("rgb(238, 238, 238)", "rgb(17, 17, 17)") if dark else ("rgb(17, 17, 17)", "rgb(255, 255, 255)")
    path = tmp_path / "notebook.html"
    body = f'<!doctype html><meta charset="utf-8"><body style="color: {ink}; background: {paper}">{ledger_html(sample)}'
    path.write_text(body, encoding="utf8")
    browser.open(path, width=800, dark=dark)
    assert browser.run("getComputedStyle(document.querySelector('.ledger td')).color") == ink
    assert browser.requests() == [path.as_uri()]
    assert browser.problems() == []
