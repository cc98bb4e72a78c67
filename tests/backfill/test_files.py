"""Files of rows, as programs write them and broken: a row is right, an error, or ends the run."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from heimdex_clip_worker.backfill.files import FileSource
from heimdex_clip_worker.backfill.rows import BackfillError, Row, UsageError

pytestmark: list[pytest.MarkDecorator] = []
HEAD = "id\tcaption\timage_url\n"


def read(path: Path, data: bytes | str, **columns: str) -> list[Row]:
    """Write a file and read its rows."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return [row for page in FileSource(path, **columns).pages(3) for row in page]


def good(rows: list[Row]) -> dict[Any, str]:
    """Collect the rows without an error: id -> URL."""
    return {row.id: row.source for row in rows if not row.error}


def codes(rows: list[Row]) -> list[str | None]:
    return [row.error.code if row.error else None for row in rows]


def errors(rows: list[Row]) -> list[str]:
    return [row.error.error for row in rows if row.error]


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    return tmp_path / "rows.tsv"


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


def test_a_quote_in_a_tsv_is_an_ordinary_character(tsv: Path) -> None:
    captions = ["a cat", '"Hello', 'world"', '"', 'a "b" c', '""', '"never closed']
    lines = [f"{n}\t{text}\tu{n}" for n, text in enumerate(captions)]
    rows = read(tsv, HEAD + "\n".join(lines))
    assert good(rows) == {f"{n}": f"u{n}" for n in range(7)} and len(rows) == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (r"a\tb", "a\tb"), (r"a\nb", "a\nb"), (r"a\rb", "a\rb"), (r"a\\b", "a\\b"),
        (r"a\bb", "a\bb"), (r"a\fb", "a\fb"), (r"a\vb", "a\vb"), (r"\101\x42\x4a", "ABJ"),
        (r"\303\251\xc3\xa9", "éé"), ("a\\\nb", "a\nb"), ("a\\\tb", "a\tb"), (r"\\N", r"\N"),
        (r"a\Nb", "aNb"), (r"\q\"\xg\8", 'q"xg8'), (r"\\.", r"\."), (r"\\tx", r"\tx"),
        ("\\é", "é"), ('"a"', '"a"'), (" a ", " a "), (r"\1011", "A1"), (r"\x4142", "A42"),
    ],
)  # fmt: skip
def test_copy_text_is_unescaped_as_postgresql_does(tsv: Path, field: str, value: str) -> None:
    rows = read(tsv, f"{HEAD}{field}\tx\tu1\n2\tx\tp/{field}\n")
    assert good(rows) == {value: "u1", "2": "p/" + value.replace("\\N", "\\N")}


def test_a_null_of_copy_text_is_no_id_and_no_url(tsv: Path) -> None:
    rows = read(tsv, HEAD + "\\N\tx\tu\n1\t\\N\tu1\n2\t\\N\t\\N\n3\tx\t\n")
    assert codes(rows) == ["MISSING_ID", None, "MISSING_URL", "MISSING_URL"]


@pytest.mark.parametrize(
    "line",
    ["2\tx", "2\tx\tu2\tmore", "2", "2\tx\\\tu2", "2\tx\\\ny", r"2\0" + "\tx\tu", "2\\377\tx\tu"],
)
def test_a_wrong_line_of_a_tsv_costs_itself_and_is_named(tsv: Path, line: str) -> None:
    rows = read(tsv, f"{HEAD}1\tx\tu1\n{line}\n3\tx\tu3\n")
    assert good(rows) == {"1": "u1", "3": "u3"} and codes(rows) == [None, "BAD_ROW", None]
    if "\\0" not in line and "\\3" not in line:
        assert errors(rows)[0].startswith("lines 3 to 4: " if "\n" in line else "line 3: ")


def test_a_caption_that_ends_in_a_backslash_does_not_swallow_the_next_line(tsv: Path) -> None:
    text = "id\timage_url\tcaption\n1\tu1\tback\\\n2\tu2\tslash\\\\\n3\tu3\tx\\"
    assert good(read(tsv, text)) == {"1": "u1", "2": "u2", "3": "u3"}


