"""Pieces of the page in HTML; whatever came from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from vtprune.catalog import describe
from vtprune.demo.asking import Wish
from vtprune.demo.choices import Choice
from vtprune.demo.panes import TIMES, VIEWS, Outcome, Pane
from vtprune.demo.telling import asked_line, keys_html, overlaps_of, rows_of, table_html, token_rows
from vtprune.types import Modality

STYLE = """
.vtp { font-size: 15px; line-height: 1.45; --good: #0a7d33; --bad: #b3261e }
.dark .vtp { --good: #4ade80; --bad: #f87171 }
.vtp h3 { margin: 0; font-size: 1.1em } .vtp p { margin: .25em 0 }
.vtp .faint { color: color-mix(in srgb, currentColor 70%, transparent); font-size: .9em }
.vtp .same { color: var(--good) } .vtp .other, .vtp .error { color: var(--bad) }
.vtp .answer { font-size: 1.25em; font-weight: 600; overflow-wrap: anywhere; min-height: 1.5em }
.vtp-answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: .5em }
.vtp-answers > div { border: 1px solid #8885; border-radius: 8px; padding: .4em .6em }
.vtp-told { border-left: 4px solid #d97706; background: #d9770618; padding: .4em .8em; border-radius: 4px }
.vtp-told.trouble { border-color: var(--bad); background: #b3261e18 }
.vtp-scroll { overflow-x: auto } .vtp-head { min-height: 4.6em }
.vtp table { width: 100%; border-collapse: collapse; font-size: .92em }
.vtp table, .vtp tr, .vtp td, .vtp th { border: 0 !important } .vtp td, .vtp th { padding: 2px 6px !important }
.vtp .numbers tr + tr { border-top: 1px solid #8883 !important }
.vtp .numbers td + td, .vtp th + th { text-align: right; font-variant-numeric: tabular-nums }
.vtp .key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 .7em; border: 1px solid #8888 }
.vtp .cannot td { color: #8889 } .vtp .methods td + td { text-align: left; white-space: normal }
.vtp .count { font-size: 1.15em; font-weight: 600; font-variant-numeric: tabular-nums }
.vtp-board img { image-rendering: pixelated; max-height: 380px; width: auto !important; margin: 0 auto }
.vtp-board img { cursor: crosshair }
.vtp-keep input[type=number] { display: none }
footer { display: none !important }
"""
_BAR = '<div style="background:#ff8c00;height:6px;border-radius:3px;width:{share:.1f}%"></div>'
_TOY = (
    "a small model trained on drawn scenes of coloured shapes, digits and textures: of anything else its answers mean "
    "nothing. Name a model of your own with <code>vtprune demo --model</code>, or look at photographs in the other tab."
)


def wrapped(inner: str) -> str:
    """A piece under the style of the page."""
    return f'<div class="vtp">{inner}</div>'


def model_html(name: str, *, asks: bool) -> str:
    """Which model the tab is about."""
    about = _TOY if asks and name.startswith("tiny:") else ""
    return wrapped(f"<p><b>{escape(name)}</b>{', ' if about else ''}{about}</p>")


def cannot_html(why: str) -> str:
    """A tab that cannot be shown, and what to do about it."""
    told = (
        "What is installed is seen when the demo is started again. Without any more, patches of pictures are shown by "
        "<code>vtprune demo --tower tiny:llava</code>."
    )
    return wrapped(f'<h3>This cannot be shown here.</h3><p class="vtp-told">{escape(why)}</p><p>{told}</p>')


def message_html(text: str) -> str:
    """What went wrong; nothing without a text."""
    return wrapped(f'<p class="vtp-told trouble" role="alert">{escape(text)}</p>') if text else ""


def count_html(kept: int, tokens: int, *, about: bool = False, notes: Sequence[str] = ()) -> str:
    """How many tokens a budget leaves, and what became of the picture on its way."""
    if not tokens:
        return wrapped('<p class="faint">show a picture to see how many tokens stay</p>')
    told = "".join(f'<p class="faint">{escape(note)}</p>' for note in notes)
    bar = _BAR.format(share=100 * kept / tokens)
    return wrapped(f'<p class="count">{"about " if about else ""}{kept} of {tokens} visual tokens</p>{bar}{told}')


def answers_html(
    panes: Mapping[str, Pane], media: str, turn: int, right: str | None = None, *, whole: Outcome | None = None
) -> str:
    """The answers beside each other, as far as there are any; scripts may read what they are about."""
    asks = "unpruned" in panes
    cells = "".join(_answer(place, pane, right) for place, pane in panes.items()) if asks else ""
    told = ""
    if asks and right is not None:
        told += f'<p class="faint">the right answer: <b>{escape(right)}</b></p>'
    if whole is not None and (notes := [note for note in whole.notes if note not in whole.ask.media.notes]):
        told += f'<p class="vtp-told">{"<br>".join(map(escape, notes))}</p>'
    about = f'class="vtp-shown" data-media="{escape(media)}" data-turn="{turn}"'
    return wrapped(f'<div {about}>{told}<div class="vtp-answers">{cells}</div></div>')


def _answer(place: str, pane: Pane, right: str | None) -> str:
    title = f'<p class="faint">{escape(pane.title)}</p>'
    if pane.error:
        return f'<div>{title}<p class="error">{escape(pane.error)}</p></div>'
    tone, told = {True: ("same", "as unpruned"), False: ("other", "not as unpruned"), None: ("", "")}[pane.same]
    if right is not None:
        told = f"{'right' if pane.answer == right else 'wrong'}{', ' if told else ''}{told}"
    id = place if place == "unpruned" else f"answer-{place}"
    answer = escape(pane.answer or "") or "(no words)"
    return f'<div>{title}<p class="answer {tone}" id="{id}">{answer}</p><p class="faint">{told}</p></div>'


def asked_html(outcome: Outcome, wish: Wish | None) -> str:
    """What the panes are the answers to, and whether the fields now say something else."""
    ask = outcome.ask
    told = f"“{ask.question}”, {asked_line(ask)}" if ask.question else asked_line(ask)
    now = None if wish is None else (wish.question.strip(), wish.first, wish.second, wish.keep, wish.seed, wish.debias)
    changed = now not in (None, (ask.question, *ask.methods, ask.keep, ask.seed, ask.debias))
    hint = '<p class="vtp-told">what is asked was changed: press Compare</p>' if changed else ""
    return wrapped(f'<p class="faint">shown below: {escape(told)}</p>{hint}')


def head_html(pane: Pane | None, place: str) -> str:
    """What a pane is."""
    if pane is None:
        return wrapped("<h3>&nbsp;</h3>")
    kept = "" if pane.numbers is None else f"<p>{token_rows(pane.numbers)[0][1]} visual tokens</p>"
    about = f'<p class="faint" title="{escape(pane.paper)}">{escape(pane.line)}</p>'
    error = f'<p class="error">{escape(pane.error)}</p>' if pane.error else ""
    return wrapped(f"<h3>{escape(pane.title)}</h3>{kept}{about}{error}")


def legend_html(pane: Pane | None, view: str) -> str:
    """What the colours mean, why the picture asked for is not there, and what else is to be known."""
    if pane is None or pane.error:
        return ""
    lines = [f"<p>{keys}</p>"] if (keys := keys_html(pane, view)) else []
    lines += [f'<p class="vtp-told">{escape(pane.missing[view])}</p>'] if view in pane.missing else []
    return wrapped("".join(lines + [f'<p class="faint">{escape(note)}</p>' for note in pane.notes]))


def numbers_html(panes: Mapping[str, Pane], outcome: Outcome | None, turn: int) -> str:
    """The numbers of all panes, a row each, and how much their choices overlap once all are there."""
    if not panes:
        return ""
    columns = [(pane.title, dict(rows_of(pane))) for pane in panes.values()]
    names = dict.fromkeys(name for _, rows in sorted(columns, key=lambda column: -len(column[1])) for name in rows)
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in columns)
    body = "".join(_row(name, [rows.get(name, "") for _, rows in columns]) for name in names)
    table = f'<div class="vtp-scroll"><table class="numbers"><tr><th></th>{head}</tr>{body}</table></div>'
    if outcome is None:
        return wrapped(table)
    told = "overlap of the choices: patches that both keep, of those that either keeps (IoU)"
    shares = table_html([(names, f"{100 * share:.0f} %") for names, share in overlaps_of(outcome)])
    overlaps = f'<p class="faint">{told}</p><div id="overlaps" data-turn="{turn}">{shares}</div>'
    return wrapped(f'{table}<p class="faint">{TIMES[outcome.unpruned is not None]}</p>{overlaps}')


def _row(name: str, values: Sequence[str]) -> str:
    return f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"


def views(kind: Modality) -> list[tuple[str, str]]:
    """What can be shown of a picture or clip, with the names of the views."""
    return [(text, name) for name, text in VIEWS.items() if kind == "video" or name != "strip"]


def labels(choices: Sequence[Choice]) -> list[tuple[str, str]]:
    """The methods that can be asked, with where tokens leave, and their names."""
    return [(f"{one.name} ({describe(one.name).where})", one.name) for one in choices if not one.reason]


def methods_html(choices: Sequence[Choice]) -> str:
    """Every method in a line with its paper; grey with the reason those that cannot be asked."""
    rows = "".join(
        f'<tr class="{"cannot" if one.reason else "can"}"><td><b>{escape(one.name)}</b></td><td>{escape(one.line)} '
        f"{escape(one.paper)}{f'<br><i>not here: {escape(one.reason)}</i>' if one.reason else ''}</td></tr>"
        for one in choices
    )
    return wrapped(f'<table class="methods">{rows}</table>')
