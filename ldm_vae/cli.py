"""`ldm-vae COMMAND [recipe.yaml] [subject] [key=value ...]`: one grammar for every command, from one table.

A command is a config dataclass and a function `f(config, *, overwrite=False, ...)`. The settings, their help and the
check of their names are read from the source of the dataclass (see `schema`), so that a typo is reported before any
model library is imported. A `UserError` is printed as one line, with exit code 2.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import json
import logging
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_vae import schema
from ldm_vae.defaults import describe_defaults, find_defaults
from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ldm_vae.paths import check_places
from ldm_vae.runtime import check_accelerate, check_tracker, reuse_freed_memory
from ldm_vae.schema import Setting
from ldm_vae.utils.progress import LineHandler, outlasting
from ldm_vae.utils.text import without_control
from ldm_vae.version import __version__


@dataclass(frozen=True)
class Command:
    """One command or tool.

    Attributes:
        line: one-line description for the overview.
        config: `module:Class` of its settings.
        function: `module:function` that does the work.
        subjects: the settings that positional arguments fill, in order, the subject first; a list in the last place
            takes all remaining arguments.
        names: name on the command line -> key of the setting, where saved files use another name.
        output: the default of `output`, below the subject.
        prints: the file of the output folder whose text is printed at the end.
        failed: `module:function` that decides from the result whether the exit code is 1; with `strict`, only if
            --strict is given.
        interruptible: SIGTERM acts like Ctrl-C, so that the processes it launched save and exit.
    """

    line: str
    config: str
    function: str
    subjects: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    output: str | None = None
    prints: str | None = None
    failed: str | None = None
    strict: bool = False
    interruptible: bool = False

    @property
    def flags(self) -> dict[str, str]:
        """Name -> help text of the flags (options without a value)."""
        found = {
            "dry-run": "check everything and print what would be done; write nothing",
            "print-config": "print the resolved settings and exit",
        }
        if "overwrite" in schema.parameters(self.function):
            found = {"overwrite": "replace an existing result that has other settings"} | found
        if self.strict:
            found["strict"] = "exit code 1 when a verdict is of severity fail"
        return found


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "run your images through the shipped models and show the results on one page",
        "applications.demo:DemoConfig", "applications.demo:demo", ("images",),
        {"model": "pipeline", "resolution": "size"},
    ),
    "train-vae": Command(
        "train an autoencoder on images",
        "autoencoder.train_config:TrainVaeConfig", "autoencoder.training:train_vae", ("data",),
    ),
    "encode": Command(
        "encode images into latent shards",
        "latents.encode:EncodeConfig", "latents.encode:encode_dataset", ("autoencoder",),
    ),
    "latents info": Command(
        "show what a latent set contains and where it comes from",
        "latents.inspect:InfoConfig", "latents.inspect:show_info", ("latents",),
    ),
    "latents verify": Command(
        "find damaged files in a set and the samples they affect",
        "latents.verify:VerifyConfig", "latents.verify:verify_latents", ("latents",),
    ),
    "latents repair": Command(
        "encode damaged and missing shards again",
        "latents.repair:RepairConfig", "latents.repair:repair_latents", ("autoencoder",),
    ),
    "latents append": Command(
        "encode the images that are not in the set yet",
        "latents.append:AppendConfig", "latents.append:append_images", ("autoencoder",),
    ),
    "latents stats": Command(
        "statistics and plots of the latents, codes and labels",
        "latents.stats:StatsConfig", "evaluation.latent_set_page:show_statistics", ("latents",),
        {"count": "samples"},
    ),
    "latents decode": Command(
        "decode samples into a contact sheet",
        "latents.inspect:DecodeConfig", "latents.inspect:decode_latents", ("latents",),
    ),
    "latents export": Command(
        "export a set as parquet (datasets) or tar (webdataset)",
        "latents.export:ExportConfig", "latents.export:export_latents", ("latents", "output"),
    ),
    "latents import": Command(
        "import latents of another project (LightningDiT) as a set",
        "latents.import_lightningdit:ImportConfig", "latents.import_lightningdit:import_latents", ("source", "output"),
        {"label_names": "labels"},
    ),
    "train-diffusion": Command(
        "train a latent U-Net on latent shards",
        "diffusion.training:TrainDiffusionConfig", "diffusion.training:train_diffusion", ("latents",),
    ),
    "generate": Command(
        "generate images with a trained latent diffusion model",
        "diffusion.generation:GenerateConfig", "diffusion.generation:generate", ("model",),
        {"resolution": "size", "latents": "neighbours"},
    ),
    "reconstruct": Command(
        "encode and decode pictures; save originals and reconstructions side by side",
        "evaluation.reconstruction:ReconstructConfig", "evaluation.reconstruction:reconstruct_images",
        ("autoencoder", "images"),
    ),
    "evaluate": Command(
        "measure reconstructions: PSNR, SSIM, LPIPS, rate; baselines, KID and FID",
        "evaluation.reconstruction:EvaluateConfig", "evaluation.reconstruction:evaluate", ("autoencoder",),
    ),
    "frontier": Command(
        "train at several rates and draw rate against distortion",
        "evaluation.rate_distortion:FrontierConfig", "evaluation.rate_distortion:frontier",
        failed="evaluation.sweep:has_failed", interruptible=True,
    ),
    "compare": Command(
        "train several kinds of autoencoder and compare them",
        "evaluation.comparison:CompareConfig", "evaluation.comparison:compare",
        failed="evaluation.sweep:has_failed", interruptible=True,
    ),
    "diagnose": Command(
        "health report: collapse, dead channels, smuggling, grid artifacts; with causes and fixes",
        "evaluation.diagnosis:DiagnoseConfig", "evaluation.diagnosis:diagnose", ("autoencoder",),
        output="health", failed="evaluation.diagnosis:failed", strict=True,
    ),
    "compress": Command(
        "compress pictures into small files",
        "applications.codec.compression:CompressConfig", "applications.codec.compression:compress", ("images",),
    ),
    "decompress": Command(
        "decompress the files that `compress` wrote",
        "applications.codec.compression:DecompressConfig", "applications.codec.compression:decompress", ("files",),
    ),
    "codec fit": Command(
        "fit an entropy model to latents: smaller compressed pictures",
        "applications.codec.fitting:CodecFitConfig", "applications.codec.fitting:fit_codec", ("autoencoder",),
    ),
    "codec compress": Command(
        "compress pictures into small files",
        "applications.codec.compression:CompressConfig", "applications.codec.compression:compress", ("images",),
    ),
    "codec decompress": Command(
        "decompress the files that `compress` wrote",
        "applications.codec.compression:DecompressConfig", "applications.codec.compression:decompress", ("files",),
    ),
    "codec bench": Command(
        "measure the codec against JPEG, WebP and AVIF",
        "applications.codec.bench:CodecBenchConfig", "applications.codec.bench:bench_codec", ("autoencoder",),
    ),
    "directions fit": Command(
        "find directions in latent space, supervised (attributes) and unsupervised",
        "applications.directions.fitting:FitDirectionsConfig", "applications.directions.fitting:fit_directions",
        ("autoencoder",),
    ),
    "directions apply": Command(
        "move pictures along a direction, everywhere or inside a mask",
        "applications.directions.apply:ApplyDirectionConfig", "applications.directions.apply:apply_direction",
        ("directions", "direction", "images"), {"resolution": "size"},
    ),
    "directions evaluate": Command(
        "measure what each direction changes, wanted and unwanted",
        "applications.directions.evaluation:EvaluateDirectionsConfig",
        "applications.directions.evaluation:evaluate_directions", ("directions",),
    ),
    "interpolate": Command(
        "interpolate between two images, in latent space and through diffusion",
        "applications.interpolation:InterpolateConfig", "applications.interpolation:interpolate_images", ("images",),
        {"model": "pipeline", "resolution": "size"},
    ),
    "explore": Command(
        "explore the latent space in a browser",
        "applications.explorer.explored:ExploreConfig", "applications.explorer.server:explore_until_stopped",
        ("autoencoder",), {"resolution": "size"},
    ),
    "anomaly fit": Command(
        "fit on normal images and set the thresholds",
        "applications.anomaly.detector:FitDetectorConfig", "applications.anomaly.detector:fit_detector",
        ("autoencoder",), {"model": "pipeline", "held_out_images": "held_out_count"},
    ),
    "anomaly score": Command(
        "score images: percentile, verdict, heat maps",
        "applications.anomaly.scoring:ScoreImagesConfig", "applications.anomaly.scoring:score_images", ("detector",),
        {"model": "pipeline", "examples": "shown"},
    ),
    "anomaly evaluate": Command(
        "measure the scores on images with known anomalies",
        "applications.anomaly.evaluation:EvaluateDetectorConfig", "applications.anomaly.evaluation:evaluate_detector",
        ("detector",), {"model": "pipeline", "compare": "baseline"},
    ),
    "synth": Command(
        "write the synthetic set as labeled image files",
        "data.synthetic.source:SynthConfig", "data.synthetic.source:synthesize", ("output",),
    ),
    "report": Command(
        "write one self-contained HTML page about a run",
        "evaluation.report:ReportConfig", "evaluation.report:report", ("run",),
    ),
    "model convert": Command(
        "convert to a shareable folder, stock diffusers, a CompVis checkpoint, ONNX or TorchScript",
        "diffusion.export:ConvertConfig", "diffusion.export:convert", ("model", "output"), {"resolution": "size"},
    ),
    "model card": Command(
        "write a model card from recorded results, and upload the model if asked",
        "evaluation.model_card:CardConfig", "evaluation.model_card:make_card", ("model",),
        {"observations": "seen"},
    ),
    "model ema": Command(
        "choose the EMA length of the U-Net after training",
        "diffusion.posthoc_ema:PosthocEmaConfig", "diffusion.posthoc_ema:posthoc_ema", ("model",),
        {"count": "kid", "data": "images"},
    ),
}  # fmt: skip

GROUPS = {
    "latents": "inspect, verify, repair, extend, export and import latent sets",
    "codec": "fit an entropy model, compress and decompress pictures, run the benchmark",
    "directions": "controlled edits: fit, apply and evaluate directions in latent space",
    "anomaly": "anomaly detection: fit on normal images, score others",
    "model": "convert a model, write its card, choose its EMA length",
}

OLD_COMMANDS = {
    "codec-fit": "codec fit", "codec-bench": "codec bench", "convert": "model convert", "card": "model card",
    "ema": "model ema",
}  # fmt: skip
OLD_SETTINGS = {
    "": {"out": "output"},
    "demo": {"size": "resolution", "pipeline": "model"},
    "latents stats": {"samples": "count"},
    "latents import": {"from": "layout", "labels": "label_names"},
    "generate": {"label": "labels", "size": "resolution", "neighbours": "latents"},
    "reconstruct": {"size": "resolution"},
    "directions apply": {"size": "resolution"},
    "interpolate": {"size": "resolution", "pipeline": "model"},
    "explore": {"size": "resolution"},
    "anomaly fit": {"pipeline": "model", "held_out_count": "held_out_images"},
    "anomaly score": {"pipeline": "model", "shown": "examples"},
    "anomaly evaluate": {"pipeline": "model", "baseline": "compare"},
    "model card": {"seen": "observations"},
    "model convert": {"dtype": "precision", "size": "resolution"},
    "model ema": {"length": "lengths", "kid": "count", "images": "data"},
}
"""Command ("": all) -> old key -> new key. Old spellings work for one release and print one line of advice."""

SCRIPTS = {
    "train_vae": "train-vae", "encode_dataset": "encode", "train_diffusion": "train-diffusion", "generate": "generate",
    "evaluate": "evaluate",
}  # fmt: skip
"""Launcher in `scripts/` -> the command that it starts."""

OF_TRAINING = ("seed", "device", "precision")
"""Settings that some commands have in the group `training`; they can be given without the prefix."""

REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN,
    errno.ENAMETOOLONG,
)  # fmt: skip
"""Disk errors, not bugs: the disk is full or read-only, a folder has disappeared, or a name is too long for it."""


@dataclass
class Words:
    """A parsed command line.

    Attributes:
        recipe: the YAML file.
        settings: `key=value` with the config's own keys, in order.
        flags: the flags that were given, with underscores.
        advice: old spellings that were used, as sentences.
    """

    recipe: Path | None = None
    settings: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    advice: list[str] = field(default_factory=list)

    def value(self, key: str) -> str | None:
        values = [word.partition("=")[2] for word in self.settings if word.partition("=")[0] == key]
        return values[-1] if values else None


class ArgumentReader:
    """Parses the arguments of one command: `key=value`, `--key=value` and `--key value` are the same."""

    def __init__(self, name: str) -> None:
        self.name, self.command = name, COMMANDS[name]
        self.settings = schema.read_schema(self.command.config)
        self.words, self.positionals = Words(), list[str]()
        self.texts: dict[str, list[str]] = {}

    def read(self, words: Sequence[str]) -> Words:
        """Raises: UserError for an unknown setting or an invalid value."""
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                self.positionals += rest
                break
            if word.startswith("--"):
                self._option(word[2:], rest)
            elif re.match(r"[A-Za-z_][\w.-]*=", word) and not os.path.exists(word):
                key, _, value = word.partition("=")
                self._set(key, value)
            elif Path(word).suffix in (".yaml", ".yml") and self.words.recipe is None and not self.positionals:
                self.words.recipe = Path(os.path.expanduser(word))
            else:
                self.positionals.append(word)
        self._place_positionals()
        for key, texts in self.texts.items():
            self.words.settings.append(f"{key}={flow_list(texts)}")
        return self.words

    def _option(self, word: str, rest: list[str]) -> None:
        """`--key=value`, `--key value`, `--flag`."""
        key, equals, value = word.partition("=")
        if not equals and key in self.command.flags:
            self.words.flags.add(key.replace("-", "_"))
            return
        if key == "overwrite":
            raise UserError("--overwrite", f"has no effect with {self.name}", "leave it out")
        setting = schema.find_setting(self.settings, self._key(key))
        if equals:
            self._set(key, value)
        elif setting.kind == "true or false":
            self._set(key, rest.pop(0) if rest and rest[0] in ("true", "false") else "true")
        else:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: needs a value; give {key}=VALUE")
            self._set(key, self._taken(setting, rest))

    def _taken(self, setting: Setting, rest: list[str]) -> str:
        """The value after `--key`: one word; all the numbers for a list of numbers; two words for a pair."""
        if setting.kind == "list" and setting.item[0] != "text" and is_number(rest[0]):
            taken = [rest.pop(0)]
            while rest and is_number(rest[0]):
                taken.append(rest.pop(0))
            return ",".join(taken)
        if setting.kind == "pair" and not rest[0].startswith("[") and "," not in rest[0] and len(rest) > 1:
            taken = [rest.pop(0) for _ in setting.item]
            return flow_list(taken) if setting.item[0] == "text" else ",".join(taken)
        return rest.pop(0)

    def _key(self, key: str) -> str:
        """The config's own key. An old spelling is added to `advice`."""
        key = key.replace("-", "_")
        old = OLD_SETTINGS[""] | OLD_SETTINGS.get(self.name, {})
        if key in old and old[key] != key and not any(setting.key == key for setting in self._own(old[key])):
            self.words.advice.append(f"{key}= is now {old[key]}=")
            key = old[key]
        key = self.command.names.get(key, key)
        names = {setting.key for setting in self.settings}
        if key in OF_TRAINING and key not in names and "training" in names:
            return f"training.{key}"
        return key

    def _own(self, new: str) -> tuple[Setting, ...]:
        """The settings still called by their old name, that is, without those that `names` renames."""
        renamed = self.command.names.get(new)
        return tuple(setting for setting in self.settings if setting.key != renamed)

    def _set(self, key: str, value: str) -> None:
        key = self._key(key)
        setting = schema.find_setting(self.settings, key)
        if setting.kind == "list" and setting.item[0] == "text" and not is_list(value):
            self.texts.setdefault(key, []).append(value)
            return
        if setting.kind in ("list", "pair") and not is_list(value) and value and value != "null":
            value = f"[{value}]"
        self.texts.pop(key, None)
        schema.check_value(setting, value)
        if setting.kind == "group" and not (setting.short_form or value.startswith("{")):
            raise UserError(f"{key}: is a group of settings; give {setting.settings[0].key}=VALUE")
        self.words.settings.append(f"{key}={value}")

    def _place_positionals(self) -> None:
        subjects = list(self.command.subjects)
        for number, key in enumerate(subjects):
            if not self.positionals:
                return
            setting = schema.find_setting(self.settings, key)
            if setting.kind == "list" and number == len(subjects) - 1:
                self.texts[key] = self.positionals + self.texts.get(key, [])
                self.positionals = []
            else:
                self.words.settings.insert(0, f"{key}={self.positionals.pop(0)}")
        if self.positionals:
            place = f"; a setting is key=value, and the subject is {subjects[0]}" if subjects else ""
            raise UserError(f"{self.positionals[0]!r}: is not a setting or a YAML file{place}")


