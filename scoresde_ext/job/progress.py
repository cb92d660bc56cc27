"""How far a job is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds between two plain lines


class Progress:
    """Shown by the first worker, over all of them."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.before, self.shown = total, done, shown
        self.start = self.last = time.monotonic()
        self.told = 0
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit=" samples", dynamic_ncols=True)

    def say(self, message: str) -> None:
        if self.bar is not None:
            self.bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def show(self, samples: int, evaluations: int, last: bool = False) -> None:
        """``samples`` were done in this run, with ``evaluations``."""
        now = time.monotonic()
        done = min(self.before + samples, self.total)  # what a lost worker had begun was done twice
        each = f"{evaluations / samples:.1f} evaluations a sample" if samples else ""
        if self.bar is not None:
            self.bar.set_postfix_str(each, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.shown and samples > self.told and (last or now - self.last >= EVERY):
            self.last, self.told = now, samples
            rate = samples / (now - self.start)
            left = tqdm.format_interval((self.total - done) / rate)
            self.say(f"{done} of {self.total} samples, {rate:.1f} samples/s, {each}, {left} left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
