"""The tables of docs/reach.md out of the records."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

Record = dict[str, Any]
FAILURES = ("wrong", "crash", "timeout")
MARKERS = ("<!-- reach -->", "<!-- /reach -->")
HEADS = (
    "model",
    "inputs",
    "outcome",
    "capture",
    "batch norms",
    "behind a layer",
    "convs",
    "parameters",
    "error",
    "CPU s",
)
WAYS = {"with": "given", "without": "none"}


def tables(records: dict[str, Record]) -> str:
    """Totals, a table with a row for each model and way, and what stands in the way."""
    rows, reasons = [], []
    for name, record in records.items():
        for inputs, result in _ways(record):
            rows.append((f"`{name}`", inputs, *_row(record["eager"], result)))
            reasons += [f"- `{name}`, inputs {inputs}: {text}" for text in _told(result)]
    table = tabulate(rows, HEADS, "github", disable_numparse=True)
    blocks = [summary(records), table, "## What stands in the way", "\n".join(reasons) or "Nothing."]
    return "\n\n".join(blocks)


def summary(records: dict[str, Record]) -> str:
    """How many are whole, of those that run at all."""
    run = [r for r in records.values() if r["eager"]["status"] == "ok"]
    lines = []
    for way, title in (("with", "with example inputs"), ("without", "without")):
        outcomes = [outcome(r[way]) for r in run]
        told = ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(sorted(outcomes)) if o != "whole")
        seconds = sum(r[way].get("optimize_s", 0) for r in run)
        lines.append(f"{outcomes.count('whole')} of {len(run)} whole {title} ({told or 'all'}; {seconds:.0f} s)")
    skipped = len(records) - len(run)
    return ";\n".join(lines) + (f";\n{skipped} not run." if skipped else ".")


def outcome(result: Record) -> str:
    """`whole`, `partly`, `untouched`, or the status of what did not go well."""
    if result["status"] != "ok":
        return str(result["status"])
    return "whole" if result["whole"] else "partly" if result["fired"] else "untouched"


def _ways(record: Record) -> list[tuple[str, Record]]:
    """Both ways, as one row where they came to the same."""
    if "with" not in record:
        return [("-", record["eager"])]
    told = [(*_row(record["eager"], record[way])[:-2], tuple(_told(record[way]))) for way in WAYS]
    if told[0] == told[1]:
        return [("given or none", record["with"])]
    return [(text, record[way]) for way, text in WAYS.items()]


def _row(before: Record, result: Record) -> tuple[str, ...]:
    if "convs" not in result or "convs" not in before:
        return (outcome(result), *"-" * 7)
    left = {key: _change(before[key], result[key]) for key in ("norms", "behind", "convs", "params")}
    extra = [_change(before[k], result[k]) + f" {name}" for k, name in EXTRA.items() if before[k]]
    numbers = (left["norms"], ", ".join([left["behind"], *extra]), left["convs"], left["params"])
    error = f"{result['error']:.0e}" + ("" if before["dtype"] == "float64" else f" ({before['dtype']})")
    return (outcome(result), result["capture"], *numbers, error, f"{result['optimize_s']:.2f}")


EXTRA = {"frozen": "frozen", "computed": "computed weights"}


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _told(result: Record) -> list[str]:
    """Messages of what went wrong; or, of a model that is not whole, the two reasons most often given."""
    if "message" in result:
        return [f"{result['status']}: {result['message']}"]
    return [] if result.get("whole", True) else result["why"][:2]


def between_markers(page: str, text: str) -> str:
    """The page with `text` between its markers.

    Raises:
        ValueError: it has none.
    """
    start, end = MARKERS
    if start not in page or end not in page:
        raise ValueError(f"the page has no {start} ... {end}")
    head, rest = page.split(start, 1)
    return f"{head}{start}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}"


def describe(name: str, record: Record) -> str:
    """One line for the terminal."""
    told = [f"{way} inputs {outcome(record[way])}" for way in WAYS if way in record]
    return f"{name}: " + (", ".join(told) or outcome(record["eager"]))
