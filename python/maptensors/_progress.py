"""Progress bars, where tqdm is installed."""

import sys
from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int], object]


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
                return
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