def is_number(word: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?(,.*)?", word) is not None


def is_list(text: str) -> bool:
    """Whether a text is a YAML list, for example `[a, b]`; `[a].png` is a file name."""
    return text.startswith("[") and text.endswith("]")


def flow_list(texts: Iterable[str]) -> str:
    """Texts as one YAML list; any characters are allowed."""
    texts = list(texts)
    if all(text.isprintable() for text in texts):
        return "[" + ", ".join("'" + text.replace("'", "''") + "'" for text in texts) + "]"
    return json.dumps(texts)  # a name that is not UTF-8 has surrogates, which YAML cannot carry


# Running


def run(name: str, words: Sequence[str]) -> int:
    """Parse and check the arguments, import the command and call it. Returns: the exit code. Raises: UserError."""
    command = COMMANDS[name]
    understood = ArgumentReader(name).read(words)
    if understood.advice:
        advice = "; ".join(dict.fromkeys(understood.advice))
        print(f"ldm-vae {name}: {advice} (the old spelling works for one release)", file=sys.stderr)
    settings = schema.read_schema(command.config)
    recipe = {} if understood.recipe is None else read_recipe(settings, understood.recipe)
    take_defaults(command, settings, understood, recipe)
    if "print_config" not in understood.flags:
        check_given_places(name, settings, understood, recipe)
        check_environment(settings, understood, recipe)
    complete(command, settings, understood, recipe)
    from ldm_vae import config as configuration

    config = configuration.load(resolve(command.config), understood.recipe, understood.settings)
    if "print_config" in understood.flags:
        print(configuration.to_yaml(config), end="")
        return 0
    given = dict.fromkeys(understood.flags - {"strict"}, True)
    reuse_freed_memory()
    if command.interruptible:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = resolve(command.function)(config, **given)
    if command.prints and os.environ.get("RANK", "0") == "0":
        text = (Path(config.output) / command.prints).read_text()
        print(f"{config.output}/index.html:\n\n{text}", end="")
    if command.failed and (not command.strict or "strict" in understood.flags):
        return int(resolve(command.failed)(result))
    return result if isinstance(result, int) else getattr(result, "exit_code", 0)


def resolve(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"ldm_vae.{module}"), name)


