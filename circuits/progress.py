"""One progress bar for every long loop."""

from circuits._progress import progress_bar

__all__ = ["progress_bar"]
