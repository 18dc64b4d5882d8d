"""`ldm-vae directions evaluate` end to end, and its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldm_vae import cli
from ldm_vae.applications.directions.evaluation import spread_of
from ldm_vae.errors import EXIT_USER_ERROR
from tests.latents.conftest import autoencoder_directory as autoencoder_directory  # a fixture


@pytest.fixture(scope="module")
def words(autoencoder_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an evaluation on the synthetic set, its directions fitted."""
    output = tmp_path_factory.mktemp("directions") / "fit"
    data = [
        "data.synthetic.count=60",
        "data.synthetic.resolution=64",
        "resolution=64",
        "device=cpu",
        "data.held_out=0.3",
    ]
    settings = [f"autoencoder={autoencoder_directory}", *data]
    fitting = ["attributes_from=[pixels,scene]", "components=1", f"output={output}"]
    assert cli.main(["directions", "fit", *settings, *fitting]) == 0
    return [*settings, f"directions={output}", "reader_epochs=1", "count=8", "attributes_from=[scene]"]


def test_the_folder_says_what_changed(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["directions", "evaluate", *words, f"output={tmp_path / 'out'}"]
    chosen = "names=[brightness/difference,x/probe,pca/1]"
    assert cli.main([*command, chosen]) == 0
    assert "index.html" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) == {"brightness/difference", "x/probe", "pca/1"}
    assert set(results["readable"]) >= {"x", "light", "hue.cos"}
    assert rows["x/probe"]["verdict"] == ("unread" if results["readable"]["x"] < 0.7 else rows["x/probe"]["verdict"])
    assert rows["pca/1"]["verdict"] == "unnamed"
    assert len(results["changes"]["pca/1"]) == len(results["attributes"])
    assert 5 < results["identity_psnr_db"] < 60
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/webp") == 2 * len(rows)  # two images each
    assert "<svg" in page
    before = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    assert cli.main([*command, chosen]) == 0  # finished: read, not redone
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == before
    assert cli.main([*command, "names=[pca/1]"]) == EXIT_USER_ERROR
    assert "holds the result of names" in capsys.readouterr().err
    (tmp_path / "out" / "results.json").write_text(json.dumps(results | {"directions": "xxh3_128:0"}))
    assert cli.main([*command, chosen]) == EXIT_USER_ERROR
    assert "holds the result of other directions; give another output, or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["count=3"], "count: 3 is below 8 images"),
        (["strengths=[1,2,3]"], "0 among them"),
        (["attributes_from=[pixels]"], "pixels are measured anyway"),
        (["names=[none]"], "'none' is unknown"),
        (["reader_images=10"], "reader_images: 10 images to train the reader on; 20 are the least"),
    ],
)
def test_what_it_refuses(
    settings: list[str], said: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["directions", "evaluate", *words, f"output={tmp_path / 'out'}", *settings]) == EXIT_USER_ERROR
    assert said in capsys.readouterr().err


def test_spread_and_correlation_of_unedited_images() -> None:
    values = np.array([[0.0, 0, 1], [1, 2, 0], [2, 4, 1]])
    deviations, correlations = spread_of(values)
    np.testing.assert_allclose(deviations, values.std(axis=0))
    np.testing.assert_allclose(correlations[0], [1, 1, 0], atol=1e-9)
