"""A user's YAML is read strictly: no key twice, and what is wrong is one line with file and line."""

import pytest

from data.errors import ConfigError
from data.yaml_file import read_yaml

WRONG = {
    "a: 1\nb: 2\na: 3\n": "{file}, line 3: a is given twice, first on line 1",
    "o: {b: 1, c: 2,\n    b: 3}\n": "{file}, line 2: b is given twice, first on line 1",
    "parts:\n- a\n- {k: 1, k: 1}\n": "{file}, line 3: k is given twice, first on line 3",
    "\"a\": 1\n'a': 2\n": "{file}, line 2: a is given twice, first on line 1",
    "1: x\n0x1: y\n": "{file}, line 2: 0x1 is given twice, first on line 1",
    "x: &a {k: 1}\ny: *a\nx: 2\n": "{file}, line 3: x is given twice, first on line 1",
    "a: [1\n": "{file}, line 2: not YAML: expected ',' or ']'",
    "a: 2024-13-45\n": "{file}: not YAML: month must be in 1..12",
    "a: \x07\n": "{file}: not YAML: unacceptable character",
    "x: !!python/object/apply:os.getpid []\n": "{file}, line 1: not YAML: could not determine a constructor",
    "[" * 1000: "{file}: not YAML: maximum recursion depth",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_file_is_one_line_with_its_place(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(message.format(file=file))


def test_what_a_mapping_merges_may_be_given_again(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n")
    assert read_yaml(file)["more"] == {"a": 1, "b": 3}


def test_an_alias_in_a_circle_ends(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("&a [*a]\n")
    assert len(read_yaml(file)) == 1


def test_a_missing_file_and_one_that_is_no_text_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml", "--config ")
    (tmp_path / "b.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"b\.yaml: cannot be read: 'utf-8' codec"):
        read_yaml(tmp_path / "b.yaml")
