"""Child processes that do not outlive the one that started them, however it ended."""

from __future__ import annotations

import os
import threading
import time


def end_with_parent() -> None:
    """End this process, within half a second, once the one that started it is gone."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