def read_recipe(settings: tuple[Setting, ...], path: Path) -> dict[str, Any]:
    """The settings of a YAML file: full key -> value.

    Raises:
        UserError: an unknown key or an invalid value, before anything heavy is imported.
    """
    from ldm_vae.config import read_yaml

    found: dict[str, Any] = {}

    def read(values: dict[Any, Any], prefix: str) -> None:
        for key, value in values.items():
            setting = schema.find_setting(settings, f"{prefix}{key}")
            if isinstance(value, dict) and setting.kind == "group":
                read(value, f"{prefix}{key}.")
                continue
            if isinstance(value, (str, int, float)):
                schema.check_value(setting, str(value))
            found[f"{prefix}{key}"] = value

    try:
        read({key: value for key, value in read_yaml(path).items() if key != "format_version"}, "")
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from None
    return found


def check_given_places(name: str, settings: tuple[Setting, ...], words: Words, recipe: dict[str, Any]) -> None:
    """Check the files and folders named by the arguments and by the recipe. Raises: UserError."""
    given = named_texts(settings, dict(word.split("=", 1) for word in words.settings))
    shown = {own: word for word, own in COMMANDS[name].names.items()}
    check_places(name, given, shown)
    try:
        others = {key: texts for key, texts in named_texts(settings, recipe).items() if key not in given}
        check_places(name, others, shown)
    except UserError as error:
        raise UserError(f"{words.recipe}: {error}") from None


