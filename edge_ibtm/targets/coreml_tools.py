"""coremltools 9.0, imported quietly and with one of its passes mended."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_coremltools() -> Iterator[Any]:
    """coremltools without progress bars and without its notes on missing macOS libraries and untested versions."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import coremltools as ct

        try:
            with _linear_bias_of_one():
                yield ct
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _linear_bias_of_one() -> Iterator[None]:
    """Let `fuse_linear_bias` pass over a scalar added to a linear layer of one output: it fails with IndexError there."""
    import numpy as np
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    fusion: Any = type(PASS_REGISTRY["common::fuse_linear_bias"])
    original = fusion._try_to_transform

    def mended(linear: Any, addition: Any, block: Any) -> bool:
        scalar = any(v.val is not None and np.ndim(v.val) == 0 for v in (addition.x, addition.y))
        return False if scalar else original(linear, addition, block)

    fusion._try_to_transform = staticmethod(mended)
    try:
        yield
    finally:
        fusion._try_to_transform = staticmethod(original)
