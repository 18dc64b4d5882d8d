"""Files of somebody who means harm: what they hold is never run, leads nowhere, and takes no memory by its word."""

# ruff: noqa: F811 - fixtures of other folders are asked for by their names

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm_vae import config, files
from ldm_vae.autoencoder.interop.compvis import open_autoencoder, read_settings
from ldm_vae.autoencoder.losses import LPIPS
from ldm_vae.autoencoder.models import load_autoencoder
from ldm_vae.autoencoder.train_config import TrainVaeConfig
from ldm_vae.data.decoding import ImageRejected
from ldm_vae.data.folder import FolderSource
from ldm_vae.data.sources import DatasetsConfig
from ldm_vae.diffusion.fid import load_inception
from ldm_vae.diffusion.generation import image_name
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline
from ldm_vae.diffusion.posthoc_ema import stored_averages
from ldm_vae.errors import DamagedFile, UserError
from ldm_vae.evaluation.study import read_config_yaml, read_json
from ldm_vae.latents.dataset import LatentDataset
from ldm_vae.latents.format import index_files, read_manifest
from ldm_vae.latents.import_lightningdit import read_statistics
from ldm_vae.storage import open_folder
from ldm_vae.training import checkpoint
from tests.data.encoded import encode as encode_image
from tests.data.encoded import picture
from tests.diffusion.conftest import saved  # noqa: F401
from tests.latents.conftest import autoencoder_directory, encode, latents, settings  # noqa: F401

CRAFTED = (
    "..", "../outside.png", "../../outside.png", "a/../../outside.png", "./../outside.png", "/etc/passwd",
    "/proc/self/environ", "/dev/zero", "/dev/stdin", "//etc/passwd", "..\\outside.png", "C:\\outside.png",
    "\\\\host\\share", "a\0.png", "../outside.png\0.png", "%2e%2e/outside.png", "%2e%2e%2foutside.png",
    "..%2foutside.png", "....//outside.png", "..;/outside.png", "~/outside.png", "~root/outside.png",
    "file:///etc/passwd", "http://127.0.0.1:9/x", "a//../..//outside.png", "\u2024\u2024/outside.png",
    "\uff0e\uff0e/outside.png", "link.png", "linked/outside.png", "CON", "nul.png", ".", "", "*", "a\n../outside.png",
)  # fmt: skip


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def planted(path: Path, canary: Path) -> Path:
    """A pickle at `path` that makes the folder `canary`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Canary(canary)))
    return path


def planted_checkpoint(path: Path, canary: Path) -> Path:
    """The same as torch writes it, with a tensor beside it."""
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}, "callbacks": Canary(canary)}, path)
    return path


def planted_module(path: Path, canary: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import os\nos.mkdir({str(canary)!r})\n\nclass Evil:\n    pass\n")
    return path


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_with(path: Path, latents: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a set in which a writer who can compute every checksum has changed something."""
    shutil.copytree(latents, path)
    change(path)
    return path


def signed(folder: Path, **values: Any) -> None:
    """Change the manifest, its digest included."""
    manifest = json.loads((folder / "manifest.json").read_text()) | values
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"digest": config.digest(manifest)}))


Place = Callable[[Path, Path, Path, Path, Path], object]
"""(folder, canary, a sound autoencoder, a sound set, a sound pipeline) -> something that was read after planting."""


def in_a_model(plant: Callable[[Path, Path], object]) -> Place:
    def read(folder: Path, canary: Path, model: Path, *_: Path) -> object:
        shutil.copytree(model, folder / "model")
        plant(folder / "model", canary)
        return load_autoencoder(folder / "model")

    return read


def in_a_pipeline(plant: Callable[[Path, Path], object]) -> Place:
    def read(folder: Path, canary: Path, model: Path, latents: Path, pipeline: Path) -> object:
        shutil.copytree(pipeline, folder / "pipeline")
        (folder / "pipeline" / files.MANIFEST).unlink()
        plant(folder / "pipeline", canary)
        return LatentDiffusionPipeline.from_pretrained(folder / "pipeline", use_safetensors=True)

    return read


