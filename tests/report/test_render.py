"""The ledger in a terminal."""

import dataclasses
import io

import pytest
from rich.console import Console

from pared.report.data import Report
from pared.report.render import print_ledger, to_text


def test_ledger_fits_and_keeps_every_figure_whole_when_the_terminal_has_80_columns(sample: Report) -> None:
    shown = to_text(sample)
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.isascii()
    for stage in ("baseline", "1 Train", "2 PruneChannels", "3 QuantizeStatic"):
        assert stage in shown
    for figure in ("91.35 %", "8.13 ms", "2.90x faster", "2.86 to 2.94", "4.55 MB", "45.7 dB", "13.9 dB", "95.30 %"):
        assert figure in shown


def test_ledger_gives_the_reason_when_a_stage_is_rolled_back(sample: Report) -> None:
    shown = " ".join(to_text(sample).split())
    assert (
        "2 PruneChannels was rolled back: accuracy on validation fell by 3.10 points, the budget allows 1.00" in shown
    )


def test_verdict_compares_test_data_when_the_run_ended(sample: Report) -> None:
    shown = to_text(sample)
    assert "2.90x faster and 3.91x smaller, with accuracy 0.20 points worse." in shown
    assert "91.42 % -> 91.22 % (0.20 points worse)" in shown
    assert "8.13 ms -> 2.81 ms (2.90x faster, 2.85x to 2.93x)" in shown
    assert "17.8 MB -> 4.55 MB (3.91x smaller)" in shown
    assert "onnxruntime, batch 1, 2 threads, build-17" in shown


def test_ledger_says_not_measured_and_why_when_the_runtime_cannot_run_here(unmeasured: Report) -> None:
    shown = " ".join(to_text(unmeasured).split())
    assert "3 QuantizeStatic was not measured: this machine has no such runtime" in shown
    assert "What ships was not measured: this machine has no such runtime." in shown
    row = to_text(unmeasured, width=100).split("3 QuantizeStatic")[1].split("\n\n")[0]
    assert row.count("measured") == 6
    assert not any(character.isdigit() for character in row)


def test_ledger_has_no_metric_column_but_the_reason_when_nothing_was_labelled(sample: Report) -> None:
    stages = tuple(dataclasses.replace(stage, metrics={}) for stage in sample.stages)
    shown = to_text(dataclasses.replace(sample, stages=stages, final=None))
    assert "No metric was measured: the task gives no metric" in shown
    assert "No verdict: the run stopped before its final measurement" in shown
    assert "accuracy  " not in shown


def test_ledger_obeys_no_markup_or_terminal_code_when_a_name_holds_one(hostile: Report) -> None:
    shown = to_text(hostile, width=200)
    assert "\x1b" not in shown
    assert r"\x1b[31m[bold]" in shown


@pytest.mark.parametrize("width", [80, 120])
def test_print_ledger_shows_the_same_words_when_the_console_has_colours(sample: Report, width: int) -> None:
    plain, coloured = io.StringIO(), io.StringIO()
    print_ledger(sample, Console(file=plain, width=width, color_system=None))
    print_ledger(sample, Console(file=coloured, width=width, force_terminal=True, color_system="standard"))
    assert "\x1b[" in coloured.getvalue()
    assert "\x1b[" not in plain.getvalue()
    assert coloured.getvalue().count("faster") == plain.getvalue().count("faster") > 0


def test_str_of_a_report_is_its_ledger(sample: Report) -> None:
    assert str(sample) == to_text(sample)


def test_ledger_stacks_metrics_in_the_order_of_the_header_when_there_are_two(sample: Report) -> None:
    stages = tuple(dataclasses.replace(stage, metrics={"accuracy": 0.5, "mse": 0.25}) for stage in sample.stages)
    rows = to_text(dataclasses.replace(sample, stages=stages)).splitlines()
    head = next(i for i, line in enumerate(rows) if line.startswith("stage"))
    assert (rows[head - 1].split()[0], rows[head].split()[1]) == ("accuracy", "mse")
    first = next(i for i, line in enumerate(rows) if line.startswith("baseline"))
    assert "50.00 %" in rows[first]
    assert rows[first + 1].strip() == "0.25"
