"""Weights of words, against given results."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.weighted_text import pieces, plain

CASES = json.loads((Path(__file__).parents[1] / "golden" / "prompt_weights.json").read_text("utf-8"))["cases"]


@pytest.mark.parametrize("case", CASES, ids=[case["text"] for case in CASES])
def test_weights_are_the_given_ones(case: dict):
    found = pieces(case["text"])
    if isinstance(case["result"], dict):  # no number after all: letters, where other programs stop
        assert [list(piece) for piece in found] == [["a:2.0.1", 1.1]]
        return
    assert [piece.text for piece in found] == [text for text, _ in case["result"]]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in case["result"]], abs=1e-9)


@given(st.text(alphabet="ab ,()[]\\:1.5-"))
def test_any_text_has_weights(text: str):
    found = pieces(text)
    assert found
    assert all(piece.weight == piece.weight for piece in found)
    assert all(one.weight != other.weight for one, other in pairwise(found))


@given(st.text(alphabet="ab ,()[]\\:1.5"))
def test_with_backslashes_a_text_stays_what_it_is(text: str):
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert plain(escaped) == text
    assert {piece.weight for piece in pieces(escaped)} == {1.0}
