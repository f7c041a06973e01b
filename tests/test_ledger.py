import pytest

from dropit.ledger import Row, SavedStorage, as_text, group, largest, print_rich, rows_by

SAVED = [
    SavedStorage(1, 3 * 2**20, "float32", ("a.b.c", "a.d"), ("Relu", "Convolution")),
    SavedStorage(2, 2**20, "uint8", ("a.b.e",), ("DropITConv",)),
    SavedStorage(3, 2**20, "float32", ("a.b.e",), ("DropITConv",)),
    SavedStorage(4, 2**19, "bfloat16", ("a.b.e",), ("DropITConv",)),
]


def test_rows_sum_by_name_largest_first():
    rows = rows_by(lambda saved: saved.operator, SAVED)
    assert [(row.name, row.nbytes) for row in rows] == [("Convolution + Relu", 3 * 2**20), ("DropITConv", 2.5 * 2**20)]
    assert rows[1].dtypes == "uint8, float32, bfloat16"


def test_a_row_that_only_the_plain_model_has_comes_last():
    rows = rows_by(lambda saved: saved.operator, SAVED[1:], SAVED[:1])
    assert [(row.name, row.nbytes, row.plain) for row in rows] == [
        ("DropITConv", 2.5 * 2**20, 0),
        ("Convolution + Relu", 0, 3 * 2**20),
    ]


def test_a_long_table_ends_in_the_sum_of_the_others():
    rows = [Row(str(number), 10 - number, "int8") for number in range(5)]
    assert largest(rows, 4) == rows
    assert largest(rows, 3) == [*rows[:3], Row("2 others", 7 + 6, "")]


def test_modules_are_grouped_by_the_first_parts_of_their_names():
    assert group("layer1.0.conv1", 2) == "layer1.0"
    assert group("fc", 2) == "fc"
    assert group("", 2) == "(the model itself)"


def test_a_table_in_plain_text():
    assert as_text("by operator", rows_by(lambda saved: saved.operator, SAVED)) == "\n".join(
        [
            "by operator         saved, MiB  share  stored as",
            "Convolution + Relu        3.00  54.5%  float32",
            "DropITConv                2.50  45.5%  uint8, float32, bfloat16",
            "total                     5.50",
        ]
    )


def test_an_empty_table():
    assert as_text("by operator", []).splitlines()[-1].split() == ["total", "0.00"]


def test_the_same_table_by_rich(capsys):
    pytest.importorskip("rich")
    print_rich("by operator", rows_by(lambda saved: saved.operator, SAVED, SAVED[:1]))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("by operator", "plain, MiB", "Convolution", "54.5%", "5.50"))
