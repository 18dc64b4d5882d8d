from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_vae import cli, provenance
from ldm_vae.errors import UserError
from ldm_vae.evaluation.pages import duration, image_label, quantity
from ldm_vae.evaluation.reconstruction import FORMAT_VERSION
from ldm_vae.evaluation.report import write_report

VOID = {"meta", "img", "br", "link", "path", "polyline", "circle"}


class Page(HTMLParser):
    """Checks nesting; collects text, ids and image sources."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.images: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.ids.append(values["id"] or "")
        if tag == "img":
            assert values["alt"]
            self.images.append(values["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text += data


def save_picture(path: Path, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.5, "high": mean + 0.5}


@pytest.fixture
def run_root(tmp_path: Path) -> Path:
    root = tmp_path / "quickstart"
    for hour, stage in enumerate(("vae", "latents", "diffusion", "evaluation", "samples")):
        (root / stage).mkdir(parents=True)
        command = ["ldm-vae", stage, "value=a b"]
        provenance.write_run_record(root / stage, command, 3600.0 * hour, 30.0 + hour)
    (root / "vae" / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "loss/l1": 1 / i, "loss/kl": 2.0, "rate/beta": 1e-3}) + "\n" for i in range(1, 50)
        )
    )
    (root / "vae" / "config.yaml").write_text("rate: {mode: target, target_nats: 2.5}\ndata: {source: synthetic}\n")
    (root / "diffusion" / "metrics.jsonl").write_text(
        '{"step": 1, "loss/flow": 1.0}\n{"step": 2, "held_out/flow": 0.9}\n'
    )
    (root / "latents" / "manifest.json").write_text('{"format_version": 2, "count": 1234, "shards": 2}')
    write_results(root / "evaluation")
    for number in range(6):
        save_picture(root / "samples" / f"{number:04d}_{'red-ball' if number % 2 else 'star'}_{number // 2}.png")
    return root


def write_results(folder: Path) -> None:
    rows = {"decode(mean)": 27.25, "decode(sample)": 27.0, "block KLT, 4 components": 24.0}
    files = {}
    for name in ("original", "decoded", "linear", "difference", "latent"):
        files[name] = f"00_{name}.png"
        save_picture(folder / "examples" / files[name], 8 if name == "latent" else 64)
    results = {
        "format_version": FORMAT_VERSION,
        "config": {"data": {"source": "synthetic"}},
        "autoencoder": {"fingerprint": "sha256:" + "0" * 64, "class": "AutoencoderWavelet", "latent_channels": 4,
                        "downsampling": 8},
        "protocol": {
            "resolution": 512,
            "images": {"count": 20, "part": "held_out"},
            "baseline": {"fitted_on": {"count": 100}},
        },
        "rows": [
            {"name": name, "metrics": {"psnr": interval(db), "ssim": interval(0.8), "sharpness": interval(0.7)}}
            for name, db in rows.items()
        ],
        "gain_over_linear_db": interval(3.25),
        "rate": {"nats_per_dim": 2.5, "bits_per_dim": 3.607, "bits_per_pixel": 0.225},
        "examples": [{"id": "a.png", "label": "<script>alert(1)</script>", "files": files}],
        "images": [{"id": "a.png", **{name: {"psnr": db} for name, db in rows.items()}}],
        "rejected": [],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))


def test_the_page_shows_every_stage(run_root: Path) -> None:
    path = write_report(run_root)
    page = Page(path.read_text())
    assert path == run_root / "report.html"
    assert page.ids == [
        "reconstructions", "samples", "autoencoder", "diffusion", "measured", "limits", "time", "commands",
    ]  # fmt: skip
    text = " ".join(page.text.split())
    for words in ("27.25", "+3.25", "3.61", "48 times fewer", "1,234 encoded images", "2 min 40 s", "red ball"):
        assert words in text, words
    for stage in ("vae", "latents", "diffusion", "evaluation", "samples"):
        assert f"ldm-vae {stage} 'value=a b'" in text
    assert "target_nats: 2.5" in text


def test_the_page_is_one_file_and_its_pictures_are_inside(run_root: Path) -> None:
    html = write_report(run_root).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    assert "<script" not in html
    assert not re.search(r"url\((?!#)", html)
    images = Page(html).images
    assert len(images) == 6 + 5 + 6  # header, one example, samples
    for uri in images:
        head, _, data = uri.partition(",")
        assert head == "data:image/webp;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_names_from_the_data_are_escaped(run_root: Path) -> None:
    assert "&lt;script&gt;alert(1)" in write_report(run_root).read_text()


def test_weaknesses_are_named(run_root: Path) -> None:
    text = " ".join(Page(write_report(run_root).read_text()).text.split())
    assert "70 % of the fine contrast" in text
    assert "It took 1 min 02 s where published models take days" in text
    assert "say nothing about photographs" in text
    assert "No clear gain" not in text
    results = json.loads((run_root / "evaluation" / "results.json").read_text())
    results["gain_over_linear_db"] = interval(0.1)
    (run_root / "evaluation" / "results.json").write_text(json.dumps(results))
    assert "No clear gain" in Page(write_report(run_root).read_text()).text


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def text_of(run_root: Path) -> str:
    return " ".join(Page(write_report(run_root).read_text()).text.split())


def test_sizes_are_those_of_the_run(run_root: Path) -> None:
    """Of the encoded images; the measured ones may have another size."""
    assert "an image of 512 × 512 pixels into a latent of 64 × 64 positions with 4 channels, 48 times" in text_of(
        run_root
    )
    shape = {"latent_shape": [1, 12, 16], "preprocessing": {"height": 96, "width": 128}}
    change(run_root / "latents" / "manifest.json", **shape)
    text = text_of(run_root)
    assert "an image of 96 × 128 pixels into a latent of 12 × 16 positions with 1 channel, 192 times fewer" in text
    assert "512 × 512 pixels, every reconstruction rounded" in text
    assert "64 × 64" not in text


def test_sentences_about_a_rate_a_score_and_data_are_there_where_they_are_true(run_root: Path) -> None:
    text = text_of(run_root)
    for sentence in (
        "Training weighs two things", "until the rate sits at its target", "so there is none",
        "that training never saw", "fitted on 100 training images", "say nothing about photographs",
    ):  # fmt: skip
        assert sentence in text
    (run_root / "vae" / "config.yaml").write_text("rate: {mode: fixed}\ndata: {source: synthetic}\n")
    (run_root / "diffusion" / "metrics.jsonl").write_text('{"step": 2, "loss/flow": 1.0, "samples/kid@100": 0.1}\n')
    protocol = json.loads((run_root / "evaluation" / "results.json").read_text())["protocol"]
    protocol["images"] = {"count": 20, "part": "all"}
    change(run_root / "evaluation" / "results.json", protocol=protocol, config={"data": {"source": "folder"}})
    text = text_of(run_root)
    assert "fitted on 100 of these images" in text
    for sentence in ("until the rate sits", "so there is none", "about photographs"):
        assert sentence not in text
    plain = [{"step": i, "loss/l1": 1 / i} for i in range(1, 9)]
    (run_root / "vae" / "metrics.jsonl").write_text("\n".join(map(json.dumps, plain)))
    assert "Training weighs two things" not in text_of(run_root)


def test_every_machine_is_named(run_root: Path) -> None:
    record = json.loads((run_root / "diffusion" / "run.json").read_text())
    change(run_root / "diffusion" / "run.json", versions=record["versions"] | {"machine": "Abacus 1"})
    here = record["versions"]["machine"]
    assert " and ".join(sorted(["Abacus 1", here])) in text_of(run_root)


def test_enlarged_images_are_a_limit(run_root: Path) -> None:
    assert "Enlarged images" not in text_of(run_root)
    change(run_root / "evaluation" / "results.json", enlarged=[{"id": "a.png", "short_side": 128}])
    assert "1 of 20 images is smaller than the crop and enlarged" in text_of(run_root)


@pytest.mark.parametrize("missing", ["vae", "latents", "diffusion", "evaluation", "samples"])
def test_a_missing_stage_leaves_its_section_out(run_root: Path, missing: str) -> None:
    (run_root / missing).rename(run_root.parent / "elsewhere")
    page = Page(write_report(run_root).read_text())
    sections = {"vae": "autoencoder", "diffusion": "diffusion", "evaluation": "measured", "samples": "samples"}
    if missing in sections:
        assert sections[missing] not in page.ids
    assert f"ldm-vae {missing}" not in page.text
    assert "commands" in page.ids


def test_an_unfinished_stage_is_shown_without_its_time(run_root: Path) -> None:
    record = json.loads((run_root / "diffusion" / "run.json").read_text())
    (run_root / "diffusion" / "run.json").write_text(json.dumps(record | {"finished": False}))
    page = Page(write_report(run_root).read_text())
    assert "diffusion" in page.ids
    assert "ldm-vae diffusion" not in page.text


def test_unlabelled_samples_are_one_group(run_root: Path) -> None:
    for path in (run_root / "samples").glob("*.png"):
        path.rename(path.with_name(path.name[:4] + ".png"))
    page = Page(write_report(run_root).read_text())
    assert len(page.images) == 6 + 5 + 6
    assert "of each class" not in page.text


def test_the_command_writes_elsewhere_without_leaving_a_record(run_root: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(run_root), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    assert not (tmp_path / "run.json").exists()
    assert cli.main(["report", str(run_root)]) == 0
    assert json.loads((run_root / "run.json").read_text())["finished"] is True


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match="no stage has finished"):
        write_report(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("0003_red-ball_1.png", "red ball"),
        ("red_ball-12.png", "red ball"),
        ("star.png", "star"),
        ("00012.png", ""),
        ("red-ball/0003.png", "red ball"),
    ],
)
def test_labels_are_read_from_names(tmp_path: Path, name: str, label: str) -> None:
    save_picture(tmp_path / name)
    assert image_label(tmp_path / name, tmp_path) == label


def test_a_label_written_into_the_picture_is_preferred(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt("parameters", json.dumps({"label": "T-shirt, näve"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "0001_t-shirt.png", pnginfo=info)
    assert image_label(tmp_path / "0001_t-shirt.png", tmp_path) == "T-shirt, näve"


def test_quantities_are_written_for_people() -> None:
    assert [duration(s) for s in (3.21, 48.4, 200, 7500)] == ["3.2 s", "48 s", "3 min 20 s", "2 h 05 min"]
    assert [quantity(n) for n in (950, 2000, 2_660_000)] == ["950", "2,000", "2.7 million"]