def test_the_end_mark_of_copy_ends_the_rows_and_what_follows_is_reported(tsv: Path) -> None:
    assert good(read(tsv, HEAD + "1\tx\tu1\n\\.\n\n")) == {"1": "u1"}
    rows = read(tsv, HEAD + "1\tx\tu1\n\\.\n2\tx\tu2\n3\tx\tu3\n")
    assert good(rows) == {"1": "u1"} and codes(rows) == [None, "BAD_ROW"]
    assert "line 4" in errors(rows)[0]
    rows = read(tsv, HEAD + "1\tx\ta\\.jpg\n")  # PostgreSQL refuses it too
    assert codes(rows) == ["BAD_ROW"] and "line 2" in errors(rows)[0]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_any_line_end_and_a_byte_order_mark(tmp_path: Path, suffix: str, end: str) -> None:
    gap = "\t" if suffix == ".tsv" else ","
    lines = [["id", "image_url"], ["1", "u1"], [], ["2", "u2"]]
    text = "\ufeff" + end.join(gap.join(line) for line in lines)
    for whole in (text, text + end):
        assert good(read(tmp_path / f"a{suffix}", whole)) == {"1": "u1", "2": "u2"}


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_a_huge_line_costs_itself(tmp_path: Path, suffix: str) -> None:
    gap = "\t" if suffix == ".tsv" else ","
    for size in (131_073, 1 << 20, (1 << 20) + 1, 3 << 20):
        lines = [["id", "caption", "image_url"], ["1", "x" * size, "u1"], ["2", "x", "u2"]]
        text = "\n".join(gap.join(line) for line in lines)
        rows = read(tmp_path / f"a{suffix}", text)
        assert good(rows).get("2") == "u2" and len(rows) == 2
        if rows[0].error:
            assert codes(rows)[0] == "BAD_ROW" and "line 2" in errors(rows)[0]


def test_after_a_huge_field_reading_goes_on_with_the_next_row(sheet: Path) -> None:
    trap = "\n9,x,u-wrong\n"
    for size in (140_000, 3 << 20):
        huge = '"' + "x" * size + trap + 'a ""b"", c"'
        rows = read(sheet, f"id,caption,image_url\n1,a,u1\n2,{huge},u2\n3,c,u3\n")
        assert good(rows) == {"1": "u1", "3": "u3"} and codes(rows)[1] == "BAD_ROW"
        assert errors(rows)[0].startswith("lines 3 to 5: ")


QUOTE_FAULTS = {
    "a-quote-never-closed": '2,"never closed,u2\n3,c,u3\n4,d,u4\n',
    "closed-by-the-next-rows-quote": '2,"Hello,u2\n3,"dog",u3\n4,d,u4\n',
    "closed-but-a-field-is-missing": '2,"Hello,u2\n3,cat"\n4,d,u4\n',
    "text-after-a-closing-quote": '2,"Hello" she said,u2\n4,d,u4\n',
    "inner-quotes-not-doubled": '2,"say "hi"",u2\n4,d,u4\n',
    "inner-quotes-over-two-lines": '2,"say "hi\n9,x,u9\n" ok",u2\n4,d,u4\n',
    "a-huge-field-never-closed": '2,"' + "x" * 200_000 + ",u2\n3,c,u3\n",
    "many-lines-never-closed": '2,"x,u2\n' + "3,c,u3\n" * 160_000,
    "a-space-before-the-quote": '2, "two\n9,x,u9\nlines",u2\n',
    "a-quote-inside-a-plain-field": '"2,,u2\n3,", g",u3\n4,d,u4\n',
    "a-quote-at-the-end-of-the-file": '2,b,u2\n3,"',
}


