"""A parquet file of kilobytes may stand for gigabytes: what is held of it at once is bounded."""

import io
import tracemalloc

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: tppo-kernels[data]")

import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402

from tppo.errors import DataError  # noqa: E402
from tppo.sessions.readers import ReadConfig, SessionLog, qac  # noqa: E402
from tppo.sessions.readers.footer import column_sizes  # noqa: E402

TEXT = "x" * 100_000
MOST = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(qac, "LONGEST", MOST)


def shared(n):
    """The text n times, which a file holds once."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * n, pyarrow.int32()), [TEXT])


def listed(rows, each):
    offsets = pyarrow.array(range(0, rows * each + 1, each), pyarrow.int32())
    return pyarrow.ListArray.from_arrays(offsets, shared(rows * each))


def write(path, rows, group=1 << 20, limit=None, **columns):
    given = {"session_id": range(rows), "final_search_term": ["a"] * rows, "prefix": ["ab"] * rows}
    arrays = {name: x if isinstance(x, pyarrow.Array) else pyarrow.array(x)
              for name, x in (given | columns).items()}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(arrays), path, group, compression="zstd",
                                store_schema=False, dictionary_pagesize_limit=limit)  # fmt: skip
    assert path.stat().st_size < 1 << 17


def read(path, **options):
    """The sessions, what was left out, and the most bytes that Python and Arrow held."""
    pool, log = pyarrow.default_memory_pool(), SessionLog(path, ReadConfig(format="qac", **options))
    pool.release_unused()
    before = pool.max_memory()
    tracemalloc.start()
    try:
        found = sum(1 for _ in log)
        return found, log.bad.count, tracemalloc.get_traced_memory()[1], pool.max_memory() - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("column", ["final_search_term", "prefixes"])
def test_a_text_that_rows_share_is_not_held_once_a_row(tmp_path, column):
    """500 times 100 kB are 50 MB, in a file of kilobytes."""
    path = tmp_path / "log.parquet"
    given = shared(500) if column == "final_search_term" else listed(100, 5)
    write(path, len(given), **{column: given})
    found, bad, held, arrow = read(path)
    assert found == len(given) and not bad
    assert held < 16 * MOST and arrow < 16 * MOST


def test_a_row_that_is_too_large_is_named_and_left_out(tmp_path):
    path = tmp_path / "log.parquet"
    write(path, 60, prefixes=pyarrow.concat_arrays([listed(30, 5), listed(1, 200),
                                                    listed(29, 5)]))  # fmt: skip
    said = f"{path}: row 31: holds more than 1 MB, expected shorter ones"
    with pytest.raises(DataError, match=said):
        read(path)
    found, bad, held, arrow = read(path, on_bad_row="skip")
    assert (found, bad) == (59, 1) and held < 16 * MOST and arrow < 16 * MOST


@pytest.mark.parametrize("kind", ["one large value", "many values"])
def test_a_column_that_would_fill_the_memory_is_refused_before_it_is_read(
    tmp_path, kind, monkeypatch
):
    path = tmp_path / "log.parquet"
    if kind == "one large value":
        write(path, 2, final_search_term=["x" * (4 * MOST), "a"])
    else:
        monkeypatch.setattr(qac, "MOST_VALUES", 1 << 16)
        write(path, 2, prefixes=[["a"] * (1 << 17), ["b"]])
    with pytest.raises(DataError, match="row group 1: column '(final_search_term|prefixes.list."
                       "element)' has .*Smaller row groups are read as well") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_the_same_rows_whatever_their_groups_and_pages(tmp_path):
    """Rows that are parted, and rows that are not, are numbered alike; so are they where a group
    begins with texts that it holds once and goes on with others (limit)."""
    texts = [f"{n} " + "a" * (n % 50_000) for n in range(0, 200_000, 997)]
    found = []
    for group, limit in ((1 << 20, None), (7, None), (1 << 20, 4096)):
        path = tmp_path / f"{group}-{limit}.parquet"
        write(path, len(texts), group, limit, final_search_term=texts,
              prefixes=[["b", text[:9]] * (i % 3) for i, text in enumerate(texts)])  # fmt: skip
        found.append([(s.id, s.history, s.targets)
                      for s in SessionLog(path, ReadConfig(format="qac"))])  # fmt: skip
    assert found[0] == found[1] == found[2] and len(found[0]) == len(texts)


def test_sizes_of_columns_are_those_that_pyarrow_says():
    lists = pyarrow.array([[["a", "b"], ["c", "d"]]] * 9)
    maps = pyarrow.array([[("k", 1)]] * 9, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    table = pyarrow.table({"a": ["x"] * 9, "é.b": [1.5] * 9, "lists": lists, "maps": maps,
                           "structs": [{"f": True, "g": [1, 2]}] * 9})  # fmt: skip
    table = table.replace_schema_metadata({"k" * 300: "v" * 1000})
    for options in ({}, {"row_group_size": 4}, {"write_page_index": True}, {"version": "1.0"}):
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file, **options)
        metadata = pyarrow.parquet.read_metadata(io.BytesIO(file.getvalue()))
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        columns = [(i, group.column(k)) for i, group in enumerate(groups)
                   for k in range(group.num_columns)]  # fmt: skip
        assert [*column_sizes(file)] == [
            (i, c.path_in_schema, c.num_values, c.total_uncompressed_size) for i, c in columns]


def test_metadata_of_which_a_bit_has_flipped_never_ends_the_process(tmp_path):
    """pyarrow ends it where the statistics of a column contradict themselves."""
    path = tmp_path / "log.parquet"
    write(path, 3, prefixes=[["a", "b"]] * 3)
    whole = path.read_bytes()
    first = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    outcomes = set()
    for at in range(first, len(whole) - 8):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 4
        path.write_bytes(flipped)
        try:
            outcomes.add(sum(1 for _ in SessionLog(path, ReadConfig(format="qac"))))
        except DataError as error:
            assert str(error).startswith(str(path))
            outcomes.add("refused")
    assert "refused" in outcomes and len(outcomes) > 1
