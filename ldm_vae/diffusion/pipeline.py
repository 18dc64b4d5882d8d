"""Class labels as people write them: names, ids, and mixtures of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from PIL import Image
from torch import Tensor, nn

from ldm_vae import runtime

runtime.repair_torchvision()

import diffusers
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin

from ldm_vae import random
from ldm_vae.autoencoder.base import Autoencoder
from ldm_vae.autoencoder.models import as_autoencoder
from ldm_vae.data import transforms
from ldm_vae.data.sources import WHOLE_NUMBER
from ldm_vae.diffusion import editing, flow, saving
from ldm_vae.diffusion.samplers import (
    FULL_INTERVAL,
    ClassWeights,
    Guidance,
    GuidedVelocity,
    Solver,
    first_step,
    make_solver,
    sampler_name,
    scheduler_shift,
)
from ldm_vae.diffusion.samplers import flow_scheduler as flow_scheduler
from ldm_vae.diffusion.saving import load_components
from ldm_vae.diffusion.unet import LatentUNet
from ldm_vae.diffusion.validation import latents_to_rgb
from ldm_vae.errors import UserError
from ldm_vae.files import check_checksums, write_checksums
from ldm_vae.latents.format import Manifest, check_same
from ldm_vae.latents.normalizer import LatentNormalizer
from ldm_vae.utils.text import pluralize

Label = str | int
ClassMixture = Mapping[Any, float]
"""Labels and their shares."""
Labels = Label | ClassMixture | Sequence[Label | ClassMixture] | None


def class_weights(wanted: Labels, count: int, names: Sequence[str]) -> ClassWeights | None:
    """The classes of `count` images, what is wanted being repeated in turn; None for any class.

    Raises:
        UserError: an unknown label, more labels than images, or a mixture without a positive sum.
    """
    if wanted is None:
        return None
    each = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    if not each or count < len(each):
        raise UserError(
            f"labels: {len(each)} of them for {pluralize(count, 'image')}; ask for at least one image per label"
        )
    mixtures = [label if isinstance(label, Mapping) else {label: 1.0} for label in each]
    width = max(len(mixture) for mixture in mixtures)
    ids, shares = torch.zeros(len(each), width, dtype=torch.long), torch.zeros(len(each), width)
    for row, mixture in enumerate(mixtures):
        total = sum(mixture.values())
        if total <= 0 or min(mixture.values()) < 0:
            raise UserError(f"labels: the shares of {dict(mixture)} must be positive; give for instance one half each")
        for column, (label, share) in enumerate(mixture.items()):
            ids[row, column] = find_label(label, names)
            shares[row, column] = share / total
    turn = torch.arange(count) % len(each)
    return ClassWeights(ids[turn], shares[turn])


def find_label(label: Label, names: Sequence[str]) -> int:
    """The class id of a name, of an id, or of an id written as text. Names win over ids; case does not matter.

    Raises:
        UserError: an unknown label, with the nearest known one.
    """
    if not names:
        raise UserError(f"label {label!r}: this model is unconditional, it has no labels; leave it out")
    if isinstance(label, str):
        by_name = {name.casefold(): number for number, name in reversed(list(enumerate(names)))}
        if label in names:
            return list(names).index(label)
        if label.casefold() in by_name:
            return by_name[label.casefold()]
    number = int(label) if isinstance(label, int) or WHOLE_NUMBER.fullmatch(label) else None
    if number is not None and 0 <= number < len(names):
        return number
    near = difflib.get_close_matches(str(label), names, n=1, cutoff=0.5)
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"label {label!r}: unknown; {hint}known labels: {known}; or an id from 0 to {len(names) - 1}")


# What the arguments of a pipeline's call mean together: how many images, whose noise, and what makes no sense.

DEFAULT_GUIDANCE = 3.0
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_call(
    output_type: str, steps: int, image: Any, strength: Any, mask: Any, latents: Any, generator: Any, seed: Any
) -> None:
    """Raises: UserError for values that no call can have, and for settings without effect."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type: {output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}")
    if steps < 1:
        raise UserError(f"num_inference_steps: {steps} is below 1")
    for name, value in (("strength", strength), ("mask", mask)):
        if value is not None and image is None:
            raise UserError(f"{name}: has no effect without an image; give image=..., or leave it out")
    if seed is not None and generator is not None:
        raise UserError("seed: given together with a generator; give one of them")
    if latents is not None and (seed is not None or generator is not None):
        raise UserError("latents: are the noise already; leave out seed and generator")