@pytest.mark.parametrize("fault", QUOTE_FAULTS)
def test_a_row_without_a_certain_end_ends_the_run_and_names_its_line(
    sheet: Path, fault: str
) -> None:
    sheet.write_text("id,caption,image_url\n1,a,u1\n" + QUOTE_FAULTS[fault])
    rows: list[Row] = []
    line = 4 if "end-of-the-file" in fault else 3
    with pytest.raises(BackfillError, match=rf"rows\.csv, line {line}: "):
        for page in FileSource(sheet).pages(1):
            rows += page
    assert set(good(rows).items()) <= {("1", "u1"), ("2", "u2")}
    assert ("2" in good(rows)) == (line == 4)


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("id,caption,image_url", "{n},{text},https://x/{n}"),
        ("id,image_url,caption", "{n},https://x/{n},{text}"),
        ("caption,id,image_url", "{text},{n},a/{n}.jpg"),
    ],
    ids=["url-last", "caption-last", "caption-first"],
)
def test_lines_that_could_be_rows_end_the_run(sheet: Path, head: str, row: str) -> None:
    """A caption that begins with a quote and a later one that ends with one: valid CSV."""
    for captions in (["a", '"Hello', 'world"', "b"], ["a", '"Hello', "big", 'world"', "b"]):
        rows = [row.format(n=n, text=text) for n, text in enumerate(captions)]
        with pytest.raises(BackfillError, match=r"rows\.csv, line 3: it may be [23] rows"):
            read(sheet, "\n".join([head, *rows]))
    honest = ["Hello, dear\nBye, dear", "see, https://y/1\nor, not", "a.b,c\nd,e.f"]
    rows = [row.format(n=n, text=f'"{text}"') for n, text in enumerate(honest)]
    assert [*good(read(sheet, "\n".join([head, *rows])))] == ["0", "1", "2"]


def test_csv_with_another_number_of_fields_names_the_line(sheet: Path) -> None:
    lines = ['1,"a\nb",u1', '2,"x",u2,more', "3", '4,5" nail,u4', "5,a, b,u5", "6,x\ry,u6"]
    lines.append('"7",5" x,u7')
    rows = read(sheet, "id,caption,image_url\n" + "\n".join(lines))
    assert good(rows) == {"1": "u1", "4": "u4", "6": "u6"}
    assert [error.partition(":")[0] for error in errors(rows)] == [
        "line 4", "line 5", "line 7", "line 9"
    ]  # fmt: skip


def test_an_empty_cell_quoted_or_not_is_no_value(sheet: Path) -> None:
    rows = read(sheet, 'id,image_url\n,u\n"",u\n1,\n2,""\n" ",u\n"3","u3"\n')
    assert codes(rows) == ["MISSING_ID"] * 2 + ["MISSING_URL"] * 2 + ["MISSING_ID", None]


def test_space_belongs_to_ids_and_paths_but_not_to_urls(sheet: Path) -> None:
    rows = read(sheet, "id,image_url\n a, p/1\na,https://x/1 \nb, HTTPS://x/2\n")
    assert good(rows) == {" a": " p/1", "a": "https://x/1", "b": "HTTPS://x/2"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,image_url,id\n1,u,2\n"),
        ("a.tsv", "id\timage_url\timage_url\n1\tu\tv\n"),
        ("a.parquet", ""),
    ],
    ids=["csv", "tsv", "parquet"],
)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    if not text:
        arrays = [pa.array([1]), pa.array([2]), pa.array(["u"])]
        pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, ["id", "id", "image_url"]), path)
    with pytest.raises(UsageError, match="2 columns named '(id|image_url)'"):
        next(FileSource(path).pages(1))


def test_a_key_twice_in_a_line_of_json_is_an_error(tmp_path: Path) -> None:
    lines = ['{"id": 1, "id": 2, "image_url": "u"}', '{"id": 3, "image_url": "u", "image_url": 5}']
    lines += ['{"id": 4, "image_url": "u4", "x": 1, "x": 2}', '{"id": 5, "x": {"id": 6}}']
    rows = read(tmp_path / "a.jsonl", "\n".join(lines))
    assert good(rows) == {4: "u4"} and codes(rows) == ["BAD_ROW"] * 2 + [None, "MISSING_URL"]
    assert errors(rows)[0].startswith("line 1: ")


def test_an_unreadable_header_is_refused(tmp_path: Path) -> None:
    heads = {"a.tsv": "id\timage_url\tx\\.\n", "a.csv": "id,image_url," + "x" * 200_000}
    for name, head in heads.items():
        with pytest.raises(UsageError, match="line 1, is no header: a "):
            read(tmp_path / name, head + "\n1,u,v\n")


def test_a_quoted_tsv_is_refused_with_advice(tsv: Path) -> None:
    with pytest.raises(UsageError, match="without quotes"):
        read(tsv, '"id"\t"image_url"\n"1"\t"u"\n')