def in_a_set(name: str) -> Place:
    def read(folder: Path, canary: Path, model: Path, latents: Path, pipeline: Path) -> object:
        dataset = LatentDataset(
            set_with(folder / "set", latents, lambda path: planted(path / name, canary)), verify=False
        )
        return dataset[0], dataset.id(0)

    return read


def all_files_beside(folder: Path, canary: Path) -> None:
    """Everything that some loader of the world takes for weights or code, beside the sound files."""
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "model.pt", "optimizer.pkl"):
        planted(folder / name, canary)
    for name in ("pipeline.py", "modeling_evil.py", "autoencoder.py", "__init__.py"):
        planted_module(folder / name, canary)
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_evil.Evil"}, _module="modeling_evil")


def only_a_pickle(folder: Path, canary: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    planted(folder / "diffusion_pytorch_model.bin", canary)


def pipeline_code(folder: Path, canary: Path) -> None:
    planted_module(folder / "pipeline.py", canary)
    edit_json(folder / "model_index.json", _class_name=["pipeline", "Evil"])


def component_code(folder: Path, canary: Path) -> None:
    planted_module(folder / "unet" / "evil.py", canary)
    edit_json(folder / "model_index.json", unet=["evil", "Evil"])


def component_of_the_system(folder: Path, canary: Path) -> None:
    edit_json(folder / "model_index.json", unet=["subprocess", "Popen"], scheduler=["os", "mkdir"])


def in_a_checkpoint(folder: Path, canary: Path, *_: Path) -> object:
    step = folder / "step-000000001"
    for name in ("net.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"):
        planted(step / name, canary)
    (step / "state.json").write_text('{"step": 1}')
    files.write_checksums(step)
    path, _ = checkpoint.newest(folder)
    assert path is not None
    return checkpoint.read_checkpoint(path)


def in_the_state_of_a_checkpoint(folder: Path, canary: Path, *_: Path) -> object:
    planted(folder / "step-000000001" / "state.json", canary)
    files.write_checksums(folder / "step-000000001")
    return checkpoint.read_checkpoint(folder / "step-000000001")


def in_the_index(folder: Path, canary: Path, model: Path, latents: Path, pipeline: Path) -> object:
    def change(path: Path) -> None:
        data = planted(path / "evil", canary).read_bytes()
        checksum = files.checksum_bytes(data)
        name = f"index-000000-{checksum.split(':')[1][:16]}.safetensors"
        (path / "evil").rename(path / name)
        signed(path, index=[{"file": name, "shards": 6, "checksum": checksum}])

    return LatentDataset(set_with(folder / "set", latents, change))[0]


def in_an_archive(folder: Path, canary: Path, *_: Path) -> object:
    """A tar of samples, one of whose fields is a pickle under every suffix that some reader unpickles."""
    from ldm_vae.data.hf_datasets import load_rows

    data = pickle.dumps(Canary(canary))
    with tarfile.open(folder / "rows.tar", "w") as archive:
        for suffix, content in {"png": encode_image(picture()), "pyd": data, "pickle": data, "pkl": data}.items():
            member = tarfile.TarInfo(f"000.{suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    rows = load_rows(DatasetsConfig(str(folder / "rows.tar"), image_column="png", streaming=True))
    return [row["png"] for row in rows]


def in_the_schema_of_a_table(folder: Path, canary: Path, *_: Path) -> object:
    """pyarrow once unpickled the metadata of this kind of column when it opened the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ldm_vae.data.hf_datasets import load_rows

    kind = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    field = pa.field("image", pa.binary(), metadata=kind | {b"ARROW:extension:metadata": pickle.dumps(Canary(canary))})
    table = pa.table([pa.array([encode_image(picture())], pa.binary())], schema=pa.schema([field]))
    pq.write_table(table, folder / "rows.parquet")
    return [row["image"] for row in load_rows(DatasetsConfig(str(folder / "rows.parquet"), streaming=True))]


def in_a_dataset_script(folder: Path, canary: Path, *_: Path) -> object:
    from ldm_vae.data.hf_datasets import load_rows

    (folder / "data").mkdir()
    (folder / "data" / "000.png").write_bytes(encode_image(picture()))
    planted_module(folder / "data" / "data.py", canary)
    return load_rows(DatasetsConfig(str(folder / "data"), streaming=True))


def in_an_image(folder: Path, canary: Path, *_: Path) -> object:
    planted(folder / "a.png", canary)
    return FolderSource(folder).read(0)


def in_settings(read: Callable[[Path], object]) -> Place:
    def plant(folder: Path, canary: Path, *_: Path) -> object:
        path = folder / "a.yaml"
        path.write_text(f"model: !!python/object/apply:os.mkdir [{str(canary)!r}]\n")
        return read(path)

    return plant


PLACES: dict[str, Place] = {
    **{
        f"a checkpoint file {suffix}": lambda d, c, *_, s=suffix: open_autoencoder(planted_checkpoint(d / f"m{s}", c))
        for suffix in (".ckpt", ".pt", ".pth", ".bin")
    },
    "a plain pickle .ckpt": lambda d, c, *_: open_autoencoder(planted(d / "m.ckpt", c)),
    "a pickle called .safetensors": lambda d, c, *_: open_autoencoder(planted(d / "m.safetensors", c)),
    "files beside a model": in_a_model(all_files_beside),
    "a model with a pickle only": in_a_model(only_a_pickle),
    "the class of a model": in_a_model(lambda d, c: edit_json(d / "config.json", _class_name="os.mkdir")),
    "the class of a pipeline": in_a_pipeline(pipeline_code),
    "code of a component": in_a_pipeline(component_code),
    "a component of the system": in_a_pipeline(component_of_the_system),
    "files of a checkpoint": in_a_checkpoint,
    "the state of a checkpoint": in_the_state_of_a_checkpoint,
    "a stored average": lambda d, c, *_: stored_averages(planted(d / "step-000000001.safetensors", c).parent),
    **{
        f"{name} of a set": in_a_set(name)
        for name in ("shard-000000.safetensors", "shard-000000.jsonl", "manifest.json")
    },
    "the index of a set": in_the_index,
    "latents_stats.pt": lambda d, c, *_: read_statistics(planted(d / "latents_stats.pt", c).parent, 3),
    "weights of Inception": lambda d, c, *_: load_inception(str(planted_checkpoint(d / "inception.pth", c))),
    "weights of LPIPS": lambda d, c, *_: LPIPS("squeeze", str(planted(d / "w.safetensors", c))),
    "settings": in_settings(lambda path: config.load(TrainVaeConfig, path)),
    "settings of a run": in_settings(read_config_yaml),
    "settings of LDM": in_settings(read_settings),
    "a record": lambda d, c, *_: read_json(planted(d / "run.json", c)),
    "an archive of samples": in_an_archive,
    "the schema of a table": in_the_schema_of_a_table,
    "the script of a dataset": in_a_dataset_script,
    "an image": in_an_image,
}


OF_DIFFUSERS = ("the class of a pipeline", "code of a component", "a component of the system")
"""Places that diffusers refuses in its own words."""


@pytest.mark.promise(9)
def test_nothing_planted_is_run(tmp_path, autoencoder_directory, latents, saved, record_property):
    refused = []
    for number, (name, read) in enumerate(PLACES.items()):
        folder, canary = tmp_path / str(number), tmp_path / f"canary-{number}"
        folder.mkdir()
        try:
            read(folder, canary, autoencoder_directory, latents, saved)
        except (UserError, ImageRejected):
            refused.append(name)
        except (ValueError, AttributeError, OSError):
            if name not in OF_DIFFUSERS:
                raise
            refused.append(name)
        assert not canary.exists(), f"{name} was run"
    assert len(PLACES) - len(refused) <= 6, set(PLACES) - set(refused)  # the rest is read past the planted file
    record_property("figure", f"canaries in {len(PLACES)} places: 0 executed, {len(refused)} refused")


def test_the_canaries_sing(tmp_path):
    pickle.loads(planted(tmp_path / "a", tmp_path / "first").read_bytes())
    torch.load(planted_checkpoint(tmp_path / "b.pt", tmp_path / "second"), weights_only=False)
    code = planted_module(tmp_path / "c.py", tmp_path / "third").read_text()
    exec(compile(code, "c.py", "exec"), {})
    assert all((tmp_path / name).is_dir() for name in ("first", "second", "third"))


@contextmanager
def watched() -> Iterator[list[str]]:
    """The paths that this process opens inside."""
    WATCHERS.append(opened := [])
    try:
        yield opened
    finally:
        WATCHERS.remove(opened)


WATCHERS: list[list[str]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        for opened in WATCHERS:
            opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture
def crafted(tmp_path) -> Path:
    """A folder with an image, and beside it files that nothing in it may lead to."""
    folder = tmp_path / "inside"
    folder.mkdir()
    for path in (folder / "image.png", tmp_path / "outside.png"):
        path.write_bytes(encode_image(picture()))
    return folder


def escapes(opened: list[str], folder: Path) -> list[str]:
    """Opened files that are not in the folder, of those that the crafted names could mean."""
    forbidden = ("/etc/passwd", "/proc/self/environ", "/dev/zero", "/dev/stdin")
    paths = {os.path.realpath(path) for path in opened if not path.startswith("/proc/self/fd")}
    return sorted(
        path for path in paths if path in forbidden or ("outside" in path and not path.startswith(f"{folder}/"))
    )


@pytest.mark.promise(9)
def test_no_crafted_name_leads_out_of_a_folder(crafted, latents, saved, record_property):
    outside = crafted.parent / "outside.png"
    tried = 0
    with watched() as opened:
        for name in CRAFTED:
            for read in (labels_csv, metadata_jsonl, names_in_a_folder, names_in_a_set, sealed_names, archive_names):
                shutil.rmtree(crafted.parent / "place", ignore_errors=True)
                place = shutil.copytree(crafted, crafted.parent / "place" / "inner", symlinks=True)
                with suppress(UserError):
                    read(place, name, latents)
                tried += 1
    assert escapes(opened, place) == []
    assert [path.name for path in place.parent.iterdir()] == ["inner"]
    assert len([path for path in opened if path.endswith("image.png")]) > 0  # the watcher sees
    assert files.checksum(outside) == files.checksum(crafted / "image.png")
    assert sorted(path.name for path in crafted.parent.iterdir()) == ["inside", "outside.png", "place"]
    record_property("figure", f"{len(CRAFTED)} crafted names in 6 places: 0 of {tried} led out of the folder")


def labels_csv(folder: Path, name: str, latents: Path) -> None:
    quoted = name.replace('"', '""')
    (folder / "labels.csv").write_text(f'file,label\nimage.png,a\n"{quoted}",b\n')
    read_all(folder)


def metadata_jsonl(folder: Path, name: str, latents: Path) -> None:
    rows = [{"file_name": "image.png", "label": "a"}, {"file_name": name, "label": "b"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read_all(folder)


def read_all(folder: Path) -> None:
    source = FolderSource(folder)
    assert source.names == ["image.png"]
    source.read(0)


def names_in_a_folder(folder: Path, name: str, latents: Path) -> None:
    for read in (lambda f: f.read(name), lambda f: f.local(name, ""), lambda f: f.checksum(name)):
        with suppress(UserError, FileNotFoundError):
            read(open_folder(folder))
    open_folder(folder).write(name, b"x")


def names_in_a_set(folder: Path, name: str, latents: Path) -> None:
    shutil.copytree(latents, folder / "set")
    signed(folder / "set", index=[{"file": name, "shards": 6, "checksum": "xxh3_128:0"}])
    with pytest.raises(UserError, match="not the name of an index file"):
        read_manifest(folder / "set").shard_index  # noqa: B018


def sealed_names(folder: Path, name: str, latents: Path) -> None:
    manifest = {"format_version": files.FORMAT_VERSION, "files": {name: "xxh3_128:0"}}
    (folder / files.MANIFEST).write_text(files.readable_json(manifest))
    with pytest.raises(DamagedFile):
        files.verify_checksums(folder)


def archive_names(folder: Path, name: str, latents: Path) -> None:
    """Members are read where they lie, and nothing is unpacked; links in the archive are no samples."""
    from ldm_vae.data.streaming import _samples

    with tarfile.open(folder / "rows.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        archive.addfile(member, io.BytesIO(b""))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("000.png")
            member.type, member.linkname = kind, name
            archive.addfile(member)
    with open(folder / "rows.tar", "rb") as file:
        for key, _, members in _samples(file, 0):
            assert key != "000"
            list(members)


@pytest.mark.parametrize("name", CRAFTED)
def test_a_class_with_a_crafted_name_gives_a_file_in_the_folder(name):
    assert "/" not in image_name(0, name)
    assert image_name(0, name).startswith("0000")


def test_weights_elsewhere_are_not_read(autoencoder_directory, saved, tmp_path):
    shutil.copytree(autoencoder_directory, tmp_path / "elsewhere")
    shutil.copytree(autoencoder_directory, tmp_path / "model")
    (tmp_path / "model" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "../elsewhere/diffusion_pytorch_model.safetensors"}}
    (tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        load_autoencoder(tmp_path / "model")
    shutil.copytree(saved, tmp_path / "pipeline")
    (tmp_path / "pipeline" / files.MANIFEST).unlink()
    edit_json(tmp_path / "pipeline" / "model_index.json", **{"../elsewhere": ["diffusers", "AutoencoderKL"]})
    with watched() as opened, suppress(Exception):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=True)
    assert [path for path in opened if "/elsewhere/" in path and path.endswith(".safetensors")] == []


def yaml_bombs() -> dict[str, str]:
    letters = "abcdefghij"
    lists = [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise(letters)]
    merges = [f"{new}: &{new}\n  <<: [{', '.join([f'*{old}'] * 9)}]\n  {new}{new}: 1" for old, new in pairwise(letters)]
    return {
        "tag": "output: !!python/object/apply:os.system [x]",
        "tag of a class": "output: !!python/name:os.system",
        "billion laughs": "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *lists]),
        "merge keys": "\n".join(["a: &a {k: 1, l: 2}", *merges]),
        "a list in itself": "output: &a [*a]",
        "many values": "output:\n" + "- x\n" * 250_000,
        "deep lists": "output: " + "[" * 200_000,
        "deep mappings": "".join(" " * depth + "a:\n" for depth in range(900)),
        "a long number": "steps: " + "9" * 900_000,
        "a number in base 60": "steps: 1" + ":59" * 300_000,
        "a large file": "output: " + "x" * (2 << 20),
        "duplicate key": "output: a\noutput: b",
        "references": "output: " + "${data.path}" * 1000,
        "two documents": "output: a\n---\noutput: b",
        "control characters": "output: \0",
        "a list": "- output",
        "a number": "7",
        "a key that is a list": "? [a, b]\n: 1",
    }


@pytest.mark.promise(9)
def test_yaml_bombs_are_refused_at_once(tmp_path, record_property):
    import time

    bombs, slowest = yaml_bombs(), 0.0
    for name, text in bombs.items():
        (tmp_path / "a.yaml").write_text(text)
        started = time.process_time()
        with pytest.raises(UserError):
            config.load(TrainVaeConfig, tmp_path / "a.yaml")
        slowest = max(slowest, time.process_time() - started)
        assert time.process_time() - started < 10, name  # of the processor: unguarded, several take a minute or more
    record_property("figure", f"{len(bombs)} YAML bombs refused, the slowest in {slowest:.1f} s of processor time")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def header_of(tensors: int) -> bytes:
    entries = (f'"tensor_{i:012d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(tensors))
    header = ("{" + ",".join(entries) + "}").encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.promise(9)
@pytest.mark.parametrize("tensors", [150_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_large_safetensors_header_takes_neither_memory_nor_time(tensors, tmp_path, latents, record_property):
    import time

    path = tmp_path / "many.safetensors"
    path.write_bytes(header_of(tensors))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    shutil.copy(path, tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    shutil.copy(path, tmp_path / "step-000000001.safetensors")
    set_with(tmp_path / "set", latents, lambda folder: shutil.copy(path, folder / "shard-000000.safetensors"))
    before, started = peak_megabytes(), time.process_time()
    for read in (
        lambda: open_autoencoder(path),
        lambda: load_autoencoder(tmp_path / "model"),
        lambda: stored_averages(tmp_path),
        lambda: LPIPS("squeeze", str(path)),
        lambda: load_inception(str(path)),
        lambda: LatentDataset(tmp_path / "set", verify=False)[0],
    ):
        with pytest.raises(UserError):
            read()
    seconds, megabytes = time.process_time() - started, peak_megabytes() - before
    assert seconds < 10
    assert megabytes < 500
    figure = f"a safetensors header of {path.stat().st_size / 1e6:.0f} MB with {tensors:,} tensors, read in 6 places"
    record_property("figure", f"{figure}: {seconds:.1f} s, {megabytes:.0f} MB more")


def test_the_limit_of_tensors_holds_where_the_header_is_small_enough(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(header_of(30_000))
    with pytest.raises(UserError, match="holds 30000 tensors"):
        open_autoencoder(tmp_path / "a.safetensors")


@pytest.mark.promise(9)
def test_a_description_of_a_huge_model_takes_no_memory(autoencoder_directory, tmp_path, record_property):
    changes: list[dict[str, Any]] = [
        {"encoder_channels": [200_000, 400_000]},
        {"decoder_blocks": [10**9, 0, 0, 0]},
        {"latent_channels": 10**9},
        {"_class_name": "AutoencoderKL", "block_out_channels": [320_000, 640_000], "layers_per_block": 2},
    ]
    before = peak_megabytes()
    for number, change in enumerate(changes):
        shutil.copytree(autoencoder_directory, tmp_path / str(number))
        edit_json(tmp_path / str(number) / "config.json", **change)
        with pytest.raises(UserError, match=r"config\.json: describes|cannot be loaded"):
            load_autoencoder(tmp_path / str(number))
    narrow = {"encoder.conv_in.weight": torch.zeros(1, 3, 3, 3).expand(10**7, 3, 3, 3)}
    torch.save(narrow, tmp_path / "repeated.ckpt")
    with pytest.raises(UserError, match="a shape without the numbers for it"):
        open_autoencoder(tmp_path / "repeated.ckpt")
    with zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("packed/data.pkl", bytes(50_000_000))
    with pytest.raises(UserError, match="unpacks to 50000000 bytes"):
        open_autoencoder(tmp_path / "packed.ckpt")
    megabytes = peak_megabytes() - before
    assert megabytes < 500
    record_property("figure", f"{len(changes) + 2} files that ask for up to terabytes refused with {megabytes:.0f} MB")


def test_a_large_description_is_not_parsed(autoencoder_directory, tmp_path):
    shutil.copytree(autoencoder_directory, tmp_path / "model")
    with open(tmp_path / "model" / "config.json", "a") as file:
        file.write(" " * (17 << 20))
    with pytest.raises(UserError, match="give the configuration of a model"):
        load_autoencoder(tmp_path / "model")


def test_a_header_of_the_index_is_judged_too(latents, tmp_path):
    def change(path: Path) -> None:
        data = header_of(30_000)
        checksum = files.checksum_bytes(data)
        name = f"index-000000-{checksum.split(':')[1][:16]}.safetensors"
        (path / name).write_bytes(data)
        signed(path, index=[{"file": name, "shards": 6, "checksum": checksum}])

    with pytest.raises(UserError, match="holds 30000 tensors"):
        LatentDataset(set_with(tmp_path / "set", latents, change))
    assert index_files(read_manifest(latents).shard_index)[0][1]  # the sound one passes


def test_a_sound_file_of_many_tensors_passes(tmp_path):
    save_file({f"tensor_{i}": torch.zeros(1) for i in range(3000)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no CompVis autoencoder"):
        open_autoencoder(tmp_path / "a.safetensors")
