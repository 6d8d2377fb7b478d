"""Figures as words, the same in the terminal and on the page. Percent and units appear here first, never in the data.

What was not measured is said to be so, with the reason; it never reads as 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pared.report.data import Agreement, Figures, Pruned, Report, Speedup, Stage, WithoutVnni

NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"
REFERENCE = "reference"
NOT_TAKEN = "this run did not take it"
NO_METRIC = "the task gives no metric, or no labelled validation data"
NO_TEST_METRIC = "the task gives no metric, or no labelled test data"


def is_ratio(metric: str) -> bool:
    """True for metrics that are shown in percent: accuracy, top-k and F1, ours or torchmetrics'.

    Example:
        >>> is_ratio("top5"), is_ratio("MulticlassAccuracy"), is_ratio("mse")
        (True, True, False)
    """
    name = metric.lower()
    return name.endswith(("accuracy", "f1", "f1score")) or (name.startswith("top") and name[3:].isdigit())


def number(value: float) -> str:
    """Four significant digits.

    Example:
        >>> number(0.0123456), number(1234567.0)
        ('0.01235', '1.235e+06')
    """
    return f"{value:.4g}" if math.isfinite(value) else NOT_FINITE


def metric_value(name: str, value: float | None) -> str:
    """A metric: percent where it is a ratio."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{100 * value:.2f} %" if is_ratio(name) else number(value)


