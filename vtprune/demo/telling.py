"""Outcomes in words, tables and keys: what was asked, what was counted, what colours mean."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vtprune.demo.panes import FORCED_IN, FORCED_OUT, PARTS, Ask, Numbers, Outcome, Pane

_BAND = "#fff 42% 58%"
_MARKS = {
    FORCED_IN: "box-shadow: inset 0 0 0 2px #fff, inset 0 0 0 4px #1a1c22, 0 0 0 1px #8888",
    FORCED_OUT: (
        f"background: linear-gradient(45deg, #0000 42%, {_BAND}, #0000 58%), "
        f"linear-gradient(-45deg, #0000 42%, {_BAND}, #0000 58%), #1a1c22"
    ),
}
"""How marks look beside their names."""


def every_pane(outcome: Outcome) -> tuple[Pane, ...]:
    """The unpruned pane, where there is one, and the others."""
    return (*(() if outcome.unpruned is None else (outcome.unpruned,)), *outcome.panes)


def rows_of(pane: Pane) -> list[tuple[str, str]]:
    """The numbers of a pane for people: what, and how much."""
    numbers = pane.numbers
    if numbers is None:
        return []
    rows = token_rows(numbers)
    if numbers.merged:
        rows.append(("merged into them", str(numbers.merged)))
    if numbers.separators:
        rows.append(("separators, always kept", str(numbers.separators)))
    if numbers.coverage is not None:
        rows.append(("coverage (kept or beside)", f"{100 * numbers.coverage:.0f} %"))
    if numbers.kv_bytes_whole:
        whole = numbers.kv_bytes_whole / 1e6
        rows += [("prompt length", _prompt(numbers)), ("KV cache", f"{numbers.kv_megabytes:.2f} of {whole:.2f} MB")]
    if pane.agreement is not None:
        words = "same answer" if pane.same else "another answer"
        rows.append(("agreement", f"{words}, {100 * pane.agreement:.0f} % of its tokens"))
    seconds = numbers.seconds
    rows += [(name, _milliseconds(seconds[part])) for part, name in PARTS.items() if part in seconds]
    if "score" in seconds and "total" in seconds:
        rows.append(("all together", _milliseconds(seconds["score"] + seconds["total"])))
    return rows


def token_rows(numbers: Numbers) -> list[tuple[str, str]]:
    """How many tokens stay: on average first, where that is another number than at the end."""
    name, whole = "visual tokens kept", f"{numbers.kept} of {numbers.tokens}"
    if numbers.average == numbers.kept:
        return [(name, whole)]
    average = f"{numbers.average:.0f} of {numbers.tokens} on average"
    if numbers.cached:
        return [(name, f"{average} in the cache of a layer"), ("passing all layers", whole)]
    return [(name, f"{average} over layers"), ("behind the last cut", whole)]


def _prompt(numbers: Numbers) -> str:
    if numbers.prompt == numbers.prompt_whole:
        return str(numbers.prompt)
    average = f" ({numbers.prompt_average:.0f} on average over layers)"
    differs = numbers.prompt_average != numbers.prompt
    return f"{numbers.prompt_whole} -> {numbers.prompt}{average if differs else ''}"


def _milliseconds(seconds: float) -> str:
    """Whole ones from 10 on: what is measured once is not known better."""
    count = 1000 * seconds
    return f"{count:.1f} ms" if count < 9.95 else f"{count:.0f} ms"


def overlaps_of(outcome: Outcome) -> list[tuple[str, float]]:
    """Every pair of methods with how much their choices overlap, as far as both chose."""
    found = []
    for first in range(len(outcome.panes)):
        for second in range(first + 1, len(outcome.panes)):
            share = outcome.overlap(first, second)
            if share is not None:
                found.append((f"{outcome.panes[first].method} and {outcome.panes[second].method}", share))
    return found


def asked_line(of: Outcome | Ask) -> str:
    """What was asked besides the question, in a line: the model, where there was an answer, and every option."""
    ask = of.ask if isinstance(of, Outcome) else of
    told = [f"keep {ask.keep}", f"seed {ask.seed}"]
    if isinstance(of, Outcome):
        told.insert(0, of.model)
    if ask.debias:
        told.append(f"debiased: {ask.debiaser}")
    into, out_of = len(ask.forced_in), len(ask.forced_out)
    if into:
        told.append(f"{into} {'patch' if into == 1 else 'patches'} forced in{'' if out_of else ' by hand'}")
    if out_of:
        noun = "" if into else "patch " if out_of == 1 else "patches "
        told.append(f"{out_of} {noun}forced out by hand")
    return ", ".join(told)


def table_html(rows: Sequence[tuple[str, str]]) -> str:
    """What, and how much; nothing without a row."""
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>" if cells else ""


def keys_html(pane: Pane, view: str = "stages") -> str:
    """What colours of a picture mean: in "stages" those of picks and cuts, elsewhere marks of what was forced."""
    shown = [key for key in pane.colours if view == "stages" or (view in ("kept", "strip") and key[0] in _MARKS)]
    return "".join(
        '<span style="display: inline-block"><span class="key" style="'
        f'{_MARKS.get(name, f"background: rgb{colour}; border: 1px solid #8888")}"></span>{escape(name)}</span>'
        for name, colour in shown
    )
