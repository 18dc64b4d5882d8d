"""What is normal, which kind an anomaly is, and where: of the synthetic set and of folders with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_vae.applications.anomaly.images import mask_cells, open_labeled
from ldm_vae.data.sources import DataConfig
from ldm_vae.data.synthetic.source import SyntheticConfig, SyntheticSource
from ldm_vae.errors import UserError


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Images 40 wide and 32 high in `good` and `crack`; the mask of one crack is a rectangle."""
    for name in ("test/good/0.png", "test/good/1.png", "test/crack/0.png", "test/crack/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 40, 3), 99, np.uint8)).save(path)
    mask = np.zeros((32, 40), np.uint8)
    mask[8:16, 12:20] = 255
    (tmp_path / "masks/crack").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "masks/crack/0_mask.png")
    return tmp_path


def folder(parts: Path) -> DataConfig:
    return DataConfig(source="folder", path=str(parts / "test"))


def test_labels_of_a_folder_say_what_is_normal(parts):
    truth = open_labeled(folder(parts), ["good"], str(parts / "masks"))
    assert truth.kinds == ("crack", "crack", "normal", "normal")
    assert truth.has_masks
    assert not truth.mask(2, 32).any()


def test_a_mask_is_cropped_as_its_image(parts):
    """32 of 40 columns are kept, 4 lost on each side."""
    mask = open_labeled(folder(parts), ["good"], str(parts / "masks")).mask(0, 32)
    assert mask.shape == (32, 32)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 15, 8, 15)
    assert np.argwhere(mask_cells(mask)).tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_a_cell_counts_when_any_of_its_pixels_does():
    mask = np.zeros((16, 16), bool)
    mask[5, 11] = True
    assert np.argwhere(mask_cells(mask)).tolist() == [[1, 2]]


def test_without_masks_nothing_is_known_of_the_place(parts):
    truth = open_labeled(folder(parts), ["good"], None)
    assert truth.mask(0, 32) is None
    assert truth.mask(2, 32) is None


def test_a_missing_or_wrong_mask_is_named(parts):
    truth = open_labeled(folder(parts), ["good"], str(parts / "masks"))
    with pytest.raises(UserError, match=r"masks: .*crack/1\.png: .* white where the anomaly is"):
        truth.mask(1, 32)
    Image.new("L", (20, 10)).save(parts / "masks/crack/1.png")
    with pytest.raises(UserError, match=r"crack/1\.png is 20x10, its image 40x32 pixels"):
        truth.mask(1, 32)


def test_the_synthetic_set_knows_its_defects():
    data = DataConfig(synthetic=SyntheticConfig(count=30, resolution=64, defects=0.5))
    truth, source = open_labeled(data, [], None), SyntheticSource(data.synthetic)
    assert set(truth.kinds) >= {"normal", "scratch"}
    for index, kind in enumerate(truth.kinds):
        assert truth.mask(index, 64).any() == (kind != "normal") == source.defect_mask(index).any()
    index = next(i for i, kind in enumerate(truth.kinds) if kind != "normal")
    np.testing.assert_array_equal(truth.mask(index, 64), source.defect_mask(index))


@pytest.mark.parametrize(
    ("defects", "normal", "masks", "message"),
    [
        (0.0, [], None, "all 12 images are normal, and an evaluation compares both; set data.synthetic.defects=0.5"),
        (1.0, [], None, "all 12 images are anomalous"),
        (0.5, ["ball"], None, "the synthetic set knows its defects"),
    ],
)
def test_one_class_only_of_the_synthetic_set_is_refused(defects, normal, masks, message):
    data = DataConfig(synthetic=SyntheticConfig(count=12, resolution=64, defects=defects))
    with pytest.raises(UserError, match=message):
        open_labeled(data, normal, masks)


def test_one_class_only_of_a_folder_is_refused(parts):
    for normal, message in (
        (["good", "crack"], "all 4 images are normal"),
        (["god"], r"no image has the label 'god'; there are: crack, good"),
        ([], r"normal: missing; give the labels of the normal images, of crack, good"),
    ):
        with pytest.raises(UserError, match=message):
            open_labeled(folder(parts), normal, None)
    with pytest.raises(UserError, match=r"masks: .*: no such folder"):
        open_labeled(folder(parts), ["good"], str(parts / "none"))


@pytest.mark.parametrize(("white", "words"), [(1, ""), (255, ""), (0, "marks nothing")])
def test_masks_of_0_and_1_are_understood_and_empty_ones_are_reported(parts, white, words, caplog):
    mask = np.zeros((32, 40), np.uint8)
    mask[8:16, 12:20] = white
    Image.fromarray(mask).save(parts / "masks/crack/1.png")
    truth = open_labeled(folder(parts), ["good"], str(parts / "masks"))
    assert truth.mask(1, 32).sum() == 64 * (white > 0)
    assert [words in record.getMessage() for record in caplog.records] == [True] * (white == 0)
