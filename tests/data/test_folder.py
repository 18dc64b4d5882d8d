from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm_vae.config import load
from ldm_vae.data import open_source
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.folder import FolderSource, find_pictures
from ldm_vae.data.sources import DataConfig
from ldm_vae.errors import UserError
from tests.data.encoded import encode, picture

FILES = ("b/2.png", "a/1.PNG", "a/deep/3.jpg", "c/4.webp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(FILES):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[path.suffix.lower()]
        path.write_bytes(encode(picture(16 + number, 24), suffix))
    return tmp_path / "set"


def ids(source: FolderSource) -> list[str]:
    return [source.id(i) for i in range(len(source))]


def labels(source: FolderSource) -> dict[str, str | None]:
    names = [*source.label_names, None]
    return {source.id(i): names[source.label(i)] for i in range(len(source))}


def test_images_are_found_in_a_fixed_order_and_hidden_ones_left_out(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    for name in (".hidden/5.png", "a/._1.png", "notes.txt"):
        (folder / name).write_bytes(b"no image")
    source = FolderSource(folder)
    assert ids(source) == ["a/1.PNG", "a/deep/3.jpg", "b/2.png", "c/4.webp"]
    np.testing.assert_array_equal(source.read(0), picture(17, 24))
    assert [source.read(i).shape for i in range(4)] == [(17, 24, 3), (18, 24, 3), (16, 24, 3), (19, 24, 3)]


def test_folders_are_labels(folder: Path) -> None:
    assert labels(FolderSource(folder)) == {
        "a/1.PNG": "a",
        "a/deep/3.jpg": "a",
        "b/2.png": "b",
        "c/4.webp": "c",
    }
    (folder / "top.png").write_bytes(encode(picture()))
    assert labels(FolderSource(folder))["top.png"] is None


def test_one_folder_is_no_label(folder: Path) -> None:
    source = FolderSource(folder / "a")
    assert source.label_names == ()
    assert [source.label(i) for i in range(len(source))] == [-1, -1]


@pytest.mark.parametrize(
    "text",
    [
        "file,label\na/1.PNG,10\n./b/2.png,9\na\\deep\\3.jpg,10\n",
        "\ufefflabel,width,File_Name\n10,5,a/1.PNG\n9,5,b/2.png\n10,5,a/deep/3.jpg\n",
        "file,anything\na/1.PNG,10\nb/2.png,9\na/deep/3.jpg, 10\n\n",
        "a/1.PNG,10\nb/2.png,9\na/deep/3.jpg,10\n",
    ],
    ids=["plain", "columns", "two columns", "no header"],
)
def test_labels_csv(folder: Path, text: str) -> None:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    source = FolderSource(folder)
    assert source.label_names == ("9", "10")  # numbers in numeric order
    assert labels(source) == {"a/1.PNG": "10", "a/deep/3.jpg": "10", "b/2.png": "9", "c/4.webp": None}


def test_a_table_without_labels_leaves_the_folders(folder: Path) -> None:
    (folder / "labels.csv").write_text("file,width,height\na/1.PNG,1,2\n")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a/1.PNG", "caption": "one"}) + "\n")
    assert FolderSource(folder).label_names == ("a", "b", "c")


def test_metadata_jsonl(folder: Path) -> None:
    rows = [{"file_name": "a/1.PNG", "label": "cat"}, {"file_name": "c/4.webp", "label": "bird"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = FolderSource(folder)
    assert source.label_names == ("bird", "cat")
    assert labels(source) == {"a/1.PNG": "cat", "a/deep/3.jpg": None, "b/2.png": None, "c/4.webp": "bird"}


def test_label_files_that_do_not_fit(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "labels.csv"
    path.write_text("file,label\na/1.PNG,x\ngone.png,y\n")
    with caplog.at_level(logging.WARNING):
        assert FolderSource(folder).label_names == ("x",)
    assert "1 of the 2" in caplog.text
    path.write_text("file,label\ngone.png,y\n")
    with pytest.raises(UserError, match="lists no image"):
        FolderSource(folder)
    path.write_bytes(b"file,label\na/1.PNG,\xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        FolderSource(folder)
    path.unlink()
    (folder / "metadata.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="cannot be read"):
        FolderSource(folder)


def test_include_takes_a_part_with_the_same_ids(folder: Path) -> None:
    config = load(DataConfig, None, ["source=folder", f"path={folder}", "include=[a/*,c/*]"])
    source = open_source(config)
    assert [source.id(i) for i in range(len(source))] == ["a/1.PNG", "a/deep/3.jpg", "c/4.webp"]
    with pytest.raises(UserError, match=r"data\.include"):
        FolderSource(folder, include=["nothing/*"])


def test_links_are_followed_and_loops_end(folder: Path, tmp_path: Path) -> None:
    os.symlink(folder, folder / "a" / "loop")
    os.symlink(tmp_path / "nowhere", folder / "dangling.png")
    os.symlink(folder / "b", folder / "0_again")  # the real folder comes first, so this adds nothing
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "6.png").write_bytes(encode(picture()))
    os.symlink(elsewhere, folder / "linked")
    os.symlink(folder, elsewhere / "back")
    os.symlink(elsewhere / "6.png", folder / "single.png")
    os.symlink("itself.png", folder / "itself.png")
    os.mkfifo(folder / "pipe.png")
    unreadable = ["dangling.png", "itself.png", "pipe.png"]
    readable = ["a/1.PNG", "a/deep/3.jpg", "b/2.png", "c/4.webp", "linked/6.png", "single.png"]
    source = FolderSource(folder)
    assert ids(source) == sorted([*readable, *unreadable])
    for name in unreadable:  # named, not passed over
        with pytest.raises(ImageRejected) as caught:
            source.read(ids(source).index(name))
        assert caught.value.reason == "unreadable"


def test_files_that_are_no_images_by_their_names_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("holiday.heic", "b/party.heic", "IMG_0001"):
        (folder / name).write_bytes(encode(picture()))
    (folder / "labels.csv").write_text("file,label\na/1.PNG,x\n")
    with caplog.at_level(logging.WARNING):
        FolderSource(folder)
    assert "skipped files without an image suffix: 2 .heic, 1 no suffix" in caplog.text


def test_a_name_that_is_no_utf8_has_an_id_that_is(folder: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(encode(picture()))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = FolderSource(folder)
    assert "\\xff.png" in ids(source)
    json.dumps(ids(source)).encode()
    source.fingerprint()
    assert source.read(ids(source).index("\\xff.png")).shape == (48, 64, 3)


def test_bad_files_are_rejected_one_by_one(folder: Path) -> None:
    (folder / "a/1.PNG").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "b/2.png").write_bytes(b"")
    source = FolderSource(folder)
    (folder / "c/4.webp").unlink()
    reasons = []
    for i in (0, 2, 3):
        with pytest.raises(ImageRejected) as caught:
            source.read(i)
        reasons.append(caught.value.reason)
    assert reasons == ["unknown_format", "empty", "unreadable"]


def test_fingerprint_follows_the_content_not_the_place(folder: Path, tmp_path: Path) -> None:
    original = FolderSource(folder).fingerprint()
    assert len(original) == 64
    shutil.copytree(folder, tmp_path / "copy")
    copy = FolderSource(tmp_path / "copy")
    assert copy.fingerprint() == pickle.loads(pickle.dumps(copy)).fingerprint() == original
    (tmp_path / "copy/labels.csv").write_text("file,label\na/1.PNG,x\n")
    relabeled = FolderSource(tmp_path / "copy").fingerprint()
    (tmp_path / "copy/labels.csv").unlink()
    (tmp_path / "copy/c/4.webp").write_bytes(b"other size")
    assert len({original, relabeled, FolderSource(tmp_path / "copy").fingerprint()}) == 3


def test_nothing_to_read_is_explained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        FolderSource(tmp_path / "missing")
    with pytest.raises(UserError, match="is a file"):
        FolderSource(folder / "a/1.PNG")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="found: nothing"):
        FolderSource(empty)
    (empty / "scan.dcm").write_bytes(b"x")
    with pytest.raises(UserError, match=r"found: 1 \.dcm.*\.jpg"):
        FolderSource(empty)


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(16, 24)))
    return root


@pytest.mark.parametrize(
    "text",
    [
        "file;label\na/1.PNG;10\nb/2.png;9\na/deep/3.jpg;10\n",
        "\ufefffile\tlabel\r\na/1.PNG\t10\r\nb/2.png\t9\r\na/deep/3.jpg\t10\r\n",
        "a/1.PNG;10\nb/2.png;9\na/deep/3.jpg;10\n",
        'category;note;image\n10;"a,b";a/1.PNG\n9;"c,d,e,f";b/2.png\n10;;a/deep/3.jpg\n',
        "Image_Path,Class_Name,text\na/1.PNG,10,one\nb/2.png,9,two\na/deep/3.jpg,10,three\n",
    ],
    ids=["semicolons", "tabs with a byte order mark", "no header", "category beside commas", "other names"],
)
@pytest.mark.parametrize("name", ["metadata.csv", "Labels.TSV"])
def test_label_tables_of_other_programs(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    source = FolderSource(folder)
    assert labels(source) == {"a/1.PNG": "10", "a/deep/3.jpg": "10", "b/2.png": "9", "c/4.webp": None}
    assert source.labels_from == name


@pytest.mark.parametrize("text", ["file_name,text\na/1.PNG,a red cat\n", "file_name;breed;size\na/1.PNG;x;2\n"])
def test_a_table_without_labels_is_named(folder: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "metadata.csv").write_text(text)
    source = FolderSource(folder)
    assert source.label_names == ("a", "b", "c")
    assert source.labels_from == "the subfolders"
    assert "metadata.csv: no labels are read from it: its columns are file_name, " in caplog.text


def test_images_without_a_label_and_tables_elsewhere_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "a/metadata.csv").write_text("file,label\n1.PNG,x\n")
    FolderSource(folder)
    assert "no labels are read from a/metadata.csv, which is not directly in the folder" in caplog.text
    (folder / "labels.csv").write_text("file,label\na/1.PNG,x\n")
    FolderSource(folder)
    assert "labels.csv: 3 of 4 images have no label" in caplog.text
    (folder / "labels.csv").write_text("file,label\na/1.PNG,x\n./a/1.PNG,y\n")
    with pytest.raises(UserError, match="as 'x' and as 'y'; give one label"):
        FolderSource(folder)


def test_a_table_and_a_disk_may_compose_letters_differently(tmp_path: Path) -> None:
    put(tmp_path, "Zu\u0308rich/e\u0301.png", "b.png")
    (tmp_path / "labels.csv").write_text("Z\u00fcrich/\u00e9.png,x\nb.png,y\n", encoding="utf-8")
    assert sorted(labels(FolderSource(tmp_path)).values()) == ["x", "y"]  # type: ignore[type-var]


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("Training", "VALIDATION"), ("eval", "valid")])
def test_parts_of_a_collection_are_not_classes(tmp_path: Path, parts: tuple[str, ...]) -> None:
    put(tmp_path, *(f"{part}/{name}/1.png" for part in parts for name in ("cat", "dog")))
    with pytest.raises(UserError, match=r"parts of a collection and not classes; .*data\.include=\["):
        FolderSource(tmp_path)
    one = FolderSource(tmp_path, include=[f"{parts[0]}/*"])
    assert labels(one) == {f"{parts[0]}/{name}/1.png": name for name in ("cat", "dog")}
    assert one.labels_from == f"the subfolders of {parts[0]}"
    every = FolderSource(tmp_path, include=["*"])
    assert every.label_names == ("cat", "dog")
    assert len(every) == 2 * len(parts)
    assert FolderSource(tmp_path / parts[0]).label_names == ("cat", "dog")
    assert len(find_pictures(tmp_path)) == 2 * len(parts)  # pictures to show need no labels


def test_parts_without_classes_and_a_class_that_is_named_like_a_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flat = put(tmp_path / "flat", "train/1.png", "val/2.png")
    assert FolderSource(flat, include=["*"]).label_names == ()
    mixed = put(tmp_path / "mixed", "cat/1.png", "test/2.png")
    assert FolderSource(mixed).label_names == ("cat", "test")
    assert "test is taken for a class" in caplog.text
