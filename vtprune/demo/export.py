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
from vtprune.demo.panes import PARTS, TIMES, VIEWS, Outcome, Pane
from vtprune.viz import sheet

_CAPTION = 48
"""Characters of a line."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262e; max-width: 1500px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.3em } h2 { font-size: 1.1em; margin: 0 } p { margin: .3em 0 }
.panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1.5em }
.pane { border: 1px solid #dee1e6; border-radius: 8px; padding: 1em }
.answer { font-size: 1.15em; overflow-wrap: anywhere } .faint { color: #606670 } .error { color: #a8071a }
img { max-width: 100%; height: auto } figure { margin: .8em 0 }
table { border-collapse: collapse; width: 100% }
td { padding: 1px 6px; text-align: right } td:first-child { text-align: left }
.key { display: inline-block; width: .9em; height: .9em; border: 1px solid #606670; margin: 0 .3em 0 .8em }
"""


def every_pane(outcome: Outcome) -> tuple[Pane, ...]:
    """The unpruned pane, where there is one, and the others."""
    return (*(() if outcome.unpruned is None else (outcome.unpruned,)), *outcome.panes)


def rows_of(pane: Pane) -> list[tuple[str, str]]:
    """The numbers of a pane for people: what, and how much."""
    numbers = pane.numbers
    if numbers is None:
        return []
    rows = [("visual tokens kept", f"{numbers.kept} of {numbers.tokens}")]
    if numbers.average != numbers.kept:
        rows.append(("on average over layers", f"{numbers.average:.1f}"))
    if numbers.merged:
        rows.append(("merged into them", str(numbers.merged)))
    if numbers.separators:
        rows.append(("separators, always kept", str(numbers.separators)))
    if numbers.coverage is not None:
        rows.append(("coverage (kept or beside)", f"{100 * numbers.coverage:.0f} %"))
    if numbers.kv_bytes_whole:
        whole = numbers.kv_bytes_whole / 1e6
        rows += [("prompt length", str(numbers.prompt)), ("KV cache", f"{numbers.kv_megabytes:.2f} of {whole:.2f} MB")]
    if pane.agreement is not None:
        words = "same answer" if pane.same else "another answer"
        rows.append(("agreement", f"{words}, {100 * pane.agreement:.0f} % of its tokens"))
    seconds = numbers.seconds
    return rows + [(name, f"{1000 * seconds[part]:.1f} ms") for part, name in PARTS.items() if part in seconds]


def overlaps_of(outcome: Outcome) -> list[tuple[str, float]]:
    """Every pair of methods with how much their choices overlap, as far as both chose."""
    found = []
    for first in range(len(outcome.panes)):
        for second in range(first + 1, len(outcome.panes)):
            share = outcome.overlap(first, second)
            if share is not None:
                found.append((f"{outcome.panes[first].method} and {outcome.panes[second].method}", share))
    return found


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
    sheet(panels, columns=columns, title=outcome.ask.question).save(buffer, "PNG")
    return buffer.getvalue()


def _caption(pane: Pane) -> str:
    if pane.error:
        return "\n".join([pane.title, *textwrap.wrap(pane.error, _CAPTION, max_lines=4, placeholder=" ...")])
    kept = "" if pane.numbers is None else f"{pane.numbers.kept} of {pane.numbers.tokens} tokens"
    return "\n".join(line for line in (pane.title, kept, pane.answer or "") if line)


def to_html(outcome: Outcome) -> str:
    """A page that holds everything: answers, numbers, pictures, and `to_dict` as JSON in the element "data".

    It asks for nothing over the network and runs nothing.
    """
    data = json.dumps(to_dict(outcome)).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    panes = "\n".join(_section(pane) for pane in every_pane(outcome))
    overlaps = "".join(
        f"<p>{escape(names)}: {100 * share:.0f} % of the patches that either keeps are kept by both</p>"
        for names, share in overlaps_of(outcome)
    )
    notes = "".join(f'<p class="faint">{escape(note)}</p>' for note in outcome.notes)
    question = escape(outcome.ask.question)
    asked = f"{escape(outcome.model)}, keep {outcome.ask.keep}, seed {outcome.ask.seed}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{question or "kept patches"}</title><style>{_STYLE}</style></head>
<body>
<h1>{question or "kept patches"}</h1>
<p class="faint">{asked}; vtprune {__version__}</p>
{notes}
{overlaps}
<div class="panes">
{panes}
</div>
<p class="faint">{TIMES[outcome.unpruned is not None]}</p>
<script type="application/json" id="data">{data}</script>
</body>
</html>
"""


def _section(pane: Pane) -> str:
    lines = [f"<h2>{escape(pane.title)}</h2>", f'<p class="faint">{escape(pane.line)} {escape(pane.paper)}</p>']
    if pane.error:
        lines.append(f'<p class="error">{escape(pane.error)}</p>')
    if pane.answer is not None:
        lines.append(f'<p class="answer">{escape(pane.answer) or "(no words)"}</p>')
    lines += [f'<p class="faint">{escape(note)}</p>' for note in pane.notes]
    lines.append(table_html(rows_of(pane)))
    lines += [_figure(caption, pane, view) for view, caption in VIEWS.items() if view in pane.pictures]
    lines += [
        f'<p class="faint">{escape(VIEWS[view])}: {escape(why)}</p>'
        for view, why in pane.missing.items()
        if view in VIEWS
    ]
    return '<section class="pane">\n{}\n</section>'.format("\n".join(lines))


def _figure(caption: str, pane: Pane, view: str) -> str:
    keys = keys_html(pane) if view == "stages" else ""
    alt = escape(f"{pane.title}: {caption}")
    image = f'<img alt="{alt}" src="{_data_uri(pane.pictures[view])}">'
    return f"<figure>{image}<figcaption>{escape(caption)}{keys}</figcaption></figure>"


def table_html(rows: Sequence[tuple[str, str]]) -> str:
    """What, and how much; nothing without a row."""
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>" if cells else ""


def keys_html(pane: Pane) -> str:
    """Picks with the colours that they have in "stages"."""
    return "".join(
        f'<span class="key" style="background: rgb{colour}"></span>{escape(name)}' for name, colour in pane.colours
    )


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