def make_guidance(
    scale: float | None,
    autoguidance: float,
    interval: tuple[float, float],
    rescale: float,
    *,
    labelled: bool,
    weak: bool,
) -> Guidance:
    """The guidance of a call with or without labels, of a pipeline with or without a second U-Net.

    Raises:
        UserError: one without effect, or impossible.
    """
    if not labelled and scale not in (None, 1):
        raise UserError(f"guidance_scale: {scale} has no effect without a label; leave it out or give a label")
    if autoguidance != 1 and not weak:
        raise UserError(
            f"autoguidance_scale: {autoguidance} needs a second U-Net; load the pipeline with autoguidance_unet=..."
        )
    by_label = 1.0 if not labelled else DEFAULT_GUIDANCE if scale is None else scale
    if rescale and by_label == autoguidance == 1:
        raise UserError(f"guidance_rescale: {rescale} has no effect without guidance; leave it out")
    return Guidance(by_label, autoguidance, (interval[0], interval[1]), rescale)


def count_images(labels: Labels, num_images: int | None, image: Any, latents: Tensor | None) -> int:
    """Images to make: what is asked for, or as many as there are of anything."""
    if num_images is not None and num_images < 1:
        raise UserError(f"num_images: {num_images} is below 1")
    if latents is not None and num_images not in (None, len(latents)):
        raise UserError(f"latents: {len(latents)} of them for {pluralize(num_images, 'image')}; give one per image")
    if num_images is not None or latents is not None:
        return num_images or len(latents)  # type: ignore[arg-type]
    many = len(editing.to_tensor(image, 3, "image")) if image is not None else 1
    return max(many, len(labels)) if isinstance(labels, list | tuple) else many


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | None, count: int
) -> list[torch.Generator | None]:
    """One generator per image (the same object for all when one was given)."""
    if seed is not None:
        return [image_generator(seed, index) for index in range(count)]
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise UserError(
            f"generator: {len(generator)} of them for {pluralize(count, 'image')}; give one per image, or one for all"
        )
    return list(generator)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator behind image `index` of `seed`: a CPU generator, so that every device starts from equal noise."""
    return random.generator(seed, "image", index)


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator | None], device: torch.device) -> Tensor:
    """Standard normal (n, c, h, w), float32, drawn image by image on each generator's own device."""
    noise = [torch.randn(*shape, generator=g, device=g.device if g else device).to(device) for g in generators]
    return torch.stack(noise)


