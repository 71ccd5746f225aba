"""From the bytes of tokens to text that can be shown at once: whole characters, and nothing of a stop string.

A token may end inside a character or inside a stop string; what could still become one is held back until it is
known. Cutting the bytes elsewhere never changes the text.
"""

import codecs
from collections.abc import Iterable


class TextStream:
    """The text of one reply, piece by piece.

    The text ends before the stop string that is completed first; of two completed by the same character, before the
    longer one. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Iterable[str] = ()) -> None:
        self._stop = sorted(stop, key=len, reverse=True)
        if "" in self._stop:
            raise ValueError("stop holds an empty string; it would end every reply before it begins")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may become a stop string
        self.decoded = 0  # characters so far, those held back included
        self.stopped = False  # whether a stop string came; there is no more text then

    def push(self, data: bytes, *, last: bool = False) -> str:
        """The text that is certain after these bytes. `last`: no more follow, so nothing is held back."""
        if self.stopped:
            return ""
        fresh = self._decoder.decode(data, final=last)
        self.decoded += len(fresh)
        text = self._held + fresh
        for end in range(len(self._held) + 1, len(text) + 1):
            for stop in self._stop:
                if text.endswith(stop, 0, end):
                    self.stopped, self._held = True, ""
                    return text[: end - len(stop)]
        keep = 0 if last else self._begun(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