def write_csv(rows: list[list[str]], **options: Any) -> str:
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_a_csv_writer_writes_is_read_back(sheet: Path, end: str, quoting: int) -> None:
    choose = random.Random(14)
    alphabet = ['"', '""', ",", "\n", "\r\n", "\r", "a", " ", "\t", "\\", "é", "\\.", ",9,u9", "'"]
    rows = [["id", "caption", "image_url"]]
    for number in range(400):
        cells = ["".join(choose.choices(alphabet, k=choose.randrange(9))) for _ in range(2)]
        rows.append([f"{number}{cells[0]}.", cells[1], f"p/{number}{cells[0]}."])
    found = good(read(sheet, write_csv(rows, quoting=quoting, lineterminator=end)))
    assert found == {row[0]: row[2] for row in rows[1:]}


def test_no_stray_quote_puts_a_url_under_another_id(sheet: Path) -> None:
    choose = random.Random(14)
    captions = ["a", "b, c", 'say "d"', "e\nf", "", '"Hi" x', "\n9,x,u-wrong\n", ", g"]
    rows = [["id", "caption", "image_url"]]
    rows += [[f"{n}", choose.choice(captions), f"u{n}"] for n in range(30)]
    text = write_csv(rows, lineterminator="\n")
    quotes = [at for at, c in enumerate(text) if c == '"']
    ends = 0
    for number in range(600):
        at = choose.choice(quotes) if number % 2 else choose.randrange(21, len(text))
        sheet.write_text(text[:at] + text[at + 1 :] if number % 2 else f'{text[:at]}"{text[at:]}')
        try:  # to the end, as a backfill does when it counts, before the first job
            rows_read = [row for page in FileSource(sheet).pages(9) for row in page]
        except BackfillError as error:
            assert re.search(r"rows\.csv, line \d+: ", str(error))
            ends += 1
            continue
        pairs = [(i.replace('"', ""), u.replace('"', "")) for i, u in good(rows_read).items()]
        assert all(url == f"u{row_id}" for row_id, url in pairs), (number, at)
    assert 0 < ends < 600


def write_parquet(path: Path, ids: pa.Array, urls: pa.Array) -> Path:
    pyarrow.parquet.write_table(pa.table({"id": ids, "image_url": urls}), path)
    return path


def rows_of(path: Path) -> list[Row]:
    return [row for page in FileSource(path).pages(10) for row in page]


URL_TYPES = [
    pa.binary(), pa.large_binary(), pa.string(), pa.large_string(), pa.string_view(),
    pa.binary_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary(2),
]  # fmt: skip


@pytest.mark.parametrize("kind", URL_TYPES, ids=str)
def test_parquet_urls_and_ids_may_be_bytes_or_text(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["u1", "u2"], pa.string())
    if pa.types.is_fixed_size_binary(kind):
        values = pa.array([b"u1", b"u2"], kind)
    elif pa.types.is_dictionary(kind):
        values = values.dictionary_encode()
    else:
        values = values.cast(kind)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"id": values, "image_url": values}), path)
    assert good(rows_of(path)) == {"u1": "u1", "u2": "u2"}