# `LatentDiffusionPipeline`: from labels and a seed to images; a diffusers pipeline that knows its autoencoder.

Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class LatentDiffusionPipeline(DiffusionPipeline):
    """Generates images, unconditionally or by class label.

    `save_pretrained` and `from_pretrained` are exact, in half precision too (`variant="fp16"`): a directory knows the
    fingerprints of its encoder's roundings. Sampling itself is float32 whatever the networks are.
    """

    model_cpu_offload_seq = "autoguidance_unet->unet->autoencoder"
    _optional_components = ["autoguidance_unet"]  # noqa: RUF012 - as in every diffusers pipeline
    _callback_tensor_inputs = ["latents", "clean"]  # noqa: RUF012

    autoencoder: Autoencoder
    unet: LatentUNet
    scheduler: Any
    autoguidance_unet: LatentUNet | None

    def __init__(
        self,
        autoencoder: ModelMixin,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        normalizer: dict | None = None,
        latent_size: list | tuple = (64, 64),
        label_names: list | tuple = (),
        encoder_fingerprint: str | None = None,
        preprocessing: dict | None = None,
        latent_rgb: dict | None = None,
        autoguidance_unet: ModelMixin | None = None,
        rounded_encoders: dict | None = None,
        training: dict | None = None,
    ) -> None:
        """
        Args:
            autoencoder: Any diffusers autoencoder with a latent distribution.
            unet: A `LatentUNet`, or a module of the same interface.
            scheduler: One that `schedulers.sampler_of` accepts; its shift belongs to latents of `latent_size`.
            normalizer: `LatentNormalizer.to_dict()`, required: the statistics the U-Net was trained with.
            latent_size: (h, w) of the latents in training; the size of generated images where none is asked for.
            label_names: One name per class; left out, the classes are called "0", "1", ...
            encoder_fingerprint: Of the encoder that made the latents; left out, the given autoencoder is trusted.
            preprocessing: What was done to the pictures behind the latents; None where it was not recorded.
            latent_rgb: `previews.fit_latent_rgb()` of latents and images; needed for previews only.
            autoguidance_unet: A worse U-Net for the same latents and labels: smaller, or less trained.
            rounded_encoders: Fingerprints of the encoder in half precision; left out, they are computed.
            training: What its training recorded, for the model card.

        Raises:
            UserError: parts that do not belong together: channels, number of labels, another autoencoder.
        """
        super().__init__()
        if normalizer is None:
            raise UserError("pipeline: no normaliser; pass normalizer=LatentNormalizer(...).to_dict() of the latents")
        self.normalizer = LatentNormalizer.from_dict(normalizer)
        classes = int(unet.config["num_classes"])
        names = [str(name) for name in label_names] or [str(number) for number in range(classes)]
        autoencoder = as_autoencoder(autoencoder)
        self._check_parts(autoencoder, unet, len(self.normalizer.mean), names)
        if autoguidance_unet is not None:
            self._check_parts(autoencoder, autoguidance_unet, len(self.normalizer.mean), names)
        self.register_modules(
            autoencoder=autoencoder, unet=unet, scheduler=scheduler, autoguidance_unet=autoguidance_unet
        )
        for part in filter(None, (unet, autoguidance_unet)):  # as in training: faster, and the same rounding
            nn.Module.to(part, memory_format=torch.channels_last)  # type: ignore[call-overload]
        fingerprint, rounded_encoders = saving.check_encoder(autoencoder, encoder_fingerprint, rounded_encoders)
        self.register_to_config(
            normalizer=self.normalizer.to_dict(),
            latent_size=[int(side) for side in latent_size],
            label_names=names,
            encoder_fingerprint=fingerprint,
            preprocessing=preprocessing,
            latent_rgb=latent_rgb,
            rounded_encoders=rounded_encoders,
            training=training,
        )

    @staticmethod
    def _check_parts(autoencoder: Autoencoder, unet: Any, channels: int, names: Sequence[str]) -> None:
        found = {"U-Net": int(unet.config["latent_channels"]), "autoencoder": autoencoder.latent_channels}
        for part, count in found.items():
            if count != channels:
                raise UserError(
                    f"pipeline: the {part} has {count} latent channels, the latent statistics have {channels}; "
                    "use the autoencoder and the U-Net that belong to these latents"
                )
        if len(names) != int(unet.config["num_classes"]):
            raise UserError(
                f"pipeline: {len(names)} label names for a U-Net of {unet.config['num_classes']} classes; "
                "take both from one run"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Like diffusers', from a directory or hub id; refuses an autoencoder that the latents did not come from.

        `torch_dtype` (one for all parts, or a dict by part) is applied after the check, which needs float32 weights.
        Raises: UserError for parts that do not belong together, or damaged ones: see `seal` and `weights`.
        """
        dtypes = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if not isinstance(dtypes, torch.dtype | dict | None):
            raise UserError(f"torch_dtype: {dtypes!r} is no torch.dtype; give for instance torch.bfloat16")
        directory = Path(pretrained_model_name_or_path)
        if directory.is_dir():
            check_checksums(directory)
        else:
            directory = Path(cls.download(pretrained_model_name_or_path, **kwargs))
        parts = load_components(directory, except_parts=kwargs, variant=kwargs.get("variant"))
        pipeline = super().from_pretrained(directory, **parts | kwargs)
        pipeline.register_to_config(_name_or_path=directory.name)  # else it would save the path in model_index.json
        for name in ("autoencoder", "unet", "autoguidance_unet"):
            dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
            if dtype is not None and getattr(pipeline, name) is not None:
                # torch's own `to`: that of diffusers warns of modules that are to stay in float32, where there are none
                nn.Module.to(getattr(pipeline, name), dtype)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """The snapshot of a hub repository: that of diffusers refuses parts whose classes are not its own."""
        return saving.download(pretrained_model_name, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Like diffusers', which alone takes over no part but of the very class that the constructor names."""
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        return super().from_pipe(pipeline, **parts | kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Like diffusers', with a checksum of every file beside them, and a model card where there is none yet."""
        super().save_pretrained(str(save_directory), *args, **kwargs)
        if not (Path(save_directory) / saving.CARD).exists():
            saving.write_card(self, Path(save_directory))
        write_checksums(Path(save_directory))

    def _upload_folder(self, working_dir: Any, repo_id: str, token: Any = None, **kwargs: Any) -> Any:
        """diffusers writes a card without content before it uploads, unless the repository has one."""
        if not huggingface_hub.file_exists(repo_id, saving.CARD, token=token):
            saving.write_card(self, Path(working_dir), repo_id)
        write_checksums(Path(working_dir), saving.listed_on_hub(repo_id, token, kwargs.get("subfolder")))
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    def check_latents(self, manifest: Manifest) -> None:
        """For whoever brings latents of a set to this pipeline: that they are what its U-Net was trained on.

        Raises:
            UserError: codes, or latents of another encoder or preprocessing, with both values of each differing field.
        """
        manifest.normalizer  # noqa: B018 - codes have none
        expected = {"autoencoder": {"encoder_fingerprint": self.config["encoder_fingerprint"]}}
        if self.config["preprocessing"] is not None:
            expected["preprocessing"] = dict(self.config["preprocessing"])
        advice = "'here' is the pipeline: give it latents that were made like those that it was trained on"
        check_same(expected, manifest.to_dict(), manifest.where.location, advice)

    @property
    def labels(self) -> list[str]:
        """The label names, empty for an unconditional model."""
        return list(self.config["label_names"])

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels, the training size where None. Raises: UserError for an impossible side."""
        factor = self.autoencoder.downsampling
        sides = []
        for name, asked, trained in zip(("height", "width"), (height, width), self.config["latent_size"]):
            if asked is not None and (asked < factor or asked % factor):
                near = max(1, round(asked / factor)) * factor
                raise UserError(f"{name}: {asked} is not a multiple of {factor}; {near} is the nearest")
            sides.append(trained * factor if asked is None else asked)
        return sides[0], sides[1]

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of the latents of an image. Raises: UserError for an impossible side."""
        factor = self.autoencoder.downsampling
        height, width = self.image_size(height, width)
        return self.autoencoder.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def __call__(
        self,
        labels: Labels = None,
        num_images: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = FULL_INTERVAL,
        guidance_rescale: float = 0.0,
        autoguidance_scale: float = 1.0,
        sampler: str | None = None,
        image: editing.ImageInput | None = None,
        strength: float | None = None,
        mask: editing.ImageInput | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one batch. On CPU, an image is the same to the last bit whatever else is in the batch.

        Args:
            labels: Names or class ids, repeated in turn until there are `num_images`; a mapping such as
                `{"cat": 0.7, "dog": 0.3}` in the place of one mixes classes; None: any class.
            num_images: Images in the batch; left out, one per label or image, or one.
            height, width: Pixels, multiples of the autoencoder's downsampling; left out, those of `image` or `latents`,
                or the training size. Large images are decoded in tiles.
            num_inference_steps: Steps from noise to image; `heun` runs the U-Net twice in each.
            guidance_scale: 1 is the plain conditional model, larger follows the label more closely
                (classifier-free guidance, at twice the cost); left out, 3 with labels.
            guidance_interval: Lowest and highest t in [0, 1] at which any guidance acts; 1 is pure noise.
            guidance_rescale: 0 to 1, against the strong colours of strong guidance; 0.7 is usual.
            autoguidance_scale: How far to go away from the `autoguidance_unet`; 1 is none, 1.5 to 2 is usual.
            sampler: euler, heun, dpm++ or unipc, instead of the pipeline's scheduler.
            image: Where to start: one for all images or one each; PIL, arrays (h, w, 3) or tensors (3, h, w) in [0, 1].
            strength: Share of the steps that `image` goes through, in (0, 1]: small values stay close to it; left out,
                1 with a mask and 0.6 without. Several seeds make variations.
            mask: Of the size of `image`: only where it is above one half is painted, every other pixel stays exactly.
            latents: Noise to start from instead of random one, (n, c, h/8, w/8), standard normal.
            generator: One for all images, or one per image.
            seed: Image i starts from the noise of (seed, i), whatever the batch; not together with `generator`.
            output_type: pil, np (n, h, w, 3) or pt (n, 3, h, w) in [0, 1], or latent: the autoencoder's own latents.
            return_dict: False gives the tuple (images,).
            callback_on_step_end: Called as (pipeline, index, timestep, tensors) with the normalised `latents`, and in
                `clean` what they are expected to become, for `preview`; `latents` in the dict that it returns
                replace them.

        Raises:
            UserError: an unknown label (with the nearest known one), an impossible size, or settings without effect.
        """
        check_call(output_type, num_inference_steps, image, strength, mask, latents, generator, seed)
        count = count_images(labels, num_images, image, latents)
        classes = class_weights(labels, count, self.labels)
        guidance = make_guidance(
            guidance_scale, autoguidance_scale, guidance_interval, guidance_rescale,
            labelled=classes is not None, weak=self.autoguidance_unet is not None,
        )  # fmt: skip
        source = None if image is None else editing.read_init_image(image, mask, count, self.autoencoder.downsampling)
        shape = self._shape(height, width, source, latents)
        if latents is None:
            latents = draw_noise(shape, image_generators(generator, seed, count), self._execution_device)
        if strength is None and source is not None:
            strength = source.default_strength
        first = 0 if strength is None else first_step(num_inference_steps, strength)
        solvers = self._solvers(sampler, num_inference_steps, shape, first, count)
        noise = latents.to(self._execution_device, torch.float32)
        finished = self._sample(noise, source, solvers, classes, guidance, first, callback_on_step_end)
        images = self._output(self.normalizer.denormalize(finished), output_type, source)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(
        self,
        noise: Tensor,
        source: editing.InitImage | None,
        solvers: Sequence[Solver],
        classes: ClassWeights | None,
        guidance: Guidance,
        first: int,
        callback: Callback | None,
    ) -> Tensor:
        """From noise, or a noisy image, to clean normalised latents (n, c, h, w)."""
        groups = self._groups(len(noise))
        velocities = [
            GuidedVelocity(self.unet, self.autoguidance_unet, classes and classes[g], guidance) for g in groups
        ]
        times = solvers[0].times
        x = noise
        if source is not None:
            clean = self._encode(source)
            x = flow.interpolate(clean, noise, noise.new_full((len(noise),), times[first]))
        for index in self.progress_bar(range(first, len(times) - 1)):
            moved = [solver.step(v, x[rows], index) for solver, v, rows in zip(solvers, velocities, groups)]
            x, expected = (torch.cat(parts) for parts in zip(*moved))
            if source is not None and source.mask is not None:
                known = flow.interpolate(clean, noise, noise.new_full((len(noise),), times[index + 1]))
                x = torch.where(source.latent_mask(self.autoencoder.downsampling).to(x.device), x, known)
            if callback is not None:
                tensors = {"latents": x, "clean": expected}
                x = (callback(self, index - first, torch.tensor(1000 * times[index]), tensors) or {}).get("latents", x)
        return x

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Rough pictures of normalised latents (n, c, h, w), one pixel per position, in no time: during sampling, of
        the `clean` latents that a callback gets.

        Raises:
            UserError: the pipeline has no `latent_rgb`.
        """
        if self.config["latent_rgb"] is None:
            raise UserError("preview: this pipeline has no latent_rgb; make it with latent_rgb=fit_latent_rgb(...)")
        return transforms.to_pil(latents_to_rgb(latents, self.config["latent_rgb"]))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) in the autoencoder's own units -> images (n, 3, fh, fw) in [-1, 1], on the CPU.

        One at a time: bounded memory, and no image depends on its neighbours. Above `tiling.TILE` positions along a
        side in tiles.
        """
        return torch.cat([self._decode_one(latent[None]).cpu() for latent in latents])

    def _decode_one(self, latent: Tensor) -> Tensor:
        if max(latent.shape[-2:]) <= editing.TILE:
            return self.autoencoder.decode_images(latent)
        return editing.decode_in_tiles(
            lambda part: self.autoencoder.decode_images(part),
            latent,
            factor=self.autoencoder.downsampling,
            context=self.autoencoder.decoder_context,
            tile=editing.TILE,
        )

    def _encode(self, source: editing.InitImage) -> Tensor:
        """Normalised posterior means (n, c, h, w) of images, one at a time."""
        device = self._execution_device
        images = (2 * source.images - 1).split(1)
        means = [self.autoencoder.encode_moments(image.to(device))[0] for image in images]
        return self.normalizer.normalize(torch.cat(means))

    def _output(self, latents: Tensor, output_type: str, source: editing.InitImage | None) -> Any:
        if output_type == "latent":
            return latents
        images = (self.decode(latents) + 1) / 2
        if source is not None:
            images = source.paste(images)
        if output_type == "pil":
            return transforms.to_pil(2 * images - 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()

    def _groups(self, count: int) -> list[slice]:
        """The images that go through the network together: one on CPU, where its convolutions are computed in another
        order for another batch size; all of them elsewhere."""
        if self._execution_device.type == "cpu":
            return [slice(index, index + 1) for index in range(count)]
        return [slice(0, count)]

    def _solvers(self, sampler: str | None, steps: int, shape: Sequence[int], first: int, count: int) -> list[Solver]:
        """One per group of `count` images. A larger latent gets a larger shift."""
        trained_height, trained_width = self.config["latent_size"]
        sampler_name(self.scheduler)
        shift = scheduler_shift(self.scheduler) * math.sqrt(shape[1] * shape[2] / (trained_height * trained_width))
        scheduler = self.scheduler if sampler is None else flow_scheduler(shift, sampler)
        return [make_solver(scheduler, steps, shift, first) for _ in self._groups(count)]

    def _shape(
        self, height: int | None, width: int | None, source: editing.InitImage | None, latents: Tensor | None
    ) -> tuple[int, int, int]:
        """(c, h, w) of the latents, the size from whatever has one."""
        factor, channels = self.autoencoder.downsampling, self.autoencoder.latent_channels
        if latents is not None and latents.shape[1:2] != (channels,):
            raise UserError(f"latents: shape {tuple(latents.shape)}; give (n, {channels}, h, w)")
        sides: list[tuple[str, tuple[int, int]]] = []
        if source is not None:
            sides.append(("image", (source.images.shape[-2], source.images.shape[-1])))
        if latents is not None:
            sides.append(("latents", (factor * latents.shape[-2], factor * latents.shape[-1])))
        given = sides[0][1] if sides else (None, None)
        asked = self.image_size(height or given[0], width or given[1])
        for name, found in sides:
            if found != asked:
                raise UserError(
                    f"{name}: of {found[0]} x {found[1]} pixels for {asked[0]} x {asked[1]}; fit one to the other"
                )
        return self.latent_shape(*asked)


# `DiffusionPipeline.from_pretrained` looks for the class that a directory names among the names of diffusers.
diffusers.LatentDiffusionPipeline = LatentDiffusionPipeline
