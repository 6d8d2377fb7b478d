"""The documentation is true: every example runs, every table can be made, every page is found.

A page's Python blocks run in order in one namespace, in an empty folder. A block with `title="name"` is written to that
file instead, so that commands that follow can read it. Lines of bash blocks that start with `pared` run too.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pared.cli import main
from pared.measure import latency

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)?(?: title=\"([^\"]+)\")?(?: .*)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands that a page shows and that have tests of their own, because they take too long or read what only a user has.
ELSEWHERE = re.compile(r"pared (demo|run .*imagenet)")


def examples(page: Path) -> list[tuple[str, str, str]]:
    """Language, title and text of every fenced block."""
    return [(found[1] or "", found[2] or "", found[3]) for found in FENCE.finditer(page.read_text(encoding="utf8"))]


def runnable(page: Path) -> bool:
    return any(
        language == "python" or (language == "bash" and re.search("^pared ", text, re.MULTILINE))
        for language, _, text in examples(page)
    )


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=relative)
def test_page_examples_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Pages put "." on the path; what an earlier page found there lay in another folder.
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.path_importer_cache.pop(".", None)
    # Examples are run to see that they are true, not for their figures.
    monkeypatch.setattr(latency, "SITTINGS", 2)
    monkeypatch.setattr(latency, "SECONDS_PER_FILE", 0.3)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, (language, title, text) in enumerate(examples(page), 1):
        if title:
            (tmp_path / title).write_text(text, encoding="utf8")
        elif language == "python":
            code = compile(text, f"{relative(page)}, block {number}", "exec", dont_inherit=True)
            exec(code, namespace)  # noqa: S102  # our own pages
        elif language == "bash":
            for line in re.sub(r"\\\n\s*", "", text).splitlines():
                run_command(line.split(" #")[0].strip(), capsys)


def run_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not line.startswith("pared ") or ELSEWHERE.match(line):
        return
    capsys.readouterr()
    status = main(shlex.split(line)[1:])
    printed = capsys.readouterr()
    assert status == 0, f"{line}\n{printed.out}\n{printed.err}"
    assert printed.out.strip(), f"{line} printed nothing"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_page_markers_all_become_tables(page: Path, hooks: ModuleType) -> None:
    made = hooks.on_page_markdown(page.read_text(encoding="utf8"))
    assert not hooks.MARKER.search(made)


def test_hooks_list_every_setting_of_every_step(hooks: ModuleType) -> None:
    import dataclasses

    from pared.recipe import AROUND, STEPS, step_class

    text = hooks.steps()
    missing = [
        f"{name}.{field.name}"
        for name in (*STEPS, *AROUND)
        for field in dataclasses.fields(step_class(name))
        if f"| `{field.name}` |" not in text.split(f"## {name}\n")[1].split("\n## ")[0]
    ]
    assert missing == []


def test_hooks_stop_the_build_when_a_marker_is_unknown(hooks: ModuleType) -> None:
    with pytest.raises(KeyError, match="optoins"):
        hooks.on_page_markdown("<!-- optoins: Train -->")


def test_hooks_show_a_lost_claim_as_lost(hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "speed.json").write_text(
        '{"environment": {"cpu": "Abacus"}, "claims": [{"what": "size", "value": 3.123456, "relation": ">=", '
        '"bound": 3.5, "holds": false}]}'
    )
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    assert "| size | 3.123 | >= 3.5 | **no** |" in hooks.results("speed")


def test_hooks_name_the_script_that_made_the_figures(hooks: ModuleType) -> None:
    for result in hooks.RESULTS.glob("*.json"):
        named = re.search(r"NAME=(\w+)", hooks.results(result.stem))
        assert named is not None
        assert (ROOT / "benchmarks" / f"{named[1]}.py").exists(), result.stem


def test_navigation_lists_every_page_once() -> None:
    listed = re.findall(
        r"^\s+- (?:\w+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf8"), re.MULTILINE
    )
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    records = {page for page in pages if re.match(r"decisions/\d{4}-", page)}
    assert sorted(listed) == sorted(pages - records)


@pytest.mark.parametrize("record", sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")), ids=lambda path: path.stem)
def test_decision_record_has_its_number_and_every_part(record: Path, hooks: ModuleType) -> None:
    text = record.read_text(encoding="utf8")
    missing = [part for part in ("Context", "Choice", "Rejected", "Revisit when") if f"**{part}" not in text]
    assert missing == []
    assert text.startswith(f"# {record.name[:4]}: ")
    assert f"]({record.name})" in hooks.decisions()


def test_links_between_pages_lead_to_files() -> None:
    broken = [
        f"{relative(page)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text(encoding="utf8")))
        if not (page.parent / target).exists()
    ]
    assert broken == []
