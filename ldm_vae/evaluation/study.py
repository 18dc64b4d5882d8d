"""The frame of every command that measures something and leaves a result folder.

A `Study` owns what all of them have in common: the lock of the folder, recognizing a finished result, the fingerprints
of its inputs, publishing (JSON, Markdown, page, pictures, run record) and what is printed at the end. A subclass says
what is measured and how it is shown:

    class Sizes(Study):
        def measure(self): return {"bytes": ...}
        def markdown(self, results): return f"{results['bytes']} bytes"

    Sizes(config, autoencoder).run()
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from ldm_vae import config as configuration
from ldm_vae import provenance
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.data.folder import report_newer_images
from ldm_vae.data.samples import Enlarged, enlarged_record, enlarged_sentences
from ldm_vae.data.sources import ImageSource
from ldm_vae.data.survey import look_at
from ldm_vae.errors import UserError
from ldm_vae.files import (
    system_errors_explained,
    vanished,
    write_atomically,
    write_bytes,
    write_json,
    write_png,
    write_text,
)
from ldm_vae.paths import check_writable
from ldm_vae.storage import open_folder
from ldm_vae.training.distributed import Processes, run_on_main
from ldm_vae.utils.progress import begin, end, end_dry_run, open_page, say
from ldm_vae.utils.text import duration_text

MAY_CHANGE = ("output", "batch", "device", "processes")
"""Settings that do not change a result."""

PAGE = "index.html"
GIVEN = "given"
"""In the place of a `data.split.Part`, in results of images that were named one by one."""

Results = dict[str, Any]
"""The content of a study's JSON file."""

Content = str | bytes | Image.Image | Callable[[Path], object]
"""The content of a file: text, bytes, a picture (written as PNG), or a function that writes it to a path."""


@dataclass(frozen=True)
class StudyPlan:
    """What a study will do with what.

    Attributes:
        what: the parts of the first line.
        source, indices, resolution: the images and the side of their crops, of which a dry run reads some.
    """

    what: tuple[str, ...]
    source: ImageSource | None = None
    indices: Sequence[int] = ()
    resolution: int | None = None


