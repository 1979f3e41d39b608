"""An outcome as files to keep: a contact sheet, and a page of its own that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from vtprune._version import __version__
from vtprune.demo.panes import TIMES, VIEWS, Outcome, Pane
from vtprune.demo.telling import asked_line, every_pane, keys_html, overlaps_of, rows_of, table_html, token_rows
from vtprune.viz import sheet

__all__ = [
    "asked_line",
    "every_pane",
    "keys_html",
    "overlaps_of",
    "rows_of",
    "table_html",
    "to_dict",
    "to_html",
    "to_png",
]

_CAPTION = 48
"""Characters of a line."""
_STYLE = """
:root { color-scheme: light dark; --ink: #22262e; --faint: #606670; --line: #dee1e6; --ground: #fff;
  --same: #0a7d33; --other: #a8071a }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --faint: #a5abb5; --line: #3a3f48; --ground: #16181c;
  --same: #58c47e; --other: #ff8a80 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1600px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.3em } h2 { font-size: 1.1em; margin: 1.6em 0 .4em } h3 { font-size: 1em; margin: 0 }
p { margin: .3em 0 }
.panes { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1em }
@media (min-width: 1000px) { .panes { grid-template-columns: repeat(var(--count), minmax(0, 1fr)) } }
.faint { color: var(--faint) } .same { color: var(--same) } .other, .error { color: var(--other) }
.answer { font-weight: 600; overflow-wrap: anywhere } .scrolls { overflow-x: auto }
img { width: 100%; height: auto } figure { margin: 0; overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { min-width: 6em }
td, th { padding: 2px 10px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--ground) }
.key { display: inline-block; width: 1em; height: 1em; margin: 0 .3em 0 .7em; vertical-align: -.1em }
"""


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """JSON-ready: what was asked, and of every pane the answer, the report with the indices of kept tokens, or why not.

    Units: tokens, bytes, seconds; overlaps are intersection over union of kept tokens.
    """
    ask = outcome.ask
    asked = {name: getattr(ask, name) for name in ("question", "keep", "seed", "debias", "debiaser")}
    return {
        "vtprune": __version__,
        "model": outcome.model,
        "media": {"name": ask.media.name, "kind": ask.media.kind, "size": list(ask.media.size)},
        **asked,
        "forced_in": list(ask.forced_in),
        "forced_out": list(ask.forced_out),
        "framing": None if outcome.framing is None else list(outcome.framing),
        "notes": list(outcome.notes),
        "overlaps": [{"of": names, "iou": share} for names, share in overlaps_of(outcome)],
        "panes": [_pane_dict(pane) for pane in every_pane(outcome)],
    }


def _pane_dict(pane: Pane) -> dict[str, Any]:
    numbers = pane.numbers
    return {
        "method": pane.method,
        "paper": pane.paper,
        "answer": pane.answer,
        "same": pane.same,
        "agreement": pane.agreement,
        "coverage": None if numbers is None else numbers.coverage,
        "kv_bytes": None if numbers is None else numbers.kv_bytes,
        "seconds": {} if numbers is None else dict(numbers.seconds),
        "notes": list(pane.notes),
        "error": pane.error,
        "report": None if pane.report is None else pane.report.to_dict(),
    }


def to_png(outcome: Outcome) -> bytes:
    """A contact sheet: what was shown, and the kept patches of every pane with its answer; of clips their frames."""
    nothing = Image.new("RGB", outcome.ask.media.size, "lightgrey")
    panels = [
        (_caption(pane), pane.pictures.get("strip") or pane.pictures.get("kept") or nothing)
        for pane in every_pane(outcome)
    ]
    buffer = io.BytesIO()
    columns = 1 if outcome.ask.media.kind == "video" else len(panels)
    lines = [outcome.ask.question or "kept patches", f"{asked_line(outcome)}; vtprune {__version__}"]
    marks = ((outcome.ask.forced_in, "two frames: forced in"), (outcome.ask.forced_out, "cross: forced out"))
    lines += ["; ".join(told for tokens, told in marks if tokens)] if any(tokens for tokens, _ in marks) else []
    sheet(panels, columns=columns, title="\n".join(lines)).save(buffer, "PNG")
    return buffer.getvalue()


def _caption(pane: Pane) -> str:
    if pane.error:
        return "\n".join([pane.title, *textwrap.wrap(pane.error, _CAPTION, max_lines=4, placeholder=" ...")])
    kept = "" if pane.numbers is None else ": ".join(token_rows(pane.numbers)[0])
    return "\n".join(line for line in (pane.title, kept, pane.answer or "") if line)


def to_html(outcome: Outcome) -> str:
    """A page that holds everything: answers, numbers, pictures, and `to_dict` as JSON in the element "data".

    It asks for nothing over the network and runs nothing.
    """
    data = json.dumps(to_dict(outcome)).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    panes = every_pane(outcome)
    overlaps = "".join(
        f"<p>{escape(names)}: {100 * share:.0f} % of the patches that either keeps are kept by both</p>"
        for names, share in overlaps_of(outcome)
    )
    notes = "".join(f'<p class="faint">{escape(note)}</p>' for note in outcome.notes)
    title = escape(outcome.ask.question) or "kept patches"
    views = "\n".join(_view(view, panes) for view in VIEWS)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
<p class="faint">{escape(asked_line(outcome))}; vtprune {__version__}</p>
{notes}
<div class="scrolls">{_summary(panes)}</div>
{overlaps}
<p class="faint">{TIMES[outcome.unpruned is not None]}</p>
{views}
<section><h2>what the methods do</h2>{_grid([_about(pane) for pane in panes])}</section>
<script type="application/json" id="data">{data}</script>
</body>
</html>
"""


def _summary(panes: Sequence[Pane]) -> str:
    """A row for every number, a column for every pane."""
    told = [dict(rows_of(pane)) for pane in panes]
    names: list[str] = []
    for rows in told:
        place = 0
        for name in rows:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    head = "".join(f"<th>{escape(pane.title)}</th>" for pane in panes)
    answers = "".join(f"<td>{_answer(pane)}</td>" for pane in panes)
    answered = any(pane.error or pane.answer is not None for pane in panes)
    first = f"<tr><td>answer</td>{answers}</tr>" if answered else ""
    cells = {name: "".join(f"<td>{escape(rows.get(name, ''))}</td>" for rows in told) for name in names}
    body = "".join(f"<tr><td>{escape(name)}</td>{own}</tr>" for name, own in cells.items())
    return f"<table><tr><th></th>{head}</tr>{first}{body}</table>"


def _answer(pane: Pane) -> str:
    if pane.error:
        return f'<span class="error">{escape(pane.error)}</span>'
    if pane.answer is None:
        return ""
    tone, told = {True: ("same", "same as all tokens"), False: ("other", "another answer"), None: ("", "")}[pane.same]
    said = escape(pane.answer) or "(no words)"
    return f'<span class="answer {tone}">{said}</span>' + (f'<br><span class="{tone}">{told}</span>' if told else "")


def _view(view: str, panes: Sequence[Pane]) -> str:
    """Pictures of all panes beside each other; nothing where no pane has one, and none says why."""
    if not any(view in pane.pictures for pane in panes):
        reasons = dict.fromkeys(pane.missing[view] for pane in panes if view in pane.missing)
        told = escape("; ".join(reasons))
        return f'<p class="faint">{escape(VIEWS[view])}: {told}</p>' if told else ""
    return f"<section><h2>{escape(VIEWS[view])}</h2>{_grid([_figure(pane, view) for pane in panes])}</section>"


def _grid(cells: Sequence[str]) -> str:
    return f'<div class="panes" style="--count: {len(cells)}">{"".join(cells)}</div>'


def _figure(pane: Pane, view: str) -> str:
    title = f"<b>{escape(pane.title)}</b>"
    if view not in pane.pictures:
        why = escape(pane.missing.get(view, ""))
        return f'<figure><figcaption>{title}<br><span class="faint">{why}</span></figcaption></figure>'
    alt = escape(f"{pane.title}: {VIEWS[view]}")
    image = f'<img alt="{alt}" src="{_data_uri(pane.pictures[view])}">'
    return f"<figure>{image}<figcaption>{title} {keys_html(pane, view)}</figcaption></figure>"


def _about(pane: Pane) -> str:
    notes = "".join(f'<p class="faint">{escape(note)}</p>' for note in pane.notes)
    return f"<div><h3>{escape(pane.title)}</h3><p>{escape(pane.line)} {escape(pane.paper)}</p>{notes}</div>"


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
