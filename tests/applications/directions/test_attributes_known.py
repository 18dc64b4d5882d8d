"""What somebody knows of images becomes numbers: classes, tables, scenes; and one sentence where it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_vae.applications.directions import attributes
from ldm_vae.applications.directions.attributes import Attribute
from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource
from ldm_vae.errors import UserError


def test_a_class_is_yes_or_no_against_the_others() -> None:
    cat, dog = attributes.of_classes(np.array([0, 1, -1, 1]), ["cat", "dog"], "labels")
    assert (cat.name, dog.name, cat.binary) == ("cat", "dog", True)
    np.testing.assert_equal(cat.values, [1, 0, np.nan, 0])
    np.testing.assert_equal(dog.values, [0, 1, np.nan, 1])


@pytest.mark.parametrize(("labels", "what"), [([1, 1], r"one class only \('dog'\)"), ([-1, -1], "no labels")])
def test_one_class_is_refused(labels: list[int], what: str) -> None:
    with pytest.raises(UserError, match=f"labels: {what} among 2 images; a direction needs at least two classes"):
        attributes.of_classes(np.array(labels), ["cat", "dog"], "labels")


def test_a_table_of_numbers_words_and_circles(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("file,age,mood,hue,open\na/1.png,30,glad,0.25,1\na/2.png,,sad,0.5,0\n")
    found = {a.name: a for a in attributes.of_table(table, ["a/2.png", "a/1.png", "a/3.png"], circles=["hue"])}
    assert set(found) == {"age", "mood=glad", "mood=sad", "hue.cos", "hue.sin", "open"}
    np.testing.assert_equal(found["age"].values, [np.nan, 30, np.nan])
    np.testing.assert_equal(found["mood=sad"].values, [1, 0, np.nan])
    np.testing.assert_allclose(found["hue.cos"].values, [-1, 0, np.nan], atol=1e-12)
    assert (found["open"].binary, found["age"].binary, found["mood=sad"].binary) == (True, False, True)


def test_columns_that_the_first_row_lacks_count_and_cells_without_a_column_do_not(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": "x"}\n{"id": "y", "age": 7}\n')
    (age,) = attributes.of_table(tmp_path / "t.jsonl", ["x", "y"])
    np.testing.assert_equal(age.values, [np.nan, 7])
    (tmp_path / "t.csv").write_text("id,age\nx,3,4,5\ny,7\n")
    assert [a.name for a in attributes.of_table(tmp_path / "t.csv", ["x", "y"])] == ["age"]


def test_cells_keep_their_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('id,told,age\nx,"one\ntwo",3\ny,one,7\n')
    (tmp_path / "t.jsonl").write_text('{"id": "x", "told": "a\u2028b", "age": 3}\n{"id": "y", "age": 7}\n')
    for name in ("t.csv", "t.jsonl"):
        found = {a.name: a for a in attributes.of_table(tmp_path / name, ["x", "y"])}
        np.testing.assert_equal(found["age"].values, [3, 7])


def test_a_label_column_of_numbers_holds_classes(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": "x", "label": 3}\n{"id": "y", "label": 7}\n')
    assert [a.name for a in attributes.of_table(tmp_path / "t.jsonl", ["x", "y"])] == ["3", "7"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age\n3\n", "no column names the images"),
        ("file,age\nother.png,3\n", "names none of the 1 images, for example 'other.png'"),
        ("", "holds no rows"),
        ("file,age\n\xff", "names none|cannot be read"),
    ],
)
def test_tables_that_do_not_fit(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        attributes.of_table(tmp_path / "t.csv", ["a.png"])


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        attributes.of_table(tmp_path / "none.csv", ["a.png"])
    (tmp_path / "t.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"t\.jsonl: cannot be read"):
        attributes.of_table(tmp_path / "t.jsonl", ["a.png"])


def test_why_an_attribute_has_no_direction() -> None:
    few = Attribute("age", np.array([1.0, 2.0, np.nan]), False)
    assert few.problem() == "is known of 2 images, 20 are the least"
    assert Attribute("age", np.full(30, 7.0), False).problem() == "is the same in all 30 images (7)"
    rare = np.zeros(30)
    rare[:2] = 1
    assert "has 2 images of 30, 5 inside and outside" in str(Attribute("cat", rare, True).problem())
    assert Attribute("age", np.arange(30.0), False).problem() is None


def test_scenes_are_the_truth_of_the_synthetic_set() -> None:
    source = SyntheticSource(SyntheticConfig(count=4, resolution=32))
    found = {a.name: a.values for a in attributes.of_scenes(source, [1, 3])}
    truth = source.attributes(3)
    assert found["x"][1] == truth["x"]
    assert found["hue.cos"][1] == pytest.approx(np.cos(2 * np.pi * truth["hue"]))
    assert found["textured"][1] == float(truth["texture"] > 0)
