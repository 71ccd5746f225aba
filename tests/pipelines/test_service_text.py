"""Text of a stream: the same whatever the borders of its pieces, and never half a character."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.service.text import TextStream

CHARACTERS = st.text(alphabet="ab.é€😀", max_size=30)
STOPS = st.lists(st.text(alphabet="ab.é€😀", min_size=1, max_size=4), max_size=4)


def pieces_of(data: bytes, borders: list[int]) -> list[bytes]:
    cuts = sorted({0, len(data), *(border % (len(data) + 1) for border in borders)})
    return [data[a:b] for a, b in itertools.pairwise(cuts)] or [b""]


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: at the first character that completes a stop string, before the longest that it completes."""
    for end in range(len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


@given(CHARACTERS, STOPS, st.lists(st.integers(0, 200)))
def test_borders_do_not_change_the_text(text: str, stops: list[str], borders: list[int]) -> None:
    stream = TextStream(stops)
    parts = pieces_of(text.encode(), borders)
    said = [stream.push(part, last=number == len(parts) - 1) for number, part in enumerate(parts)]
    assert ("".join(said), stream.stopped) == cut(text, stops)


@given(st.binary(max_size=40), st.lists(st.integers(0, 200)))
def test_any_bytes_become_what_decoding_them_whole_gives(data: bytes, borders: list[int]) -> None:
    stream = TextStream()
    parts = pieces_of(data, borders)
    said = [stream.push(part, last=number == len(parts) - 1) for number, part in enumerate(parts)]
    assert "".join(said) == data.decode("utf-8", errors="replace")


@given(CHARACTERS, STOPS)
def test_what_was_said_is_never_taken_back(text: str, stops: list[str]) -> None:
    final, _ = cut(text, stops)
    stream, said = TextStream(stops), ""
    for byte in text.encode():
        said += stream.push(bytes([byte]))
        assert final.startswith(said)
        assert "\N{REPLACEMENT CHARACTER}" not in said


def test_nothing_is_held_back_without_need() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"wor") == "wor"
    assert stream.push(b"d E") == "d "
    assert stream.push(b"x") == "Ex"
    assert stream.push("€".encode()[:2]) == ""
    assert stream.push("€".encode()[2:]) == "€"


@pytest.mark.parametrize(
    ("stops", "pieces", "said"),
    [
        (["STOP"], ["a", "S", "TO", "P", "b"], ["a", "", "", "", ""]),  # over three tokens
        (["STOP"], ["a", "ST", "OR", "E"], ["a", "", "STOR", "E"]),  # it was none
        (["abcd", "bc"], ["xab", "c", "d"], ["x", "a", ""]),  # ends inside what another has begun
        (["abcd", "ab"], ["ab", "cd"], ["", ""]),  # the one completed first, not the longest
        (["aab"], ["aa", "a", "ab"], ["", "a", "a"]),  # overlaps itself
        (["aba", "bab"], ["ab", "ab"], ["", ""]),  # one overlaps the other
        (["bb", "abb"], ["ab", "b"], ["", ""]),  # two at once: the longer one goes
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
    ],
)
def test_stops_across_tokens(stops: list[str], pieces: list[str], said: list[str]) -> None:
    stream = TextStream(stops)
    assert [stream.push(piece.encode()) for piece in pieces] == said


def test_a_character_of_four_bytes_comes_whole_and_may_be_a_stop() -> None:
    smile = "\N{GRINNING FACE}"
    for stops, text in (([], f"a{smile}b"), ([smile], "a"), (["\N{WINKING FACE}"], f"a{smile}b")):
        stream = TextStream(stops)
        said = [stream.push(bytes([byte])) for byte in f"a{smile}b".encode()]
        assert said[:4] == ["a", "", "", ""]
        assert "".join(said) == text


def test_what_is_held_at_the_end_is_said() -> None:
    stream = TextStream(["STOP"])
    assert stream.push(b"a STO") == "a "
    assert stream.push(b"", last=True) == "STO"
    stream = TextStream()
    assert stream.push("é".encode()[:1], last=True) == "\N{REPLACEMENT CHARACTER}"


def test_after_a_stop_there_is_silence() -> None:
    stream = TextStream(["."])
    assert stream.push(b"a.b") == "a"
    assert stream.push(b"c", last=True) == ""


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty string"):
        TextStream([""])
