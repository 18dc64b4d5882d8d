"""Records in words: tables and sentences of the model card. Each restates a file; what is not there is left out."""

from __future__ import annotations

import math
import re
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Any

from ldm_vae.autoencoder.rate import bits_per_dimension, bits_per_pixel
from ldm_vae.diffusion.fid import sentences as distribution_sentences
from ldm_vae.errors import UserError
from ldm_vae.evaluation.reconstruction import codec_lines, table
from ldm_vae.utils.markdown import markdown_table
from ldm_vae.utils.text import pluralize

Rows = list[tuple[str, str]]
WATTS_PER_CORE = 10.0
"""Of a server's processor under load, with its share of memory and cooling: an order of magnitude."""
SOURCE_KEYS = ("name", "images", "licence", "credits")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_identity(recorded: str | None, identity: str, where: Path) -> None:
    """Raises: UserError when a record names the fingerprint of other weights."""
    if recorded is not None and recorded != identity:
        raise UserError(
            f"{where}: is about {recorded[:19]}..., the model is {identity[:19]}...; give the record of this model"
        )


def data_name(config: dict[str, Any]) -> str:
    """The images in one word: a dataset's name, a folder's name, or `synthetic`."""
    data = config.get("data") or {}
    if data.get("source") == "datasets":
        return str(data.get("datasets", {}).get("name") or "datasets")
    return Path(str(data["path"])).name if data.get("path") else str(data.get("source", "not recorded"))


def hub_dataset(config: dict[str, Any]) -> str | None:
    """The hub id of the dataset, where the images came from one."""
    data = config.get("data") or {}
    name = str((data.get("datasets") or {}).get("name") or "")
    return name if data.get("source") == "datasets" and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def read_text(option: str, path: str | None) -> str | None:
    """A text that the user gave by a file. Raises: UserError."""
    if path is None:
        return None
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path} cannot be read as text ({error})") from error


def read_credits(path: str | None) -> str | None:
    """Origin and licences of the data in Markdown: a text as it is, of a YAML list of sources a table.

    Each source has `name`, `images` (how many), `licence` and `credits`, and may have `url`.

    Raises:
        UserError: the file cannot be read, or a source lacks one of these.
    """
    text = read_text("--data-credits", path)
    if text is None or Path(str(path)).suffix not in (".yaml", ".yml"):
        return text
    import yaml

    try:
        sources = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--data-credits: {path} is not YAML ({' '.join(str(error).split())}); correct it") from error
    rows = []
    for source in sources if isinstance(sources, list) else [None]:
        if not isinstance(source, dict) or not {*SOURCE_KEYS} <= source.keys() <= {*SOURCE_KEYS, "url"}:
            raise UserError(
                f"--data-credits: {path} is not a list of sources with {', '.join(SOURCE_KEYS)} and maybe url"
            )
        name, *cells = (str(source[key]).strip().replace("|", "/").replace("\n", " ") for key in SOURCE_KEYS)
        rows.append([f"[{name}]({source['url']})" if source.get("url") else name, *cells])
    return "\n".join(markdown_table(["images of", "number", "license", "credits"], rows))


def energy_sentence(run: dict[str, Any], watts: float | None, initial: str | None = None) -> str | None:
    """A guess from hours and power; None where the time, or the power of an accelerator, is not known.

    `initial`: what the run started from, whose own energy is not in it.
    """
    cores = re.search(r"(\d+) cores", str(run.get("versions", {}).get("machine")))
    if "seconds" not in run or (watts is None and (cores is None or run.get("device") != "cpu")):
        return None
    hours = float(run["seconds"]) / 3600
    if watts is None and cores is not None:
        watts, words = WATTS_PER_CORE * int(cores[1]), f"{cores[1]} cores x {WATTS_PER_CORE:g} W"
    else:
        words = f"{watts:g} W"
    kilowatt_hours = hours * float(watts or 0) / 1000
    sentence = f"Energy, guessed and not measured: {hours:.2f} hours x {words} = {kilowatt_hours:.3f} kWh."
    return sentence if initial is None else f"{sentence} That of {initial}, which it started from, comes on top."


def earlier_run(record: dict[str, Any], watts: float | None) -> dict[str, str]:
    """Of a run that the model goes back to: its `title`, what it took in a `sentence`, its `command`, and, as words
    to be added to it, the `settings` beside the defaults that it does not name.
    """
    rows = dict(run_rows(record))
    took = f", {rows['wall time']}" if "wall time" in rows else ""
    steps = pluralize(record["steps"], "step") if "steps" in record else "steps not recorded"
    where = f" on {rows.get('machine', 'a machine not recorded')}, commit {rows.get('commit', 'not recorded')}."
    parts = [f"{str(record.get('started', ''))[:10]}: {steps}{took}{where}", energy_sentence(record, watts) or ""]
    words = [str(word) for word in record.get("command", [])]
    settings = unnamed_settings(record.get("settings") or {}, words)
    return {
        "title": str(record.get("name")),
        "sentence": " ".join(parts).strip(),
        "command": shlex.join(words),
        "settings": shlex.join(f"{key}={_as_yaml(value)}" for key, value in settings.items()),
    }