class Study:
    """One measurement and its result folder. `run` goes through the same steps for every study:

    1. `load`: a finished result of the same settings, weights and inputs is returned and not measured again.
    2. `prepare`: open the data, refuse what cannot be measured. Nothing has been written so far.
    3. `collect` on every process, then `measure` on the main one, under the lock of the folder.
    4. `files`, `markdown` and `page`: how it is shown.
    5. `commit`: `run.json` is removed first and written last, so that a folder that has one is complete.

    Args:
        config: the settings; they are part of the result.
        autoencoder: what is measured; None for a study of something else.
        output: the folder; `config.output` when left out.
        overwrite: replace a result of other settings.
        processes: of a study that several processes share.
    """

    results_file: ClassVar[str] = "results.json"
    markdown_file: ClassVar[str] = "results.md"
    format_version: ClassVar[int] = 1
    """Version of the results, incremented when a figure is computed in another way."""
    marker: ClassVar[str] = provenance.RUN_LOCK
    """See `publishing`."""
    command: ClassVar[str] = "study"
    """The `ldm-vae` command, for its first line."""
    product: ClassVar[str] = "the results"
    """What it makes, for its last line."""
    replaced: ClassVar[tuple[str, ...]] = ()
    """Patterns of files that an earlier result may have more of."""

    def __init__(
        self,
        config: Any,
        autoencoder: Autoencoder | None = None,
        output: str | Path | None = None,
        *,
        overwrite: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.started, self.dry_run = time.time(), False
        self.config, self.overwrite = configuration.plain_settings(config), overwrite
        self._autoencoder = autoencoder
        self.output = Path(config.output if output is None else output)
        self.processes = processes or Processes()
        self.enlarged: Enlarged = []
        """Images that were smaller than their crop, found while measuring. They are part of the results."""

    # What a study defines.

    def inputs(self, results: Results) -> Mapping[str, tuple[Any, Any]]:
        """What a result was made of beside settings and autoencoder: "other images" -> what a finished result has
        recorded, what is there now."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The settings as a result records them."""
        return configuration.to_dict(self.config)

    def prepare(self) -> None:
        """Open what is measured. Raises: UserError for what cannot be measured."""

    def work(self) -> StudyPlan:
        """What will be done with what; after `prepare`."""
        return StudyPlan(())

    def then(self, results: Results) -> list[str]:
        """The words of the next command to type, its program first; none opens the page."""
        return []

    def collect(self) -> None:
        """The part of the work that all processes share, and that keeps what it finds in `self`."""

    def measure(self) -> Results:
        """The study's own part of the results, on the main process; `run` adds format, autoencoder and settings."""
        raise NotImplementedError

    def files(self, results: Results) -> Mapping[str, Content]:
        """Name -> content of further files, as pictures; the name may have folders."""
        return {}

    def markdown(self, results: Results) -> str | None:
        """The text of `results.md`; None for a study without one."""
        return None

    def page(self, results: Results) -> str | None:
        """The text of `index.html`; None for a study without one."""
        return None

    def record(self, results: Results) -> dict[str, Any]:
        """What `run.json` says beside command, time and versions."""
        return {}

    def summary(self, results: Results) -> str:
        """What is printed before the last line, of a new result and of one that was finished already."""
        return self.markdown(results) or ""

    def preview(self, work: StudyPlan) -> None:
        """What `--dry-run` prints after the first line: images that are not as they should be, and the time."""
        seconds = 0.0
        if work.source is not None and work.resolution is not None:
            look = look_at(work.source, work.indices, work.resolution)
            for line in look.lines():
                say(line)
            seconds = len(work.indices) * (look.seconds + self.seconds_of_pass(work.resolution))
        end_dry_run(
            self.output,
            f"reading, encoding and decoding each image once takes about {duration_text(seconds)}, the time of the "
            "rest was not measured"
            if seconds
            else "the time it takes was not measured",
        )

    def seconds_of_pass(self, resolution: int) -> float:
        """Time of encoding and decoding an image, measured on noise."""
        if self._autoencoder is None:
            return 0.0
        autoencoder, started = self._autoencoder, 0.0
        noise = torch.rand((1, 3, resolution, resolution), device=autoencoder.device) * 2 - 1
        with torch.no_grad():
            for _ in range(2):  # the first pass also prepares kernels
                started = time.perf_counter()
                autoencoder.reconstruct(noise).cpu()  # waits for a GPU
        return time.perf_counter() - started

    # What every study does.

    def run(self, dry_run: bool = False) -> Results:
        """Measure, write the folder, print the summary, return the content of the JSON file.

        Args:
            dry_run: stop before anything is measured or written, and return a finished result or {}.

        Raises:
            UserError: the folder holds something else, or a result of other settings, weights or inputs and not
                `overwrite`; or what the study itself refuses.
        """
        self.dry_run = dry_run
        results = run_on_main(self.processes, self.load)
        if results is not None:
            begin(self.command, f"{self.output} holds the finished result of these settings; nothing is measured again")
            report_newer_images(getattr(self.config, "data", None), self.output / self.results_file)
        else:
            self.prepare()
            work = self.work()
            begin(self.command, *work.what, f"to {self.output}")
            if dry_run:
                run_on_main(self.processes, lambda: self.preview(work))
                return {}
            with contextlib.ExitStack() as stack:
                run_on_main(self.processes, lambda: stack.enter_context(self.lock()))  # only this process writes
                self.collect()
                results = run_on_main(self.processes, self._measure_and_commit)
        if self.processes.is_main_process:
            say("\n".join([self.summary(results), *enlarged_lines(results)]).strip("\n"))
            page, spent = self.output / PAGE, duration_text(time.time() - self.started)
            place = page if page.is_file() else self.output
            end(place, f"{self.product}, in {spent}", self.then(results) or open_page(place))
        return results

    def load(self) -> Results | None:
        """The finished result of these settings, weights and inputs; None where there is work to do.

        Raises:
            UserError: the folder holds something else, or a result of other settings, weights or inputs and not
                `overwrite`; or there is work to do and no file can be written there.
        """
        file = self.output / self.results_file
        if not (self.output / provenance.RUN_RECORD).is_file():
            check_writable(self.output)
            return None
        if not file.is_file():
            raise UserError(f"{self.output}: holds another run; give another output")
        if self.overwrite:
            check_writable(self.output)
            return None
        results: Results = read_json(file)
        if not isinstance(results.get("config"), dict):
            raise UserError(file, "is damaged: it names no settings", "restore it, or measure again with --overwrite")
        if results.get("format_version", 1) != self.format_version:
            raise UserError(
                f"{self.output}: holds the result of another version of ldm_vae, whose figures are computed "
                "differently; give another output, or --overwrite"
            )
        changes = configuration.changed_keys(results["config"], self.settings())
        changes = {key: values for key, values in changes.items() if key not in MAY_CHANGE}
        before, now = results["autoencoder"]["fingerprint"], self.described["fingerprint"]
        if before != now:
            changes["autoencoder fingerprint"] = (before[:15], now[:15])
        if changes:
            listed = configuration.describe_changes(changes)
            raise UserError(f"{self.output}: holds the result of {listed}; give another output, or --overwrite")
        for other, (recorded, present) in self.inputs(results).items():
            if recorded != present:
                raise UserError(f"{self.output}: holds the result of {other}; give another output, or --overwrite")
        return results

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Lock the folder against other measurements and trainings. Raises: UserError that names the other process."""
        return locked_folder(self.output)

    def commit(self, results: Results) -> None:
        """Write the result, under the `lock`; `run.json` goes first and comes last.

        Raises:
            UserError: the system refuses to write, or the folder has vanished.
        """
        text = self.markdown(results)
        if text is not None:
            text += "".join(f"\n{line}\n" for line in enlarged_lines(results))
        files = {**self.files(results), self.markdown_file: text, PAGE: self.page(results)}
        with publishing(self.output, self.marker):
            for old in (file for pattern in self.replaced for file in self.output.glob(pattern)):
                old.unlink()
            for name, content in files.items():
                if content is not None:
                    _write(self.output / name, content)
            write_json(self.output / self.results_file, results)
            seconds = time.time() - self.started
            provenance.write_run_record(self.output, None, self.started, seconds, **self.record(results))

    @property
    def autoencoder(self) -> Autoencoder:
        """What is measured, of a study of an autoencoder."""
        assert self._autoencoder is not None
        return self._autoencoder

    @cached_property
    def described(self) -> dict[str, Any]:
        """What is measured, as `describe_autoencoder` says it."""
        return describe_autoencoder(self.autoencoder)

    def _measure_and_commit(self) -> Results:
        measured = self.measure()
        described = {} if self._autoencoder is None else {"autoencoder": self.described}
        measured |= enlarged_record(self.enlarged)
        results = {"format_version": self.format_version, **described, **measured, "config": self.settings()}
        self.commit(results)
        return results


def _write(path: Path, content: Content) -> None:
    if isinstance(content, str):
        write_text(path, content)
    elif isinstance(content, bytes):
        write_bytes(path, content)
    elif isinstance(content, Image.Image):
        write_png(path, content)
    else:
        write_atomically(path, content)


def rejected_images(rejected: list[tuple[str, str]]) -> list[dict[str, str]]:
    """The images that could not be read, (id, reason), as results have them."""
    return [{"id": name, "reason": reason} for name, reason in rejected]


def enlarged_lines(results: Results) -> list[str]:
    """What has to be said of a result with images that were smaller than their crop; none where there were none."""
    short_sides = [image["short_side"] for image in results.get("enlarged", [])]
    return enlarged_sentences(short_sides, results["protocol"]["images"]["count"]) if short_sides else []


def check_not_enlarged(path: Path, results: Results) -> None:
    """Raises: UserError for the results in a file that are of enlarged images, and so better than the model is."""
    for line in enlarged_lines(results):
        raise UserError(path, line.rstrip("."), "give results without such images")


@contextlib.contextmanager
def locked_folder(output: str | Path) -> Iterator[None]:
    """Lock the folder against other measurements and trainings. Raises: UserError that names the other process."""
    with open_folder(Path(output)).lock(provenance.RUN_LOCK):
        yield


@contextlib.contextmanager
def publishing(output: str | Path, marker: str = provenance.RUN_LOCK) -> Iterator[None]:
    """Inside, a result is written, under the lock. `run.json` goes first and comes last: a folder that has one is
    complete, also after a result was to be replaced.

    Args:
        marker: a file that is in the folder while this process works there; without it the disk is gone.

    Raises:
        UserError: the system refuses to write, or the folder has vanished.
    """
    folder = Path(output)
    with system_errors_explained(output, "free some space or make it writable, and run the same command again"):
        if not (folder / marker).exists():
            raise vanished()
        (folder / provenance.RUN_RECORD).unlink(missing_ok=True)
        yield


def check_resolution(resolution: int, autoencoder: Autoencoder, stride: int = 1) -> None:
    """Raises: UserError naming the nearest resolution that the downsampling and `stride` divide, or the only one."""
    autoencoder.check_side("resolution:", resolution)
    factor = math.lcm(autoencoder.downsampling, stride)
    if resolution % factor:
        nearest = max(1, round(resolution / factor)) * factor
        raise UserError(f"resolution: {resolution} is not a multiple of {factor}; use {nearest}")


def describe_autoencoder(autoencoder: Autoencoder) -> dict[str, Any]:
    """What was measured: identity, class, parameters, channels, downsampling, whether its latents are points."""
    return {
        "fingerprint": autoencoder.fingerprint(),
        "class": type(autoencoder).__name__,
        "parameters": sum(parameter.numel() for parameter in autoencoder.parameters()),
        "latent_channels": autoencoder.latent_channels,
        "downsampling": autoencoder.downsampling,
        "deterministic": autoencoder.deterministic,
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file. Raises: UserError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); restore it, or run its stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a record of a run; restore it, or run its stage again")
    return value


def read_config_yaml(path: Path) -> dict[str, Any]:
    """A run's config.yaml; empty where there is none. Raises: UserError when it is damaged."""
    return configuration.read_yaml(path) if path.is_file() else {}
