"""A guard for a torchvision that was built for another torch.

Such a torchvision installs without complaint and then dies on import with "operator torchvision::nms does not exist",
and with it every processor of transformers. Image transforms need none of those operators: declaring the missing names
is enough to import it. `nms` and its like stay unusable, as they were.

Nothing here runs when vtprune is imported; `load_tiny` and the command line call `heal` first.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys

logger = logging.getLogger("vtprune")

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_SCHEMAS = {"nms": _NMS, "qnms": _NMS}
_ANY_SCHEMA = "(Tensor input) -> Tensor"


def heal() -> bool:
    """Make `import torchvision` work where only its compiled operators are missing.

    Returns:
        True where something had to be declared; False where torchvision is absent, healthy, or broken in another way
        (then its own error appears at its import, as it would without vtprune).
    """
    if "torchvision" in sys.modules or not torchvision_installed():
        return False
    declared: list[str] = []
    while True:
        try:
            importlib.import_module("torchvision")
            break
        except RuntimeError as error:
            match = _MISSING.search(str(error))
            _drop_half_imported()
            if match is None or match[1] in declared:
                logger.warning("torchvision does not import: %s", error)
                return False
            _declare(match[1])
            declared.append(match[1])
        except (ImportError, OSError) as error:
            _drop_half_imported()
            logger.warning("torchvision does not import: %s", error)
            return False
    if declared:
        names = ", ".join(declared)
        logger.info("torchvision was built for another torch: declared %s, which stay unusable", names)
    return bool(declared)


def torchvision_installed() -> bool:
    """Whether there is any, healthy or not."""
    try:
        return importlib.util.find_spec("torchvision") is not None
    except (ImportError, ValueError):
        return False


def _declare(operator: str) -> None:
    import torch

    torch.library.define(f"torchvision::{operator}", _SCHEMAS.get(operator, _ANY_SCHEMA))


def _drop_half_imported() -> None:
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