def unnamed_settings(settings: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Those of the settings (dotted keys) that no `key=value` among the words of a command is about."""
    named = [f"{word.partition('=')[0]}." for word in words if "=" in word]
    return {
        key: value
        for key, value in settings.items()
        if not any(f"{key}.".startswith(other) or other.startswith(f"{key}.") for other in named)
    }


def _as_yaml(value: Any) -> str:
    """On one line, as short as it may be: what it means after `key=`."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("...\n").strip()


def data_rows(config: dict[str, Any]) -> Rows:
    """Where the images came from and how they were cropped."""
    data, crop = config.get("data") or {}, config.get("crop") or {}
    if not data:
        return []
    rows = [("source", str(data.get("source"))), ("images", data_name(config))]
    datasets = data.get("datasets") or {}
    for name in ("subset", "split", "revision"):
        if data.get("source") == "datasets" and datasets.get(name):
            rows.append((name, str(datasets[name])))
    synthetic = data.get("synthetic") or {}
    if data.get("source") == "synthetic":
        rows += [(f"synthetic {name}", str(value)) for name, value in synthetic.items()]
    rows.append(("share held out", f"{data.get('held_out'):g}"))
    if config.get("repeat"):
        rows.append(("seen more often", ", ".join(f"{name} x {times}" for name, times in config["repeat"].items())))
    if crop:
        rows.append(
            ("short side before cropping", f"{crop.get('short_side_min')} to {crop.get('short_side_max')} pixels")
        )
        rows.append(("mirrored", "half of the crops" if crop.get("flip") else "no"))
    return rows


def training_rows(config: dict[str, Any], run: dict[str, Any]) -> Rows:
    """Architecture, phases, objective, optimizer, and what the run cost."""
    rows: Rows = []
    autoencoder = config.get("autoencoder") or {}
    if autoencoder and not config.get("initial"):  # whose architecture is taken
        named = [f"{key} {value}" for key, value in autoencoder.items() if value not in (None, 0)]
        rows.append(("autoencoder", ", ".join(named)))
    if config.get("initial"):
        trained = config.get("train")
        rows.append(("started from", f"{config['initial']}; trained: {trained or 'everything'}"))
    for number, phase in enumerate(config.get("phases") or [], start=1):
        rows.append((f"phase {number}", f"{phase['steps']} steps, {phase['batch']} crops of {phase['crop']} pixels"))
    weights = {key: value for key, value in (config.get("loss") or {}).items() if isinstance(value, float) and value}
    if weights:
        rows.append(("loss weights", ", ".join(f"{key} {value:g}" for key, value in weights.items())))
    settings = config.get("training") or {}
    for name in ("learning_rate", "weight_decay", "ema_decay", "seed"):
        if settings.get(name) is not None:
            rows.append((name.replace("_", " "), f"{settings[name]:g}"))
    return rows + run_rows(run)


def run_rows(run: dict[str, Any]) -> Rows:
    """Steps, time, machine and versions, as far as they are recorded."""
    versions = run.get("versions", {})
    found = {
        "steps done": run.get("steps"),
        "precision": run.get("precision"),
        "started": run.get("started"),
        "wall time": f"{timedelta(seconds=round(run['seconds']))} (h:mm:ss)" if "seconds" in run else None,
        "machine": versions.get("machine"),
        "device, processes": f"{run['device']}, {run.get('processes')}" if "device" in run else None,
        "commit": versions.get("commit"),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("machine", "commit")) or None,
    }
    return [(name, str(value)) for name, value in found.items() if value is not None]


def known_sides(factor: int, only: int | None) -> str:
    """What height and width of an image must be; `only`: of an autoencoder that knows one size."""
    return f"{only} pixels, scale others" if only else f"multiples of {factor} pixels, pad others"


