"""Pieces of the page in HTML; whatever came from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vtprune.demo.choices import Choice
from vtprune.demo.export import keys_html, overlaps_of, rows_of, table_html
from vtprune.demo.panes import Outcome, Pane

STYLE = """
.vtp { font-size: 15px; line-height: 1.45 }
.vtp h3 { margin: 0; font-size: 1.1em } .vtp p { margin: .25em 0 }
.vtp .faint { opacity: .66; font-size: .9em }
.vtp-head { min-height: 12.5em }
.vtp .answer { font-size: 1.35em; font-weight: 600; overflow-wrap: anywhere; min-height: 1.5em }
.vtp .same { color: #0a7d33 } .vtp .other { color: #b3261e } .vtp .error { color: #b3261e }
.vtp table { width: 100%; border-collapse: collapse; font-size: .92em }
.vtp table, .vtp tr, .vtp td { border: 0 !important } .vtp td { padding: 1px 4px !important }
.vtp td + td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.vtp .key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 .7em; border: 1px solid #8888 }
.vtp .cannot td { opacity: .45 } .vtp .methods td + td { text-align: left; white-space: normal }
.vtp .count { font-size: 1.15em; font-weight: 600; font-variant-numeric: tabular-nums }
.vtp-picture img { image-rendering: pixelated }
footer { display: none !important }
"""
_BAR = '<div style="background:#ff8c00;height:6px;border-radius:3px;width:{share:.1f}%"></div>'


def wrapped(inner: str) -> str:
    """A piece under the style of the page."""
    return f'<div class="vtp">{inner}</div>'


def count_html(kept: int, tokens: int, *, about: bool = False, notes: Sequence[str] = ()) -> str:
    """How many tokens a budget leaves, and what became of the picture on its way."""
    if not tokens:
        return wrapped('<p class="faint">show a picture to see how many tokens stay</p>')
    told = "".join(f'<p class="faint">{escape(note)}</p>' for note in notes)
    bar = _BAR.format(share=100 * kept / tokens)
    return wrapped(f'<p class="count">{"about " if about else ""}{kept} of {tokens} visual tokens</p>{bar}{told}')


def unpruned_html(pane: Pane | None) -> str:
    """The answer from all tokens."""
    if pane is None:
        return ""
    if pane.error:
        return wrapped(f'<p class="faint">without pruning</p><p class="error">{escape(pane.error)}</p>')
    cells = table_html(rows_of(pane))
    answer = escape(pane.answer or "") or "(no words)"
    return wrapped(f'<p class="faint">without pruning</p><p class="answer" id="unpruned">{answer}</p>{cells}')


def head_html(pane: Pane | None, place: str) -> str:
    """What a pane is, and its answer."""
    if pane is None:
        return wrapped(f'<h3>{escape(place)}</h3><p class="answer">&nbsp;</p>')
    lines = [f"<h3>{escape(pane.method)}</h3>", f'<p class="faint">{escape(pane.line)}<br>{escape(pane.paper)}</p>']
    if pane.error:
        lines.append(f'<p class="error">{escape(pane.error)}</p>')
    elif pane.answer is not None:
        tones = {True: ("same", "as unpruned"), False: ("other", "not as unpruned"), None: ("", "")}
        tone, told = tones[pane.same]
        answer = escape(pane.answer) or "(no words)"
        lines.append(f'<p class="answer {tone}" id="answer-{place}">{answer}</p><p class="faint {tone}">{told}</p>')
    return wrapped("".join(lines))


def numbers_html(pane: Pane | None, view: str) -> str:
    """The numbers of a pane, what its colours mean, and why the picture asked for is not there."""
    if pane is None or pane.error:
        return ""
    lines = []
    if view == "stages" and pane.colours:
        lines.append(f"<p>{keys_html(pane)}</p>")
    if view not in pane.pictures and view in pane.missing:
        lines.append(f'<p class="faint">{escape(pane.missing[view])}</p>')
    lines.append(table_html(rows_of(pane)))
    lines += [f'<p class="faint">{escape(note)}</p>' for note in pane.notes]
    return wrapped("".join(lines))


def overlaps_html(outcome: Outcome, turn: int = 0) -> str:
    """How much the choices overlap, and what is to be known of the outcome; scripts may read which answer it is of."""
    shares = [(names, f"{100 * share:.0f} %") for names, share in overlaps_of(outcome)]
    notes = "".join(f'<p class="faint">{escape(note)}</p>' for note in outcome.notes)
    told = "overlap of the choices: patches that both keep, of those that either keeps (IoU)"
    return wrapped(
        f'{notes}<p class="faint">{told}</p><div id="overlaps" data-turn="{turn}">{table_html(shares)}</div>'
    )


def methods_html(choices: Sequence[Choice]) -> str:
    """Every method in a line with its paper; grey with the reason those that cannot be asked."""
    rows = "".join(
        f'<tr class="{"cannot" if one.reason else "can"}"><td><b>{escape(one.name)}</b></td><td>{escape(one.line)} '
        f"{escape(one.paper)}{f'<br><i>not here: {escape(one.reason)}</i>' if one.reason else ''}</td></tr>"
        for one in choices
    )
    return wrapped(f'<table class="methods">{rows}</table>')