BIG = 10**37
ID_COLUMNS = [
    (pa.array([Decimal(7), None, Decimal(-8)], pa.decimal128(38, 0)), [7, "MISSING_ID", -8]),
    (pa.array([Decimal(BIG), Decimal(1 << 63), Decimal(2)], pa.decimal128(38, 0)),
     [str(BIG), str(1 << 63), 2]),
    (pa.array([Decimal("7.00"), Decimal("7.50"), Decimal(1)], pa.decimal128(10, 2)),
     [7, "BAD_ROW", 1]),
    (pa.array([Decimal(7), Decimal(8), Decimal(9)], pa.decimal256(60, 0)), [7, 8, 9]),
    (pa.array([7.0, None, -8.0], pa.float64()), [7, "MISSING_ID", -8]),
    (pa.array([2.0**53 - 1, 2.0**53, 1.5], pa.float64()), [2**53 - 1, "BAD_ROW", "BAD_ROW"]),
    (pa.array([float("nan"), float("inf"), -0.0], pa.float64()), ["BAD_ROW", "BAD_ROW", 0]),
    (pa.array([2.0**24 - 1, 2.0**24, 3.0], pa.float32()), [2**24 - 1, "BAD_ROW", 3]),
    (pa.array([1, 2, 3], pa.uint8()), [1, 2, 3]),
    (pa.array([(1 << 63) - 1, 1 << 63, 3], pa.uint64()), [(1 << 63) - 1, "BAD_ROW", 3]),
    (pa.array([uuid.UUID(int=n).bytes for n in (1, 2, 3)], pa.uuid()),
     [str(uuid.UUID(int=n)) for n in (1, 2, 3)]),
    (pa.array([b"a", b"\xff", b"c"]), ["a", "BAD_ROW", "c"]),
    (pa.array([None, None, None]), ["MISSING_ID"] * 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "expected"), ID_COLUMNS, ids=lambda v: str(getattr(v, "type", "")).replace(" ", "")
)
def test_parquet_ids(tmp_path: Path, ids: pa.Array, expected: list[Any]) -> None:
    path = write_parquet(tmp_path / "a.parquet", ids, pa.array(["u", "v", "w"]))
    results = [row.error.code if row.error else row.id for row in rows_of(path)]
    assert results == expected and list(map(type, results)) == list(map(type, expected))


def test_invalid_utf8_in_a_parquet_text_column_costs_its_row(tmp_path: Path) -> None:
    data = pa.py_buffer(b"u1\xffu3")
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 3, 5)))
    urls = pa.StringArray.from_buffers(3, offsets, data)
    path = write_parquet(tmp_path / "a.parquet", pa.array([1, 2, 3]), urls)
    rows = rows_of(path)
    assert good(rows) == {1: "u1", 3: "u3"} and codes(rows)[1] == "BAD_ROW"


@pytest.mark.parametrize(
    ("ids", "urls", "message"),
    [
        ([{"a": 1}], ["u"], r"column 'id' is struct<a: int64>"),
        ([[1]], ["u"], r"column 'id' is list<"),
        ([[{"a": 1}]], ["u"], r"column 'id' is list<"),
        ([True], ["u"], r"column 'id' is bool"),
        ([1], [["u"]], r"column 'image_url' is list<"),
        ([1], [{"href": "u"}], r"column 'image_url' is struct<"),
        ([1], [5], r"column 'image_url' is int64"),
    ],
    ids=["struct", "list", "list-of-structs", "bool", "urls-list", "urls-struct", "urls-int64"],
)
def test_parquet_columns_that_hold_no_ids_or_urls_give_one_error(
    tmp_path: Path, ids: list[Any], urls: list[Any], message: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(ids), pa.array(urls))
    with pytest.raises(UsageError, match=message):
        rows_of(path)


def test_a_nested_field_is_not_taken_for_a_column(tmp_path: Path) -> None:
    table = pa.table({"id": [{"id": 1}], "id.id": [5], "image_url": ["u"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (page,) = FileSource(tmp_path / "a.parquet", id_column="id.id").pages(3)
    assert good(page) == {5: "u"}


def test_whole_floats_in_json_are_ids(tmp_path: Path) -> None:
    values = [7.0, 7.5, 1e300, 2**53, 2.0**53]
    text = "\n".join(json.dumps({"id": value, "image_url": f"u{value}"}) for value in values)
    rows = read(tmp_path / "a.jsonl", text)
    assert [row.error.code if row.error else row.id for row in rows] == [
        7, "BAD_ROW", "BAD_ROW", 2**53, "BAD_ROW"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_as_a_whole(tmp_path: Path, name: str, encoding: str) -> None:
    with pytest.raises(UsageError, match="is in UTF-16: save it in UTF-8"):
        read(tmp_path / name, "\ufeffid,image_url\n1,u\n".encode(encoding))


def test_a_null_character_in_a_url_costs_its_row(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({"id": n, "image_url": f"u{chr(n)}"}) for n in (0, 65))
    rows = read(tmp_path / "a.jsonl", text)
    assert good(rows) == {65: "uA"} and codes(rows)[0] == "BAD_ROW"


def test_a_folder_as_a_source_names_the_command_for_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder without Parquet files: .*heimdex-clip embed"):
        FileSource(tmp_path)