def check_environment(settings: tuple[Setting, ...], words: Words, recipe: dict[str, Any]) -> None:
    """Check what `accelerate launch` has set, and that the tracker is installed, where the command has such settings.

    Raises:
        UserError: this environment cannot run the command.
    """
    for setting in schema.flat(settings):
        if setting.name == "processes":
            check_accelerate()
        elif setting.name == "tracker":
            check_tracker(words.value(setting.key) or recipe.get(setting.key, setting.default))


def named_texts(settings: tuple[Setting, ...], given: dict[str, Any]) -> dict[str, list[str]]:
    """Key of every text setting that was given -> its texts, with `~` expanded to the home folder.

    A YAML value of another type, for example a folder called 2024, is left to `config.load`.
    """
    found: dict[str, list[str]] = {}
    for key, value in given.items():
        setting = schema.find_setting(settings, key)
        if setting.short_form and isinstance(value, str) and not value.startswith("{"):
            key, value = f"{key}.path", resolve("data.sources:DataConfig").short_form(value)["path"]
        elif setting.kind != "text" and (setting.kind, setting.item) != ("list", ("text",)):
            continue
        elif setting.kind == "list" and isinstance(value, str):
            value = texts_of(value)
        texts = value if isinstance(value, list) else [value]
        found[key] = [os.path.expanduser(text) for text in texts if isinstance(text, str) and text]
    return found


