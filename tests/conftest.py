"""What all tests share."""

import signal

# A shell that starts pytest in the background ignores SIGINT for it; the tests of Ctrl-C need Python's own handling.
signal.signal(signal.SIGINT, signal.default_int_handler)
