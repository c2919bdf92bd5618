"""Why something was left alone: a sentence, the place, and what the user can do about it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Refusal:
    """One site that did not fuse.

    Attributes:
        reason: a sentence without the place in it, so that equal reasons group in the report.
        where: module path or node name of the site.
        remedy: what the user can do, or "" where there is nothing to do.
        detail: the numbers of this one site ("2304 MACs per pixel instead of 320").
        pattern: name of the pattern that refused, or "" when no pattern was asked.
    """

    reason: str
    where: str = ""
    remedy: str = ""
    detail: str = ""
    pattern: str = ""

    def at(self, where: str) -> Refusal:
        return self if self.where else replace(self, where=where)

    def by(self, pattern: str) -> Refusal:
        return self if self.pattern else replace(self, pattern=pattern)

    def __str__(self) -> str:
        text = f"{self.where}: {self.reason}" if self.where else self.reason
        if self.detail:
            text += f" ({self.detail})"
        return f"{text}; {self.remedy}" if self.remedy else text


class CaptureError(RuntimeError):
    """The model could not be turned into one graph; the message names the line and the remedy.

    `place` is the line and what it raised, alone.
    """

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.place = place or message


class VerificationError(RuntimeError):
    """The optimized model's outputs differ from the model's by more than the tolerance."""