def texts_of(text: str) -> list[str]:
    """The items of a YAML list as they are written: `[no, 1e3]` gives the texts no and 1e3."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # `config.load` names what is wrong
        return []
    items = node.value if isinstance(node, yaml.SequenceNode) else ()
    return [item.value for item in items if isinstance(item, yaml.ScalarNode)]


def take_defaults(command: Command, settings: tuple[Setting, ...], words: Words, recipe: dict[str, Any]) -> None:
    """Add the settings that a folder named by another setting already says, and print which ones and where from."""
    given = {key: str(value) for key, value in recipe.items()} | dict(word.split("=", 1) for word in words.settings)
    found = find_defaults(settings, given, read_recorded)
    words.settings += [f"{default.key}={default.text}" for default in found]
    if "print_config" not in words.flags:
        for line in describe_defaults(found, {own: typed for typed, own in command.names.items()}):
            print(line, file=sys.stderr)


def read_recorded(words: list[str]) -> dict[str, str]:
    """The settings of a command that was recorded in `run.json`, program name first. Raises: UserError."""
    program = Path(words[0]).stem
    name, rest, _ = find_command([SCRIPTS[program], *words[1:]] if program in SCRIPTS else words[1:])
    return dict(word.split("=", 1) for word in ArgumentReader(name).read(rest).settings)


def complete(command: Command, settings: tuple[Setting, ...], words: Words, recipe: dict[str, Any]) -> None:
    """Add the default of `output`, and placeholders for missing settings when nothing will be written."""
    if command.output and words.value("output") is None and words.recipe is None:
        subject = words.value(command.subjects[0])
        if subject and Path(subject).expanduser().is_dir():
            words.settings.append(f"output={Path(subject).expanduser() / command.output}")
    for setting in settings if words.recipe is None or words.flags & {"print_config", "dry_run"} else ():
        if not setting.required or words.value(setting.key) is not None or setting.key in recipe:
            continue
        if "print_config" in words.flags or ("dry_run" in words.flags and setting.key == "output"):
            words.settings.insert(0, f"{setting.key}={setting.key.upper()}")
        elif words.recipe is None:
            raise UserError(f"settings: {setting.key} is required; give it as {setting.key}=VALUE")


# Help


def overview() -> str:
    """The top-level help."""
    lines = [
        "usage: ldm-vae COMMAND [recipe.yaml] [subject] [key=value ...]",
        "",
        "Train a KL-VAE on your own images, encode datasets into latent shards, generate with latent diffusion.",
        "",
        "commands, in the order of a typical workflow:",
    ]
    shown = []
    for name, command in COMMANDS.items():
        group = name.split()[0] if " " in name else None
        if group is None:
            lines.append(f"  {name:<16} {command.line}")
        elif group not in shown:
            shown.append(group)
            lines.append(f"  {group:<16} {GROUPS[group]}")
    return "\n".join(
        [
            *lines,
            "",
            "`ldm-vae COMMAND --help` lists its settings. On several GPUs: `torchrun --nproc_per_node N scripts/...`",
            "or `accelerate launch scripts/...` with the same arguments.",
        ]
    )


def tool_overview(group: str) -> str:
    """The help of a group of tools."""
    tools = {name.split()[1]: one.line for name, one in COMMANDS.items() if name.startswith(f"{group} ")}
    lines = [f"usage: ldm-vae {group} TOOL [subject] [key=value ...]", "", f"{GROUPS[group].capitalize()}.", ""]
    return "\n".join([*lines, "tools:", *(f"  {tool:<10} {line}" for tool, line in tools.items())])


def help_of(name: str) -> str:
    """Everything about one command: what it does, and every setting with its meaning, type and default."""
    command = COMMANDS[name]
    subjects = " ".join(f"[{subject.upper()}]" for subject in command.subjects)
    about = re.split(r"\n\n?(?:Args|Attributes):\n", schema.docstring(command.config))[0]
    about = re.sub(r"^`ldm-vae [\w -]+`[.:] ?", "", about).strip()
    about = about[:1].upper() + about[1:]
    lines = [f"usage: ldm-vae {name} [recipe.yaml] {subjects} [key=value ...]".replace("  ", " "), ""]
    lines += [f"{command.line[0].upper()}{command.line[1:]}.", *(["", about] if about else []), "", "settings:"]
    words = {own: word for word, own in command.names.items()}
    for setting in schema.read_schema(command.config):
        lines += help_lines(setting, words)
    lines += ["", "flags:", *(f"  --{flag:<14} {meaning}" for flag, meaning in command.flags.items())]
    return "\n".join(lines)


def help_lines(setting: Setting, words: dict[str, str]) -> list[str]:
    if setting.kind == "group":
        short = [f"  {setting.key}=PATH | synthetic | hf:NAME"] if setting.short_form else []
        meaning = textwrap.wrap(setting.meaning, 104, initial_indent=" " * 8, subsequent_indent=" " * 8)
        inside = [line for one in setting.settings for line in help_lines(one, words)]
        return [*short, *(meaning if short else []), *inside]
    kind = " | ".join(setting.item) if setting.kind == "choice" else setting.kind
    kind = f"list of {setting.item[0]}" if kind == "list" else kind
    default = "required" if setting.required else f"default {setting.default}" if setting.default else "default empty"
    meaning = textwrap.wrap(setting.meaning, 104, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return [f"  {words.get(setting.key, setting.key)}  ({kind}; {default})", *meaning]


# The program


def find_command(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """(the command's name, the words that are left, advice). Raises: UserError."""
    first, *rest = words
    advice = []
    if first in OLD_COMMANDS:
        advice = [f"`{first}` is now `{OLD_COMMANDS[first]}`"]
        return OLD_COMMANDS[first], rest, advice
    if first in GROUPS:
        tools = [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
        tool = rest[0] if rest else ""
        if tool not in tools:
            raise UserError(f"{first}: there is no tool {tool!r}; {suggestion(tool, tools)}")
        return f"{first} {tool}", rest[1:], advice
    if first not in COMMANDS:
        known = [*dict.fromkeys(name.split()[0] for name in COMMANDS)]
        raise UserError(f"{first!r}: unknown command; {suggestion(first, known)}")
    return first, rest, advice


PIPELINE_ARGUMENTS = (
    ("guidance", "guidance_scale"), ("autoguidance", "autoguidance_scale"), ("steps", "num_inference_steps"),
    ("resolution", "height"), ("resolution", "width"),
)  # fmt: skip
"""Setting, and the argument of the pipeline that it becomes, which no command has as a key."""


def with_typed_names(name: str, sentence: str) -> str:
    """An error sentence with the names of settings as they are typed: `size: 5 is below 8` says resolution.

    Functions name a setting by the config's own key, which Python callers use.
    """
    for typed, own in (*COMMANDS[name].names.items(), *PIPELINE_ARGUMENTS):
        sentence = re.sub(rf"^{own}(?=[:=,])|(?<=^--){own}(?=:)|(?<![\w.]){own}(?==[^=])", typed, sentence)
    return sentence


def suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"


def _complain(text: str) -> None:
    """A line on standard error, from every process."""
    with outlasting(sys.stderr):
        print(without_control(text), file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may not be valid UTF-8
    logging.lastResort = LineHandler(logging.WARNING)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"ldm_vae {__version__}")
        return 0
    if arguments[0] in GROUPS and arguments[1:] in ([], ["-h"], ["--help"]):
        print(tool_overview(arguments[0]))
        return 0
    try:
        name, words, advice = find_command(arguments)
    except UserError as error:
        _complain(f"ldm-vae: {error}")
        return EXIT_USER_ERROR
    options = words[: words.index("--")] if "--" in words else words
    if "--help" in options or "-h" in options:
        print(help_of(name))
        return 0
    for line in advice:
        _complain(f"ldm-vae: {line} (the old spelling works for one release)")
    try:
        return run(name, words)
    except UserError as error:
        _complain(f"ldm-vae {name}: {with_typed_names(name, str(error))}")
        return int(getattr(error, "exit_code", EXIT_USER_ERROR))
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"ldm-vae {name}: {where}{error.strerror}; fix this and run the same command again")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _complain(f"ldm-vae {name}: interrupted; the same command continues")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
