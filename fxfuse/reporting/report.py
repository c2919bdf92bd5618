"""The report: what fused, what did not and why, in words, as data and as Markdown."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from fxfuse.names import shown
from fxfuse.refusal import Refusal


@dataclass(frozen=True, slots=True)
class Fired:
    """One fused layer: where it is, which patterns made it, and its shape before and after."""

    path: str
    patterns: tuple[str, ...]
    before: tuple[str, ...]
    after: str
    macs_before: int | None = None
    macs_after: int | None = None

    @property
    def saved(self) -> int:
        """Multiply-accumulates fewer; 0 where shapes are not known."""
        return (self.macs_before or 0) - (self.macs_after or 0)

    @property
    def summary(self) -> str:
        """`2 conv2d, 3 batch_norm, identity`: what went into it."""
        counts = Counter(b.split(" ")[0] for b in self.before)
        return ", ".join(f"{n} {name}" if n > 1 else name for name, n in counts.items())


@dataclass(frozen=True, slots=True)
class Totals:
    """Size of the model at one end of the optimization; MACs need example inputs."""

    nodes: int = 0
    params: int = 0
    macs: int | None = 0
    ops: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Totals) -> Totals:
        """Both together; MACs where both know their own."""
        macs = None if self.macs is None or other.macs is None else self.macs + other.macs
        ops = dict(sorted((Counter(self.ops) + Counter(other.ops)).items()))
        return Totals(self.nodes + other.nodes, self.params + other.params, macs, ops)


@dataclass(frozen=True)
class Report:
    """What one optimization did. `str()` is the table; `to_dict` and `to_markdown` hold the same.

    `capture` is the way the model as a whole was taken; `parts` are path, way and reason of every module
    that was looked at on its own, as soon as there is more than one.
    """

    model: str
    fired: tuple[Fired, ...]
    refused: tuple[Refusal, ...]
    before: Totals
    after: Totals
    cost: str
    seconds: float
    capture: str
    parts: tuple[tuple[str, str, str], ...] = ()
    dry_run: bool = False
    max_error: float | None = None
    timing: dict[str, Any] = field(default_factory=dict)
    kept: int = 0
    kept_for: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def by_pattern(self) -> dict[str, int]:
        """How many sites each pattern had a part in."""
        return dict(sorted(Counter(p for f in self.fired for p in set(f.patterns)).items()))

    @property
    def by_reason(self) -> dict[tuple[str, str], list[Refusal]]:
        """Refusals grouped by reason and remedy, most frequent first."""
        groups: dict[tuple[str, str], list[Refusal]] = {}
        for refusal in self.refused:
            groups.setdefault((refusal.reason, refusal.remedy), []).append(refusal)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: lists, dicts, strings and numbers, ready for JSON."""
        plain = ("model", "dry_run", "cost", "capture", "seconds", "max_error", "timing", "kept")
        return {name: getattr(self, name) for name in plain} | {
            "sites": len(self.fired),
            "kept_for": list(self.kept_for),
            "notes": list(self.notes),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "parts": [{"path": p, "capture": how, "reason": why} for p, how, why in self.parts],
            "patterns": self.by_pattern,
            "fired": [asdict(f) | {"patterns": list(f.patterns), "before": list(f.before)} for f in self.fired],
            "refused": [
                {
                    "reason": reason,
                    "remedy": remedy,
                    "sites": [{"where": r.where, "detail": r.detail, "pattern": r.pattern} for r in refusals],
                }
                for (reason, remedy), refusals in self.by_reason.items()
            ],
        }

    def to_markdown(self) -> str:
        """The report as GitHub-flavoured Markdown."""
        return self._render("github", "## ")

    def __str__(self) -> str:
        return self._render("simple", "")

    def _render(self, style: str, mark: str, sites: int = 12) -> str:
        said = _escaped if mark else shown
        blocks = [mark + said(self.headline), _table(self._sizes(), ("", "before", "after", "ratio"), style)]
        if self.timing:
            speed = "time per call: {before_ms:.2f} ms -> {after_ms:.2f} ms, ratio {ratio:.2f} "
            speed += "({low:.2f} to {high:.2f}, {rounds} interleaved rounds, {device})"
            blocks.append(speed.format(**self.timing))
        if self.parts:
            taken = [(path or self.model, how, why) for path, how, why in self.parts]
            blocks.append(_table(taken[:sites], ("module", "captured", ""), style) + _more(len(taken) - sites, mark))
        if self.kept:
            text = (
                f"{self.kept:,} original parameters are kept, for code that does more with a part than the calls seen"
            )
            lines = [f"{text} (fxfuse.strip drops them):", *(f"  {said(w)}" for w in self.kept_for[:4])]
            blocks.append("\n".join(lines) + _more(len(self.kept_for) - 4, mark))
        blocks += map(said, self.notes)
        if self.fired:
            blocks.append(_table(list(self.by_pattern.items()), ("pattern", "sites"), style))
            rows = [(f.path, ", ".join(dict.fromkeys(f.patterns)), f.summary, f.after) for f in self.fired]
            title = "would fuse" if self.dry_run else "fused"
            blocks.append(
                _table(rows[:sites], (title, "patterns", "from", "to"), style) + _more(len(rows) - sites, mark)
            )
        for (reason, remedy), refusals in self.by_reason.items():
            names = [said(r.where + (f": {r.detail}" if r.detail else "")) for r in refusals]
            head = f"{mark and '### '}not fused, {len(refusals)}x: {said(reason)}"
            head += f"\n  -> {said(remedy)}" if remedy else ""
            bullet = "\n- " if mark else "\n  "
            listed = "".join(bullet + name for name in names[:4])
            blocks.append(head + listed + _more(len(names) - 4, mark and "- "))
        ops = [(o, self.before.ops.get(o, 0), self.after.ops.get(o, 0)) for o in self.before.ops | self.after.ops]
        if changed := sorted(row for row in ops if row[1] != row[2]):
            blocks.append(_table(changed, ("executed", "before", "after"), style))
        return "\n\n".join(blocks)

    @property
    def headline(self) -> str:
        """One line: model, sites fused and refused, time taken, error if verified."""
        verb = "would fuse" if self.dry_run else "fused"
        text = f"fxfuse: {self.model}: {verb} {len(self.fired)} sites in {self.seconds:.2f} s"
        text += f", {len(self.refused)} refused"
        if self.max_error is not None:
            text += f", max relative error {self.max_error:.1e}"
        return text

    def _sizes(self) -> list[tuple[str, str, str, str]]:
        before, after = self.before, self.after
        rows = [_row("nodes", before.nodes, after.nodes), _row("params", before.params, after.params)]
        if before.macs is not None and after.macs is not None:
            rows.append(_row("MACs", before.macs, after.macs))
        kinds = (kind for kind in ("conv", "linear", "batch_norm") if before.ops.get(kind))
        return rows + [_row(kind, before.ops[kind], after.ops.get(kind, 0)) for kind in kinds]


class Reports(tuple[Report, ...]):
    """The reports of several graphs; `str()` is one after the other."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, _short(before), _short(after), f"{after / before:.2f}" if before else "-"


def _short(value: int) -> str:
    if value >= 10**9:
        return f"{value / 1e9:.2f}G"
    return f"{value / 1e6:.2f}M" if value >= 10**6 else f"{value:,}"


def _table(rows: Any, headers: tuple[str, ...], style: str) -> str:
    said = _escaped if style == "github" else shown
    cells = [[said(str(cell)) for cell in row] for row in rows]
    return str(tabulate(cells, headers=headers, tablefmt=style, disable_numparse=True))


def _escaped(text: str) -> str:
    """For Markdown: no sign of `text` ends a cell or begins a tag."""
    return shown(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _more(count: int, mark: str) -> str:
    """How many more rows or, with a `mark` of `- `, bullets there are; below a table of Markdown a paragraph."""
    start = f"\n{mark}" if mark == "- " else "\n\n" if mark else "\n  "
    return f"{start}... and {count} more" if count > 0 else ""
