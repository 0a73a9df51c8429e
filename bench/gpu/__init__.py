"""Measures what only a GPU can show: `python -m bench.gpu`."""

import time

BEGUN = time.monotonic()  # before torch is imported, which takes seconds of a part's time
