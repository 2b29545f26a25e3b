"""Ctrl-C, which waits for an operation to end."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def held_interrupts():
    """Lets Ctrl-C wait until the block has ended, and handles it then.

    Only Python's main thread receives signals; in another one this does
    nothing. An error of the block itself comes first.

    Example:

    ```python
    with held_interrupts():
        kernel.assign(...)
        factor.assign(...)
    ```
    """
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    # `None`: a handler that is not Python's, and could not be put back.
    if handler is None or not in_main_thread:
        yield
        return
    received = []
    signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        signal.raise_signal(signal.SIGINT)
