"""A progress bar for many texts, where tqdm is installed.

Knows tqdm, which is optional. Does not know what is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Advance = Callable[[int], object]
Progress = bool | Advance


@contextmanager
def reporting(progress: Progress, total: int) -> Iterator[Advance]:
    """What to call with the number of texts just answered: a bar's, the caller's own function, or nothing's."""
    if callable(progress):
        yield progress
        return
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            logger.warning("progress=True shows nothing: tqdm is not installed")
        else:
            with tqdm(total=total, unit="text") as bar:
                yield bar.update
            return
    yield lambda count: None
