"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitinfer.errors import UsageError
from splitinfer.generation import StopStrings

ALPHABET = st.text("abn\n", max_size=12)


def expected(text: str, stops: list[str]) -> str:
    return text[: min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=len(text))]


@given(st.lists(ALPHABET), st.lists(st.text("abn\n", min_size=1, max_size=4), max_size=3))
def test_pieces_show_what_the_whole_text_would(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    shown = "".join(finder.feed(piece) for piece in pieces)
    if not finder.found:
        shown += finder.flush()
    text = "".join(pieces)
    # An overlap of two stop strings may be found by the one that completes first.
    assert text.startswith(shown)
    assert finder.found == any(stop in text for stop in stops)
    if len(stops) <= 1:
        assert shown == expected(text, stops)


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["\n\n"])
    assert finder.feed("a\n") == "a"
    assert finder.feed("b\n") == "\nb"
    assert finder.feed("\nc") == ""
    assert finder.found
    assert finder.feed("d") == ""


@pytest.mark.parametrize("stops", ["\n\n", [""], [3]])
def test_stop_is_a_list_of_strings(stops: object) -> None:
    with pytest.raises(UsageError, match="list of non-empty strings"):
        StopStrings(stops)  # type: ignore[arg-type]
