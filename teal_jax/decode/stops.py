"""Stop strings, found in text that comes in pieces."""

from collections.abc import Sequence


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings of an argument; raises `ValueError` for an empty one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop strings must be non-empty text, got {stops!r}")
    return stops


class StopMatcher:
    """Text with everything from the first stop string on cut off, wherever the pieces break.

    Of several stop strings the one that is complete first counts, as if the text came letter by letter.

    Attributes:
      found: a stop string has come; later text is dropped.
    """

    def __init__(self, stops: Sequence[str]):
        self.found = False
        self._stops = tuple(stops)
        self._held = ""  # may be the start of a stop string

    def push(self, text: str) -> str:
        """What can be shown after `text` came."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest start of `stop` (not all of it) that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
