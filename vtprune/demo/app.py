"""The page in gradio: on this machine only, and without a request to any other."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from vtprune.demo import page
from vtprune.demo.app_parts import sentence_of
from vtprune.demo.app_tab import Tab
from vtprune.demo.hosting import Answering
from vtprune.demo.media import MAX_FILE

ADDRESS = "127.0.0.1"
AT_ONCE = 8
"""Visitors whose pictures are read or drawn at once; a model answers one of them after the other."""
_VISITORS = 200
"""What they did is remembered; of more the one who was longest away is forgotten."""
_STALE = 3600
"""Seconds that uploads stay on the disk."""


def serve(hosts: Sequence[tuple[str, Answering]], *, port: int | None = None) -> tuple[str, gr.Blocks]:
    """Serve a page with a tab for each host, on this machine only; gives its address, and the page, to be closed.

    Args:
        hosts: titles of tabs, and what they ask.
        port: None takes the first free one from 7860 on.

    Raises:
        OSError: where the port is taken.
    """
    blocks = build(hosts)
    _, address, _ = blocks.queue(default_concurrency_limit=AT_ONCE).launch(
        server_name=ADDRESS,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        ssr_mode=False,
        max_file_size=MAX_FILE,
        state_session_capacity=_VISITORS,
        footer_links=[],
        prevent_thread_lock=True,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=page.STYLE,
    )
    return address, blocks


def build(hosts: Sequence[tuple[str, Answering]]) -> gr.Blocks:
    """The page, not served yet."""
    stale = (_STALE, _STALE)
    with gr.Blocks(title="vtprune: which patches are kept", analytics_enabled=False, delete_cache=stale) as blocks:
        gr.Markdown("# Which patches are kept, and does the answer change?")
        with gr.Tabs():
            for number, (title, host) in enumerate(hosts):
                with gr.Tab(title) as part:
                    try:
                        tab = Tab(host)
                    except Exception as error:  # a tower may hold anything; the other tabs go on
                        gr.HTML(page.cannot_html(sentence_of(error)))
                    else:
                        # What is sent to a tab before it was looked at is lost in part.
                        tab.lay_out(part.select if number else blocks.load)
    return blocks
