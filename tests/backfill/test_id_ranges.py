"""Whole numbers as ids: both ends of each type's range, and the first numbers beyond them."""

from __future__ import annotations

import pytest

from heimdex_clip_worker.backfill.postgres import _fits
from heimdex_clip_worker.backfill.rows import read_row

ENDS = {
    "smallint": (-32_768, 32_767),
    "integer": (-2_147_483_648, 2_147_483_647),
    "bigint": (-9_223_372_036_854_775_808, 9_223_372_036_854_775_807),
}


@pytest.mark.parametrize("as_text", [int, str], ids=["number", "text"])
@pytest.mark.parametrize("id_type", ENDS)
def test_an_id_fits_up_to_both_ends_of_its_column(id_type: str, as_text: type) -> None:
    low, high = ENDS[id_type]
    fits = [_fits(as_text(value), id_type) for value in (low - 1, low, 0, high, high + 1)]
    assert fits == [False, True, True, True, False]


@pytest.mark.parametrize("text", ["", "-", "+", "1.0", "1e3", "0x1", "1_000", "1" * 20, "x", "٣"])
def test_a_text_that_is_no_whole_number_fits_no_whole_column(text: str) -> None:
    assert [_fits(text, id_type) for id_type in ENDS] == [False] * 3


@pytest.mark.parametrize("text", [" 7", "7 ", "+7", "-7", "007"])
def test_a_text_that_the_server_reads_as_a_number_fits(text: str) -> None:
    assert [_fits(text, id_type) for id_type in ENDS] == [True] * 3


def test_an_id_of_a_file_is_a_number_of_64_bits() -> None:
    low, high = ENDS["bigint"]
    assert [read_row(value, "u").id for value in (low, high)] == [low, high]
    assert [read_row(value, "u").error.code for value in (low - 1, high + 1)] == ["BAD_ROW"] * 2


@pytest.mark.parametrize(("length", "usable"), [(1, True), (1000, True), (1001, False)])
def test_an_id_of_text_has_at_most_1000_characters(length: int, usable: bool) -> None:
    row = read_row("x" * length, "u")
    assert (row.id == "x" * length, row.error is None) == (usable, usable)
