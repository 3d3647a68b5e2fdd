"""Progress bars: tqdm's where it is installed, else a line on stderr."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

Progress = Callable[[int, int], object]


class Line:
    """A line on stderr that is rewritten as it goes on; where that is no terminal, the last one alone."""

    _PAUSE = 0.1

    def __init__(self, total: int, desc: str) -> None:
        self.n = 0
        self._total = total
        self._desc = desc
        # A program without a console has none.
        self._stream: TextIO | None = None if sys.stderr is None or sys.stderr.closed else sys.stderr
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._width = 0
        self._next = 0.0

    def update(self, by: int) -> None:
        """Count bytes that are done, and show them."""
        self.n += by
        now = time.monotonic()
        if self._is_terminal and now >= self._next:
            self._next = now + self._PAUSE
            self._write("\r" + self._text())

    def close(self) -> None:
        """Show how far it came, and end the line."""
        self._write(("\r" if self._is_terminal else "") + self._text() + "\n")

    def _text(self) -> str:
        share = self.n * 100 // self._total if self._total else 100
        text = f"{self._desc}: {share}%, {_size(self.n)} of {_size(self._total)}"
        # What was longer before is written over.
        self._width = max(self._width, len(text))
        return text.ljust(self._width) if self._is_terminal else text

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # It was closed: no reason to stop what this only shows.
            self._stream = None


def _size(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    size, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"


class Bar:
    """A progress bar of bytes, shown from the first call on until everything is done."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                self._bar = Line(total, self._what)
            else:
                self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=self._what)
        # Pieces may be told of out of order.
        self._bar.update(max(0, done - self._bar.n))
        if done >= total:
            self.close()

    def close(self) -> None:
        """Leave it as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Told:
    """Calls what is to be told of progress, and lets its errors through; a bar's own stop only the bar."""

    def __init__(self, progress: Progress | bool | None, what: str) -> None:
        self._bar = Bar(what) if progress is True else None
        self._progress = self._bar if isinstance(progress, bool) else progress

    def __bool__(self) -> bool:
        return self._progress is not None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            return
        try:
            self._progress(done, total)
        except Exception as error:
            if self._bar is None:
                raise
            # Its stream was closed, say: no reason to stop what it only shows.
            self._progress = None
            print(f"maptensors: the progress bar failed: {error!r}", file=sys.stderr)

    def close(self) -> None:
        """Leave a bar as it is."""
        if self._bar is not None:
            self._bar.close()
