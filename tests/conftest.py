"""What all tests share."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: torch must not start a thread a core in each
    os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts pytest in the background ignores SIGINT for it; the tests of Ctrl-C need Python's own handling.
signal.signal(signal.SIGINT, signal.default_int_handler)