def scaled(value: float, units: Sequence[str]) -> str:
    """Three significant digits with the unit that keeps the number below 1000."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    digits = 0 if abs(value) >= 99.95 or power == 0 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}".rstrip()


def size(value: int | None) -> str:
    """Bytes, in decimal units.

    Example:
        >>> size(4_840_000), size(999), size(None)
        ('4.84 MB', '999 B', 'not measured')
    """
    return NOT_MEASURED if value is None else scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: int | None) -> str:
    """A count of parameters or multiply-accumulates.

    Example:
        >>> count(11_689_512), count(512)
        ('11.7 M', '512')
    """
    return NOT_MEASURED if value is None else scaled(value, ("", "k", "M", "G", "T"))


def milliseconds(value: float | None) -> str:
    """A latency, three significant digits."""
    if value is None:
        return NOT_MEASURED
    digits = 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} ms"


def duration(seconds: float) -> str:
    """A time that someone waited.

    Example:
        >>> duration(4.21), duration(200), duration(7260)
        ('4.2 s', '3 min 20 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def times(ratio: float) -> str:
    """A ratio of two figures: '2.71x'."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def interval(speedup: Speedup) -> str:
    """The 95 % interval of a speed-up."""
    return f"{times(speedup.low)} to {times(speedup.high)}"


def decibels(given: Agreement | None) -> str:
    """How close two sets of outputs are, in dB; 'exact' where they are equal."""
    if given is None:
        return NOT_MEASURED
    if given.sqnr_db is None:
        return "exact" if given.max_abs == 0 else NOT_FINITE
    return f"{given.sqnr_db:.1f} dB"


def share(value: float | None) -> str:
    """A ratio of 0 to 1 in percent, or ''."""
    return "" if value is None else f"{100 * value:.2f} %"


def percent(value: float) -> str:
    """A fraction in percent, with a decimal only where there is one.

    Example:
        >>> percent(0.25), percent(0.125), percent(1 / 3)
        ('25 %', '12.5 %', '33.3 %')
    """
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def what_stays(params: float, macs: float) -> str:
    """How much of the dense network a prune leaves, both as fractions.

    Example:
        >>> what_stays(0.25, 0.5)
        '25 % of parameters and 50 % of multiply-accumulates stay'
    """
    return f"{percent(params)} of parameters and {percent(macs)} of multiply-accumulates stay"


def proof(pruned: Pruned) -> str:
    """How far what a prune left computes what the network with the same channels masked computes."""
    parts = [f"Checked: the outputs are those of the network with these channels masked, to {pruned.difference:.0e}."]
    if pruned.taken_in:
        parts.append(f"What follows has taken in the constants of {plural(pruned.taken_in, 'removed channel')}.")
    vague = [group.name for group in pruned.groups if group.approximate]
    if vague:
        named = vague[0] if len(vague) == 1 else f"{vague[0]} and {len(vague) - 1} more"
        parts.append(f"The removal is approximate in {named}, as the table says.")
    return " ".join(parts)


def metric_names(report: Report) -> list[str]:
    """Every metric in the report; the one that decides comes first."""
    rows: list[Iterable[str]] = [stage.metrics for stage in report.stages]
    if report.final is not None:
        rows += [report.final.baseline_metrics, report.final.metrics]
    return list(dict.fromkeys(name for row in rows for name in row))


def better_when(report: Report, metric: str) -> bool | None:
    """True where a higher value is better, None where the report does not say."""
    known = report.task.get("higher_is_better")
    value = known.get(metric) if isinstance(known, dict) else None
    return value if isinstance(value, bool) else None


def drop(report: Report, metric: str, before: float, after: float) -> tuple[int, str]:
    """How a metric moved: +1 better, -1 worse, 0 neither; and the amount in words, in points where it is a ratio.

    Args:
        report: For the metric's direction.
        metric: Its name.
        before: The baseline's value.
        after: The candidate's, on the same data.
    """
    change = after - before
    if not math.isfinite(change):
        return 0, NOT_FINITE
    amount = f"{100 * abs(change):.2f} points" if is_ratio(metric) else number(abs(change))
    if change == 0:
        return 0, "unchanged"
    higher = better_when(report, metric)
    if higher is None:
        return 0, f"{'up' if change > 0 else 'down'} {amount}"
    good = (change > 0) == higher
    return (1 if good else -1), f"{amount} {'better' if good else 'worse'}"


def cost(metric: str, drop: float) -> str:
    """How much worse a metric is for one change.

    Example:
        >>> cost("accuracy", 0.0125), cost("mse", 0.0)
        ('1.25 points worse', 'unchanged')
    """
    if not math.isfinite(drop):
        return NOT_FINITE
    if drop == 0:
        return "unchanged"
    amount = f"{100 * abs(drop):.2f} points" if is_ratio(metric) else number(abs(drop))
    return f"{amount} {'worse' if drop > 0 else 'better'}"


def speed(speedup: Speedup | None) -> tuple[int, str]:
    """How speed moved, as `drop` says it."""
    if speedup is None:
        return 0, "speed not measured"
    if speedup.verdict == "faster":
        return 1, f"{times(speedup.value)} faster"
    if speedup.verdict == "slower":
        return -1, f"{times(1 / speedup.value)} slower"
    return 0, "no measurable change in speed"


def shrink(before: int | None, after: int | None) -> tuple[int, str]:
    """How the file's size moved, as `drop` says it."""
    if not before or not after:
        return 0, "size not measured"
    ratio = before / after
    if abs(ratio - 1) < 0.005:
        return 0, "the same size"
    return (1, f"{times(ratio)} smaller") if ratio > 1 else (-1, f"{times(1 / ratio)} larger")


def joined(parts: Sequence[str]) -> str:
    """A list in a sentence.

    Example:
        >>> joined(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def headline(report: Report) -> str:
    """What was gained and what lost, in one sentence."""
    final = report.final
    if final is None:
        return "No verdict: the run stopped before its final measurement on test data."
    if report.stages and final.stage == report.stages[0].name:
        return "Nothing paid for itself: the baseline ships as it was."
    why = why_not_final(report)
    if why and final.speedup is None and not final.metrics:
        return f"What ships was not measured: {why}."
    moves = [speed(final.speedup), shrink(final.baseline_size_bytes, final.size_bytes)]
    name = next(iter(final.metrics), None)
    if name is None or name not in final.baseline_metrics:
        moves.append((0, "quality on test data not measured"))
    else:
        sign, amount = drop(report, name, final.baseline_metrics[name], final.metrics[name])
        moves.append((sign, f"{name} {amount}"))
    gains, losses = ([text for sign, text in moves if sign == side] for side in (1, -1))
    rest = losses + [text for sign, text in moves if sign == 0]
    if gains:
        sentence = joined(gains) + (f", with {joined(rest)}" if rest else "")
    else:
        sentence = ("Nothing gained: " if losses else "") + joined(rest)
    return f"{sentence[0].upper()}{sentence[1:]}."


def without_vnni(report: Report) -> list[str]:
    """A sentence for what ships, or for the last stage that was kept, where it may be wrong without VNNI."""
    kept = [stage for stage in report.stages if stage.kept]
    found = kept[-1].without_vnni if kept else None
    if found is None:
        return []
    parts = []
    for name, after in found.metrics.items():
        before = found.metrics_with.get(name)
        change = "" if before is None else f" ({drop(report, name, before, after)[1]})"
        parts.append(f"{name} {metric_value(name, before)} -> {metric_value(name, after)}{change}")
    if found.sqnr_db is not None:
        parts.append(f"outputs at {found.sqnr_db:.1f} dB of those with it")
    else:
        parts.append("outputs unchanged")
    taken = f"emulated on {plural(found.samples, 'sample')} in {duration(found.seconds)}"
    sentences = [f"On x86 without VNNI, where 8-bit products saturate: {joined(parts)}; {taken}."]
    if worse_without_vnni(report, found):
        sentences.append(
            "Warning: this file is markedly worse on such processors. "
            "QuantizeStatic(weights={'cpu': 'any'}) makes one that is not."
        )
    return sentences


def worse_without_vnni(report: Report, found: WithoutVnni) -> bool:
    """True where the first metric drops by more than chance: twice the spread of as many changed samples as there are.

    Where outputs are no class scores, nothing is known of chance, and every drop counts.
    """
    name = next(iter(found.metrics), None)
    if name is None or name not in found.metrics_with:
        return False
    before, after = found.metrics_with[name], found.metrics[name]
    noise = 2 * math.sqrt((1 - found.agreement) / found.samples) if found.agreement is not None else 0.0
    return drop(report, name, before, after)[0] < 0 and abs(after - before) > noise


def plural(number: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> plural(1, "layer"), plural(60, "layer")
        ('1 layer', '60 layers')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def why_missing(stage: Stage, figure: str) -> str:
    """Why a figure of a stage was not measured."""
    if not stage.measured:
        return stage.why or "the runtime cannot run here"
    return NO_METRIC if figure == "metrics" else NOT_TAKEN


def why_not_final(report: Report, otherwise: str = "") -> str:
    """Why what ships was not measured: the reason of its stage, or `otherwise` where that was measured."""
    names = {stage.name: stage for stage in report.stages if not stage.measured}
    stage = names.get(report.final.stage) if report.final else None
    return otherwise if stage is None else why_missing(stage, "")


def why_no_metric(report: Report) -> str:
    """Why the ledger has no metric at all."""
    unmeasured = [stage for stage in report.stages if not stage.measured]
    return why_missing(unmeasured[0], "") if unmeasured else NO_METRIC


def baseline(report: Report) -> Figures | None:
    """The first stage, where there is one."""
    return report.stages[0] if report.stages else None


def facts(data: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested data as rows of name and value, for tables of the environment and the settings.

    Example:
        >>> facts({"cpu": {"model": "x", "cores": 2}, "avx": ["a", "b"], "on": True})
        [('cpu model', 'x'), ('cpu cores', '2'), ('avx', 'a, b'), ('on', 'yes')]
    """
    if isinstance(data, dict):
        return [row for key, value in data.items() for row in facts(value, f"{prefix} {key}".strip())]
    if isinstance(data, (list, tuple)) and any(isinstance(item, (dict, list, tuple)) for item in data):
        return [row for i, item in enumerate(data, 1) for row in facts(item, f"{prefix} {i}".strip())]
    if isinstance(data, (list, tuple)):
        return [(prefix, ", ".join(map(str, data)) or "none")]
    words = {True: "yes", False: "no", None: "none"}
    return [(prefix, words[data] if data is None or isinstance(data, bool) else str(data))]
