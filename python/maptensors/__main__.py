"""``python -m maptensors`` and the ``maptensors`` command."""

import signal
import sys

from maptensors import _native


def main() -> int:
    """Run the command line; return its exit code."""
    # The work is done outside Python, which would look at Ctrl-C only afterwards. A job in a shell's
    # background ignores it, and goes on doing so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _native.cli(["maptensors", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