def rate_sentences(training: dict[str, Any], evaluation: dict[str, Any], factor: int, channels: int) -> list[str]:
    """Mode, target, beta in both conventions, and the rate that was measured."""
    rate = training.get("rate") or {}
    sentences = []
    if training.get("kind") not in (None, "kl"):
        sentences.append(f"Of kind {training['kind']}: beta weighs no divergence of a posterior.")
        rate = {}
    if rate and (training.get("initial") or {}).get("train") == ["decoder"]:  # see `autoencoder.record.write_record`
        sentences.append("The last run trained the decoder alone; target, beta and steps are those of the encoder.")
    if rate.get("mode") == "target":
        sentences.append(f"Controlled towards {rate.get('target_nats')} nats per latent dimension.")
    elif rate.get("mode"):
        sentences.append(f"Mode: {rate['mode']}.")
    if rate.get("final_beta") is not None:
        weight = rate["final_beta"] * 3 * factor**2 / channels
        sentences.append(
            f"Final beta {rate['final_beta']:.3g} on means per element; a KL weight of {weight:.3g} in the convention "
            f"of Stable Diffusion (sums over the image; beta = w c / {3 * factor**2})."
        )
    if rate.get("pinned_share"):
        sentences.append(f"Beta was at a bound, the target missed, in {rate['pinned_share']:.1%} of the steps.")
    measured = (evaluation.get("rate") or {}).get("nats_per_dim")
    where = "in the evaluation"
    if measured is None and training.get("kind") in (None, "kl"):  # of another kind the divergence is no rate
        measured = (training.get("held_out") or {}).get("held_out/nats_per_dim")
        where = "on the images that training validates on"
    if measured is not None:
        sentences.append(
            f"Measured {where}: {measured:.3f} nats = {bits_per_dimension(measured):.3f} bits per latent dimension = "
            f"{bits_per_pixel(measured, channels, factor):.3f} bits per pixel."
        )
    return sentences


def evaluation_facts(evaluation: dict[str, Any]) -> dict[str, Any]:
    """`table` of all rows with intervals, and the protocol in `sentences`."""
    protocol, gain = evaluation["protocol"], evaluation.get("gain_over_linear_db")
    images, preprocessing = protocol["images"], protocol["preprocessing"]
    name, side = data_name(evaluation["config"]), protocol["resolution"]
    sentences = [
        f"{pluralize(images['count'], 'image')} ({images['part']}) of {name}, set `{images['fingerprint']}`.",
        f"{side} x {side} pixels: {preprocessing['fit']}, {preprocessing['filter']}.",
        f"{protocol['range']}; {protocol['average']}.",
        f"Precision {protocol['precision']}; LPIPS network: {protocol.get('lpips') or 'none'}.",
    ]
    if any("over_budget" in row for row in evaluation["rows"]):  # of codecs
        sentences += codec_lines(evaluation)
    if gain:
        sentences.append(f"Gain over the linear baseline on the same pixels: {_signed(gain)} dB.")
    if evaluation.get("distribution"):
        sentences += distribution_sentences(evaluation["distribution"])
    if evaluation.get("rejected"):
        sentences.append(f"Left out: {pluralize(len(evaluation['rejected']), 'image')} that could not be read.")
    return {"table": table(evaluation), "sentences": sentences}


def _signed(value: dict[str, float]) -> str:
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def verdicts(health: dict[str, Any]) -> list[dict[str, str]]:
    """Name, severity and sentence of each finding, the worst first; of one that many channels share, the first."""
    order = {"fail": 0, "warn": 1}
    shared: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for verdict in health.get("verdicts") or []:
        name, severity = (str(verdict.get(key, "not recorded")) for key in ("name", "severity"))
        shared.setdefault((name, severity), []).append(verdict)
    found = []
    for (name, severity), several in shared.items():
        sentence = str(several[0].get("sentence", "not recorded")).removeprefix(f"{name} ({severity}): ")
        if others := [str(verdict["channel"]) for verdict in several[1:] if verdict.get("channel") is not None]:
            sentence += f" Likewise channel{'s' * (len(others) > 1)} {', '.join(others)}."
        found.append({"name": name, "severity": severity, "sentence": sentence})
    return sorted(found, key=lambda verdict: order.get(verdict["severity"], 2))


def limits(
    config: dict[str, Any], evaluation: dict[str, Any], health: dict[str, Any] | None, sides: str, stock: bool
) -> list[str]:
    """What follows from the records about where the model is known to work, and where nothing is known.

    `sides`: what height and width must be, see `known_sides`.
    """
    sentences = [f"Reconstructions lose detail. Height and width must be {sides}."]
    if not stock:
        sentences.append("Stock diffusers cannot load this class; install ldm_vae, or export to ONNX or TorchScript.")
    crops = [phase["crop"] for phase in config.get("phases") or []]
    if crops:
        sentences.append(f"Trained on crops of at most {max(crops)} pixels of the images named above, no others.")
    if evaluation:
        protocol = evaluation["protocol"]
        sentences.append(
            f"Measured on {pluralize(protocol['images']['count'], 'image')} at {protocol['resolution']} pixels; "
            "nothing is recorded about other images, sizes or color spaces."
        )
        if protocol["images"]["part"] != "held_out":
            sentences.append(f"The measured images ({protocol['images']['part']}) include images of the training.")
    else:
        sentences.append("No evaluation is recorded: how well it reconstructs unseen images is not known.")
    if health is not None and any(verdict["severity"] == "fail" for verdict in verdicts(health)):
        sentences.append("The health report found at least one failure; see above before building on the latents.")
    return sentences
