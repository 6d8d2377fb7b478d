"""The page and the notebook's fragment, as text."""

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pared.report.data import Report
from pared.report.html import ledger_html, page, write_html

VOID = {"meta", "link", "img", "br", "hr", "input", "line", "circle", "path", "polyline", "rect"}


class Outline(HTMLParser):
    """Tags with their attributes, and all text; fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_page_holds_every_section_when_the_run_is_complete(sample: Report) -> None:
    text = Outline(page(sample)).text
    for words in (
        "2.90x faster and 3.91x smaller, with accuracy 0.20 points worse.",
        "accuracy on validation fell by 3.10 points, the budget allows 1.00",
        "no measurable change",
        "int8, one scale a channel",
        "its outputs are the model's classes",
        "AMD EPYC 9R14, 2 cores",
        "avx2, avx512f, avx512_vnni",
        "batch size 1",
        "pared run recipe.yaml",
    ):
        assert words in text


def test_navigation_leads_to_every_section_that_is_there(sample: Report) -> None:
    bare = dataclasses.replace(
        sample, stages=tuple(dataclasses.replace(s, sensitivity=(), pruned=None) for s in sample.stages)
    )
    for report, costs in ((sample, True), (bare, False)):
        tags = Outline(page(report)).tags
        links = [found["href"] for tag, found in tags if tag == "a" and (found["href"] or "").startswith("#")]
        headings = [f"#{found['id']}" for tag, found in tags if tag == "h2" and "id" in found]
        assert [link for link in links if link != "#main"] == headings
        assert ("#fragile" in links) == costs
        assert ("#pruned" in links) == costs


def test_page_lists_every_layer_and_every_skip_when_there_are_many(sample: Report) -> None:
    text = Outline(page(sample)).text
    for stage in sample.stages:
        for name in [*(layer.module for layer in stage.layers), *(skip.module for skip in stage.skipped)]:
            assert name in text


def test_page_says_what_was_pruned_and_how_far_that_is_exact(sample: Report) -> None:
    text = Outline(page(sample)).text
    for words in (
        "32.9 % of parameters and 30.6 % of multiply-accumulates stay, rolled back",
        "the outputs are those of the network with these channels masked, to 3e-16",
        "taken in the constants of 42 removed channels",
        "approximate in mlp.0, as the table says",
        "features.0 convolution 32 of 64 50 % 20.0 40.0 60.0",
        "mlp.2 fully connected 64 of 64 0 % 0.5 1.0 1.5",
        "approximate: a layer norm's mean runs over fewer channels",
        "features.1.project features.2.project : it pads",
    ):
        assert words in text


def test_page_has_no_plot_of_curves_when_none_was_measured(sample: Report) -> None:
    found = sample.stages[2].pruned
    assert found is not None
    groups = tuple(dataclasses.replace(group, curve=()) for group in found.groups)
    stage = dataclasses.replace(sample.stages[2], pruned=dataclasses.replace(found, groups=groups, left=(), taken_in=0))
    text = Outline(page(dataclasses.replace(sample, stages=(sample.stages[0], stage, *sample.stages[3:])))).text
    assert "features.0 convolution 32 of 64 50 % features.1" in text
    assert "nothing retrained" not in text
    assert "count as zero" not in text


def test_page_gives_back_the_recipe_when_its_yaml_is_read(sample: Report) -> None:
    tags = re.findall(r'<pre tabindex="0" aria-label="Recipe">(.*?)</pre>', page(sample), re.S)
    assert yaml.safe_load(tags[0].replace("&#39;", "'")) == sample.recipe


@pytest.mark.parametrize("make", [page, ledger_html])
def test_html_gains_no_tag_or_attribute_when_every_foreign_string_is_hostile(hostile: Report, make) -> None:
    made = Outline(make(hostile))
    assert not [tag for tag, _ in made.tags if tag in {"img", "iframe", "object", "a0", "b0"}]
    assert not [name for _, attributes in made.tags for name in attributes if name.startswith("on")]
    assert sum(tag == "script" for tag, _ in made.tags) == (1 if make is page else 0)
    assert "</script><img src=x onerror=alert(1)>" in made.text


def test_page_names_no_outside_address(sample: Report) -> None:
    outline = Outline(page(sample))
    for _, attributes in outline.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    assert not re.search(r"url\(|@import|https?://", page(sample))


def test_page_forbids_all_but_its_own_script_and_style(sample: Report) -> None:
    source = page(sample)
    policy = next(
        a["content"] or "" for t, a in Outline(source).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.S)
        assert len(body) == 1
        digest = base64.b64encode(hashlib.sha256(body[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_page_says_not_measured_and_why_and_never_zero_when_figures_are_missing(unmeasured: Report) -> None:
    source = page(unmeasured)
    text = Outline(source).text
    assert "What ships was not measured: this machine has no such runtime." in text
    row = re.search(r"<tr[^>]*>\s*<th scope=\"row\">\s*<span class=\"name\">3 QuantizeStatic.*?</tr>", source, re.S)
    assert row is not None
    assert "not measured: this machine has no such runtime" in row[0]
    cells = re.findall(r"<td.*?</td>", row[0], re.S)
    assert len(cells) == 6
    assert all("not measured" in cell and not re.search(r"\d", re.sub(r"<.*?>", "", cell)) for cell in cells)


def test_page_stands_when_the_run_has_no_stage_or_no_verdict(sample: Report) -> None:
    empty = dataclasses.replace(sample, stages=(), final=None, recipe={}, task={}, environment={})
    text = Outline(page(empty)).text
    assert "No verdict: the run stopped before its final measurement" in text
    assert "only its own script repeats it" in text


def test_table_headers_have_a_scope_when_they_are_read_aloud(sample: Report) -> None:
    headers = [attributes for tag, attributes in Outline(page(sample)).tags if tag == "th"]
    assert len(headers) > 200
    assert all(attributes.get("scope") in {"row", "col"} for attributes in headers)


def test_write_html_writes_the_page_as_utf8(sample: Report, tmp_path: Path) -> None:
    named = dataclasses.replace(sample, target="Läufer")
    write_html(named, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == page(named).encode()


def test_notebook_shows_the_ledger_when_a_report_is_displayed(sample: Report) -> None:
    shown = sample._repr_html_()
    assert shown == ledger_html(sample)
    assert "rolled back" in Outline(shown).text
