"""`sleuth sizes`: its numbers are those of real indexes, and what it did not measure it says so."""

import numpy as np
import pytest

from scripts import __main__ as sleuth
from scripts.sizes import dense_rows, other_rows


def test_the_table_of_twenty_one_million_says_where_sixty_gigabytes_come_from():
    rows = {row.kind: row for row in dense_rows(21_015_324, 768, sample=0) + other_rows(21_015_324, 100)}
    assert rows["flat float32"].disk_bytes == pytest.approx(64.6e9, rel=0.01)
    assert rows["flat int8"].disk_bytes == pytest.approx(16.1e9, rel=0.01)
    assert rows["ann IVF16384,SQ8"].memory_bytes < rows["flat float16"].memory_bytes
    assert all(row.seconds is None for row in rows.values())
    assert {"bm25", "inverted", "maxsim int8"} <= set(rows)


def test_recall_is_measured_against_the_exact_product():
    rows = {row.kind: row for row in dense_rows(2000, 24, sample=2000)}
    assert set(rows) == {"flat float32", "flat float16", "flat int8", "ann HNSW32"}
    assert rows["flat float32"].recall == 1.0
    assert all(row.recall is not None and row.recall > 0.9 and row.seconds for row in rows.values())


def test_the_command_prints_a_table_and_measures_given_vectors(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((1200, 8)).astype(np.float16))
    options = ["--vectors", str(tmp_path / "v.npy"), "--sample", "1000"]
    assert sleuth.main(["sizes", "--passages", "3000000", *options]) == 0
    said = capsys.readouterr().out
    assert "3,000,000 passages of 100 words, 8 dimensions" in said
    assert "ann IVF8192,SQ8" in said and "not measured" in said and "v.npy" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--passages", "0"], "passages = 0: must be >= 1"),
        (["--passages", "9", "--sample", "5"], "sample = 5: must be 0, or at least 1000"),
        (["--passages", "9", "--vectors", "{}/none.npy"], "none.npy: not a .npy file of vectors"),
    ],
)
def test_wrong_options_are_refused(options, said, tmp_path, capsys):
    assert sleuth.main(["sizes", *[option.format(tmp_path) for option in options]]) == 2
    assert said in capsys.readouterr().err
