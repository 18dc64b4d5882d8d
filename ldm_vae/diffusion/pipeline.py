"""`LatentDiffusionPipeline`: from labels and a seed to images; a diffusers pipeline that checks its autoencoder.

    labels -> class weights, seed -> noise, image -> latents       arguments of the call (`editing` reads images)
    -> GuidedVelocity of the U-Net, Solver.step, step by step      `samplers`
    -> clean latents -> images, one at a time, in tiles if large   `decode`

Contains the meaning of every argument of the call, and the short card that is saved with a pipeline. `saving` reads and
checks directories.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
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
from ldm_vae.data.image_input import ImageInput
from ldm_vae.data.sources import WHOLE_NUMBER
from ldm_vae.diffusion import editing, flow, saving
from ldm_vae.diffusion.samplers import (
    FULL_INTERVAL,
    ClassWeights,
    Guidance,
    GuidedVelocity,
    Solver,
    first_step,
    flow_scheduler,
    make_solver,
    scheduler_shift,
)
from ldm_vae.diffusion.unet import LatentUNet
from ldm_vae.errors import UserError
from ldm_vae.files import check_checksums, write_checksums, write_text
from ldm_vae.latents.format import Manifest, check_same
from ldm_vae.latents.normalizer import LatentNormalizer
from ldm_vae.utils.numbers import plain_number, whole_number
from ldm_vae.utils.text import pluralize

DEFAULT_GUIDANCE = 3.0
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Label = str | int
ClassMixture = Mapping[Any, float]
"""Labels and their shares, for example `{"cat": 0.7, "dog": 0.3}`."""
Labels = Label | ClassMixture | Sequence[Label | ClassMixture] | None
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class LatentDiffusionPipeline(DiffusionPipeline):
    """Generates images, unconditionally or by class label.

    ```python
    pipeline = LatentDiffusionPipeline.from_pretrained("runs/diffusion/pipeline")
    images = pipeline(["cat", "dog"], num_images=4, seed=0).images  # 4 PIL images, cat and dog in turn
    batch = pipeline("cat", height=512, width=768, output_type="pt").images  # (1, 3, 512, 768) in [0, 1]
    ```

    `save_pretrained` and `from_pretrained` are exact, in half precision too (`variant="fp16"`): a directory records the
    fingerprints of its encoder in each half precision. Sampling itself is float32 in every precision of the networks.
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
            autoencoder: One of this package, or of diffusers with a latent distribution.
            unet: A `LatentUNet`, or a module of the same interface.
            scheduler: One that `samplers.sampler_name` accepts; its shift belongs to latents of `latent_size`.
            normalizer: `LatentNormalizer.to_dict()`, required: the statistics the U-Net was trained with.
            latent_size: (h, w) of the latents in training; the default size of generated images.
            label_names: One name per class; by default "0", "1", ...
            encoder_fingerprint: Fingerprint of the encoder of the latents; by default that of the given autoencoder.
            preprocessing: How the encoded images were prepared; None if not recorded.
            latent_rgb: `fit_latent_rgb()` of latents and images; needed for previews only.
            autoguidance_unet: A worse U-Net for the same latents and labels: smaller, or less trained.
            rounded_encoders: Fingerprints of the encoder in half precision; computed by default.
            training: Records of its training, for the model card.

        Raises:
            UserError: components that do not fit: channels, number of labels, another autoencoder.
        """
        super().__init__()
        if normalizer is None:
            raise UserError("pipeline: no normalizer; pass normalizer=LatentNormalizer(...).to_dict() of the latents")
        self.normalizer = LatentNormalizer.from_dict(normalizer)
        classes = int(unet.config["num_classes"])
        names = [str(name) for name in label_names] or [str(number) for number in range(classes)]
        autoencoder = as_autoencoder(autoencoder)
        self._check_components(autoencoder, unet, len(self.normalizer.mean), names)
        if autoguidance_unet is not None:
            self._check_components(autoencoder, autoguidance_unet, len(self.normalizer.mean), names)
        self.register_modules(
            autoencoder=autoencoder, unet=unet, scheduler=scheduler, autoguidance_unet=autoguidance_unet
        )
        for network in filter(None, (unet, autoguidance_unet)):  # as in training: faster, and the same rounding
            nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
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
    def _check_components(autoencoder: Autoencoder, unet: Any, channels: int, names: Sequence[str]) -> None:
        found = {"U-Net": int(unet.config["latent_channels"]), "autoencoder": autoencoder.latent_channels}
        for name, count in found.items():
            if count != channels:
                raise UserError(
                    f"pipeline: the {name} has {count} latent channels, the latent statistics have {channels}; "
                    "use the autoencoder and the U-Net that belong to these latents"
                )
        if len(names) != int(unet.config["num_classes"]):
            raise UserError(
                f"pipeline: {len(names)} label names for a U-Net of {unet.config['num_classes']} classes; "
                "take both from one run"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Like diffusers', from a directory or hub id. Refuses an autoencoder that did not make the latents.

        `torch_dtype` (one for all components, or a dict by name) is applied after the check, which needs float32.

        Raises:
            UserError: damaged files, or components that do not fit.
        """
        dtypes = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if not isinstance(dtypes, torch.dtype | dict | None):
            raise UserError(f"torch_dtype: {dtypes!r} is not a torch.dtype; give for instance torch.bfloat16")
        directory = Path(pretrained_model_name_or_path)
        if directory.is_dir():
            check_checksums(directory)
        else:
            directory = Path(cls.download(pretrained_model_name_or_path, **kwargs))
        networks = saving.load_components(directory, skip=kwargs, variant=kwargs.get("variant"))
        with saving.without_bars():
            pipeline = super().from_pretrained(directory, **networks | kwargs)
        pipeline.register_to_config(_name_or_path=directory.name)  # otherwise model_index.json would get the path
        for name in ("autoencoder", "unet", "autoguidance_unet"):
            dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
            if dtype is not None and getattr(pipeline, name) is not None:
                # torch's own `to`: that of diffusers warns about modules to keep in float32, even without any
                nn.Module.to(getattr(pipeline, name), dtype)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """The snapshot of a hub repository. That of diffusers refuses components of other packages."""
        return saving.download(pretrained_model_name, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Like diffusers', which by default reuses only components of exactly the class in the constructor."""
        networks = {name: value for name, value in pipeline.components.items() if isinstance(value, nn.Module)}
        return super().from_pipe(pipeline, **networks | kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Like diffusers', with a checksum of every file, and a model card if there is none yet."""
        super().save_pretrained(str(save_directory), *args, **kwargs)
        path = Path(save_directory) / saving.CARD
        if not path.exists():
            write_text(path, pipeline_card(self))
        write_checksums(Path(save_directory))

    def _upload_folder(self, working_dir: Any, repo_id: str, token: Any = None, **kwargs: Any) -> Any:
        """diffusers writes a card without content before it uploads, unless the repository has one."""
        if not huggingface_hub.file_exists(repo_id, saving.CARD, token=token):
            write_text(Path(working_dir) / saving.CARD, pipeline_card(self, repo_id))
        write_checksums(Path(working_dir), saving.listed_on_hub(repo_id, token, kwargs.get("subfolder")))
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)

    def check_latents(self, manifest: Manifest) -> None:
        """Check that latents of a set are what the U-Net was trained on.

        Raises:
            UserError: codes, or latents of another encoder or preprocessing, with both values of each differing field.
        """
        manifest.normalizer  # noqa: B018 - codes have none
        expected = {"autoencoder": {"encoder_fingerprint": self.config["encoder_fingerprint"]}}
        if self.config["preprocessing"] is not None:
            expected["preprocessing"] = dict(self.config["preprocessing"])
        advice = "give latents that were made like those that the model was trained on"
        check_same(expected, manifest.to_dict(), manifest.where.location, advice)

    @property
    def labels(self) -> list[str]:
        """The label names, empty for an unconditional model."""
        return list(self.config["label_names"])

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels; None stands for the training size. Raises: UserError for an impossible side."""
        factor = self.autoencoder.downsampling
        sides = []
        for name, given, trained in zip(("height", "width"), (height, width), self.config["latent_size"]):
            side = None if given is None else whole_number(given, name)
            if side is not None and (side < factor or side % factor):
                near = max(1, round(side / factor)) * factor
                raise UserError(f"{name}: {side} is not a multiple of {factor}; {near} is the nearest")
            sides.append(trained * factor if side is None else side)
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
        image: ImageInput | None = None,
        strength: float | None = None,
        mask: ImageInput | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one batch. On CPU, an image is bit-identical in every batch.

        Args:
            labels (`str`, `int`, mapping or list, *optional*): Class names or ids, repeated in turn until there are
                `num_images`. A mapping such as `{"cat": 0.7, "dog": 0.3}` mixes classes. None: any class.
            num_images (`int`, *optional*): Defaults to one per label, `image` or `latents`, or 1.
            height, width (`int`, *optional*): Pixels, multiples of the autoencoder's downsampling f; default to those
                of `image` or `latents`, or the training size. Large images are decoded in tiles.
            num_inference_steps (`int`, defaults to 30): Steps from noise to image; `heun` runs the U-Net twice in each.
            guidance_scale (`float`, defaults to 3 with labels): Classifier-free guidance at twice the cost; 1 is none.
            guidance_interval (`tuple`, defaults to (0, 1)): Lowest and highest t of any guidance; 1 is pure noise.
            guidance_rescale (`float` in [0, 1]): Against the strong colors of strong guidance; 0.7 is usual.
            autoguidance_scale (`float`): Guidance away from `autoguidance_unet`; 1 is none, 1.5 to 2 is usual.
            sampler (`str`, *optional*): euler, heun, dpm++ or unipc, instead of the pipeline's scheduler.
            image (*optional*): Images to start from, one for all or one each: files, PIL images, arrays (h, w, 3),
                tensors (3, h, w), batches or lists of these. For the meaning of their numbers see `data.image_input`.
            strength (`float` in (0, 1], *optional*): Share of the steps that are applied to `image`; small values stay
                close to it. Defaults to 1 with a mask and 0.6 without. Several seeds make variations.
            mask (as `image`, *optional*): White (255, 1, true) is repainted, other pixels do not change.
            latents (`Tensor` (n, c, h / f, w / f), *optional*): Standard normal noise to start from.
            generator (`torch.Generator` or list, *optional*): One for all, or one per image.
            seed (`int`, *optional*): Image i starts from the noise of (seed, i) in every batch; not with `generator`.
            output_type (`str`): "pil", "np" (n, h, w, 3), "pt" (n, 3, h, w) in [0, 1], or "latent", not normalized.
            return_dict (`bool`): False returns the tuple (images,).
            callback_on_step_end (`Callable`, *optional*): Called as (pipeline, index, timestep, tensors): normalized
                `latents`, and `clean`, their estimate for `preview`. `latents` in the returned dict replace them.

        Returns:
            `ImagePipelineOutput` whose `images` are a list of PIL images, an array or a tensor.

        Raises:
            UserError: an unknown label (with the nearest known one), an impossible size, or settings without effect.
        """
        labels, num_inference_steps = listed_labels(labels), whole_number(num_inference_steps, "num_inference_steps")
        check_arguments(output_type, num_inference_steps, image, strength, mask, latents, generator, seed)
        init = None if image is None else editing.read_init_image(image, mask, self.autoencoder.downsampling)
        count = count_images(labels, num_images, None if init is None else len(init), latents)
        init = None if init is None else init.expand(count)
        classes = class_weights(labels, count, self.labels)
        guidance = make_guidance(
            guidance_scale, autoguidance_scale, guidance_interval, guidance_rescale,
            labeled=classes is not None, weak=self.autoguidance_unet is not None,
        )  # fmt: skip
        shape = self._shape(height, width, init, latents)
        if latents is None:
            latents = draw_noise(shape, image_generators(generator, seed, count), self._execution_device)
        if strength is None and init is not None:
            strength = editing.default_strength(masked=init.mask is not None)
        first = 0 if strength is None else first_step(num_inference_steps, strength)
        solvers = self._solvers(sampler, num_inference_steps, shape, first, count)
        finished = self._sample(latents, init, solvers, classes, guidance, first, callback_on_step_end)
        images = self._output(self.normalizer.denormalize(finished), output_type, init)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(
        self,
        latents: Tensor,
        init: editing.InitImage | None,
        solvers: Sequence[Solver],
        classes: ClassWeights | None,
        guidance: Guidance,
        first: int,
        callback: Callback | None,
    ) -> Tensor:
        """From noise, or from an image and noise, to clean normalized latents (n, c, h, w)."""
        noise = latents.to(self._execution_device, torch.float32)
        groups = self._groups(len(noise))
        velocities = [
            GuidedVelocity(self.unet, self.autoguidance_unet, classes and classes[g], guidance) for g in groups
        ]
        times = solvers[0].times
        x = noise
        if init is not None:
            clean = self._encode(init)
            x = flow.interpolate(clean, noise, noise.new_full((len(noise),), times[first]))
        for index in self.progress_bar(range(first, len(times) - 1)):
            moved = [solver.step(v, x[rows], index) for solver, v, rows in zip(solvers, velocities, groups)]
            x, expected = (torch.cat(parts) for parts in zip(*moved))
            if init is not None and init.mask is not None:
                known = flow.interpolate(clean, noise, noise.new_full((len(noise),), times[index + 1]))
                x = torch.where(init.latent_mask(self.autoencoder.downsampling).to(x.device), x, known)
            if callback is not None:
                tensors = {"latents": x, "clean": expected}
                x = (callback(self, index - first, torch.tensor(1000 * times[index]), tensors) or {}).get("latents", x)
        return x

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Approximate images of normalized latents (n, c, h, w), one pixel per position, without the decoder. While
        sampling, pass the `clean` latents of the callback.

        Raises:
            UserError: the pipeline has no `latent_rgb`.
        """
        if self.config["latent_rgb"] is None:
            raise UserError("preview: this pipeline has no latent_rgb; make it with latent_rgb=fit_latent_rgb(...)")
        return transforms.to_pil(latents_to_rgb(latents, self.config["latent_rgb"]))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) in the autoencoder's own units -> images (n, 3, fh, fw) in [-1, 1], on the CPU.

        One at a time, so that memory is bounded and no image depends on the others. Latents of more than `editing.TILE`
        positions along a side are decoded in tiles.
        """
        return torch.cat([self._decode_one(latent[None]).cpu() for latent in latents])

    def _decode_one(self, latent: Tensor) -> Tensor:
        if max(latent.shape[-2:]) <= editing.TILE:
            return self.autoencoder.decode_images(latent)
        return editing.decode_in_tiles(
            self.autoencoder.decode_images,
            latent,
            factor=self.autoencoder.downsampling,
            context=self.autoencoder.decoder_context,
            tile=editing.TILE,
        )

    def _encode(self, init: editing.InitImage) -> Tensor:
        """Normalized posterior means (n, c, h, w) of images, one at a time."""
        device = self._execution_device
        images = (2 * init.images - 1).split(1)
        means = [self.autoencoder.encode_moments(image.to(device))[0] for image in images]
        return self.normalizer.normalize(torch.cat(means))

    def _output(self, latents: Tensor, output_type: str, init: editing.InitImage | None) -> Any:
        if output_type == "latent":
            return transforms.finite_pixels(latents, "latents")
        images = (self.decode(latents) + 1) / 2
        if init is not None:
            images = init.paste(images)
        if output_type == "pil":
            return transforms.to_pil(2 * images - 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()

    def _groups(self, count: int) -> list[slice]:
        """The images in one pass of the network: one on CPU, where the order of operations in convolutions depends on
        the batch size; all on other devices."""
        if self._execution_device.type == "cpu":
            return [slice(index, index + 1) for index in range(count)]
        return [slice(0, count)]

    def _solvers(self, sampler: str | None, steps: int, shape: Sequence[int], first: int, count: int) -> list[Solver]:
        """One solver per group of `count` images. A larger latent gets a larger shift."""
        trained_height, trained_width = self.config["latent_size"]
        shift = scheduler_shift(self.scheduler) * math.sqrt(shape[1] * shape[2] / (trained_height * trained_width))
        scheduler = self.scheduler if sampler is None else flow_scheduler(shift, sampler)
        return [make_solver(scheduler, steps, shift, first) for _ in self._groups(count)]

    def _shape(
        self, height: int | None, width: int | None, init: editing.InitImage | None, latents: Tensor | None
    ) -> tuple[int, int, int]:
        """(c, h, w) of the latents, with the size of the arguments that have one."""
        factor, channels = self.autoencoder.downsampling, self.autoencoder.latent_channels
        if latents is not None and latents.shape[1:2] != (channels,):
            raise UserError(f"latents: shape {tuple(latents.shape)}; give (n, {channels}, h, w)")
        sides: list[tuple[str, tuple[int, int]]] = []
        if init is not None:
            sides.append(("image", (init.images.shape[-2], init.images.shape[-1])))
        if latents is not None:
            sides.append(("latents", (factor * latents.shape[-2], factor * latents.shape[-1])))
        given = sides[0][1] if sides else (None, None)
        size = self.image_size(height or given[0], width or given[1])
        for name, found in sides:
            if found != size:
                raise UserError(
                    f"{name}: of {found[0]} x {found[1]} pixels for {size[0]} x {size[1]}; fit one to the other"
                )
        return self.latent_shape(*size)


# `DiffusionPipeline.from_pretrained` searches diffusers for the class in model_index.json.
diffusers.LatentDiffusionPipeline = LatentDiffusionPipeline


# Labels: names, ids and mixtures of them.


def listed_labels(labels: Any) -> Any:
    """Labels with Python's lists and numbers in place of arrays and tensors."""
    if isinstance(labels, list | tuple):
        return [listed_labels(label) for label in labels]
    return labels.tolist() if isinstance(labels, np.ndarray | Tensor) else labels


def class_weights(labels: Labels, count: int, names: Sequence[str]) -> ClassWeights | None:
    """The classes of `count` images, with the labels repeated in turn; None for any class.

    Raises:
        UserError: an unknown label, more labels than images, or a mixture without a positive sum.
    """
    if labels is None:
        return None
    each: list[Any] = list(labels) if isinstance(labels, list | tuple) else [labels]
    if not each or count < len(each):
        raise UserError(
            f"labels: {len(each)} of them for {pluralize(count, 'image')}; ask for at least one image per label"
        )
    mixtures = [label if isinstance(label, Mapping) else {label: 1.0} for label in each]
    columns = max(len(mixture) for mixture in mixtures)
    ids, weights = torch.zeros(len(each), columns, dtype=torch.long), torch.zeros(len(each), columns)
    for row, mixture in enumerate(mixtures):
        mixture = {label: plain_number(share, f"labels: {label!r}") for label, share in mixture.items()}
        total = sum(mixture.values())
        if not total > 0 or min(mixture.values()) < 0:
            raise UserError(f"labels: the shares of {dict(mixture)} must be positive; give for instance one half each")
        for column, (label, share) in enumerate(mixture.items()):
            ids[row, column] = find_label(label, names)
            weights[row, column] = share / total
    turn = torch.arange(count) % len(each)
    return ClassWeights(ids[turn], weights[turn])


def find_label(label: Label, names: Sequence[str]) -> int:
    """The class id of a name, of an id, or of an id as text. Names come before ids; case is ignored.

    Raises:
        UserError: an unknown label, with the nearest known one.
    """
    if not names:
        raise UserError(f"label {label!r}: this model is unconditional, it has no labels; leave it out")
    if not isinstance(label, str):
        label = whole_number(label, "labels")
    else:
        by_name = {name.casefold(): number for number, name in reversed(list(enumerate(names)))}
        if label in names:
            return list(names).index(label)
        if label.casefold() in by_name:
            return by_name[label.casefold()]
    number = label if not isinstance(label, str) else int(label) if WHOLE_NUMBER.fullmatch(label) else None
    if number is not None and 0 <= number < len(names):
        return number
    near = difflib.get_close_matches(str(label), names, n=1, cutoff=0.5)
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"label {label!r}: unknown; {hint}known labels: {known}; or an id from 0 to {len(names) - 1}")


# The other arguments of the call: the number of images, the noise, and checks.


def check_arguments(
    output_type: str, steps: int, image: Any, strength: Any, mask: Any, latents: Any, generator: Any, seed: Any
) -> None:
    """Raises: UserError for impossible values and for settings without effect."""
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
    labeled: bool,
    weak: bool,
) -> Guidance:
    """The guidance of a call.

    Raises:
        UserError: guidance without effect, or impossible.
    """
    scale = None if scale is None else plain_number(scale, "guidance_scale")
    if not labeled and scale not in (None, 1):
        raise UserError(f"guidance_scale: {scale} has no effect without a label; leave it out or give a label")
    if autoguidance != 1 and not weak:
        raise UserError(
            f"autoguidance_scale: {autoguidance} needs a second U-Net; load the pipeline with autoguidance_unet=..."
        )
    by_label = 1.0 if not labeled else DEFAULT_GUIDANCE if scale is None else scale
    if rescale and by_label == autoguidance == 1:
        raise UserError(f"guidance_rescale: {rescale} has no effect without guidance; leave it out")
    low, high = (plain_number(time, "guidance_interval") for time in interval)
    return Guidance(
        by_label, plain_number(autoguidance, "autoguidance_scale"), (low, high),
        plain_number(rescale, "guidance_rescale"),
    )  # fmt: skip


def count_images(labels: Labels, num_images: int | None, given: int | None, latents: Tensor | None) -> int:
    """Number of images to make: `num_images`, or the number of latents, `given` images or labels."""
    num_images = None if num_images is None else whole_number(num_images, "num_images")
    if num_images is not None and num_images < 1:
        raise UserError(f"num_images: {num_images} is below 1")
    if latents is not None and num_images not in (None, len(latents)):
        raise UserError(f"latents: {len(latents)} of them for {pluralize(num_images, 'image')}; give one per image")
    if num_images is not None or latents is not None:
        return num_images or len(latents)  # type: ignore[arg-type]
    count = given or 1
    return max(count, len(labels)) if isinstance(labels, list | tuple) else count


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | None, count: int
) -> list[torch.Generator | None]:
    """One generator per image (a single given generator is used for all)."""
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
    """The generator of image `index` of `seed`, on the CPU, so that the noise is the same for every device."""
    return random.generator(seed, "image", index)


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator | None], device: torch.device) -> Tensor:
    """Standard normal (n, c, h, w), float32, drawn image by image on each generator's own device."""
    noise = [torch.randn(*shape, generator=g, device=g.device if g else device).to(device) for g in generators]
    return torch.stack(noise)


# Previews: a linear map of each latent position to one RGB pixel, without the decoder.


def fit_latent_rgb(latents: Tensor, images: Tensor) -> dict[str, Any]:
    """The `latent_rgb` of a pipeline: least squares from latents to images reduced to one pixel per position.

    A hundred pairs are enough, since each has thousands of positions.

    Args:
        latents: Normalized, (n, c, h, w).
        images: Of these latents, (n, 3, fh, fw) in [-1, 1].

    Returns:
        `weights`, 3 lists of c numbers, and `bias`, 3 numbers (JSON-able).
    """
    small = F.interpolate(images.float(), size=latents.shape[-2:], mode="area")
    positions = latents.double().movedim(1, -1).flatten(0, -2)
    colors = small.double().movedim(1, -1).flatten(0, -2)
    inputs = torch.cat([positions, torch.ones_like(positions[:, :1])], dim=1)
    # gelsd works with a dead channel; it exists on CPU only
    solution = torch.linalg.lstsq(inputs.cpu(), colors.cpu(), driver="gelsd").solution
    return {"weights": solution[:-1].T.tolist(), "bias": solution[-1].tolist()}


def latents_to_rgb(latents: Tensor, latent_rgb: Mapping[str, Any]) -> Tensor:
    """Normalized latents (n, c, h, w) -> images (n, 3, h, w), float32, clamped to [-1, 1]. Raises: NotFinite."""
    weights, bias = (torch.tensor(latent_rgb[key]).to(latents.device) for key in ("weights", "bias"))
    colors = torch.einsum("nchw,dc->ndhw", latents.float(), weights) + bias.view(1, 3, 1, 1)
    return transforms.finite_pixels(colors, "latents").clamp(-1, 1)


# The card of a saved pipeline, from the records in its directory. `ldm-vae model card` writes a longer one.

CARD_TEXT = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- ldm_vae
- latent-diffusion
---

# Latent diffusion, {height}x{width}

A `LatentDiffusionPipeline` of the package `ldm_vae`: no text, {kind}.

```python
from ldm_vae.diffusion.pipeline import LatentDiffusionPipeline

pipeline = LatentDiffusionPipeline.from_pretrained("{where}")
image = pipeline({label}, seed=0).images[0]
```

| | |
|---|---|
{rows}

This card says what the directory records. On what images it was trained, their licence and what it must not be used for
stand here only if somebody adds it.
"""


def pipeline_card(pipeline: LatentDiffusionPipeline, where: str = "DIRECTORY") -> str:
    """README.md of a pipeline that is loaded from `where`."""
    height, width = pipeline.image_size()
    names, unet, settings = pipeline.labels, pipeline.unet, pipeline.config
    facts = {
        "Classes": ", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "") if names else "none",
        "U-Net": f"{sum(parameter.numel() for parameter in unet.parameters()) / 1e6:.1f} M parameters",
        "Autoencoder": f"{type(pipeline.autoencoder).__name__}, {pipeline.autoencoder.downsampling}x, "
        f"{len(pipeline.normalizer.mean)} channels",
        "Encoder of the latents": f"`{settings['encoder_fingerprint'][:19]}...`",
        "Scheduler": type(pipeline.scheduler).__name__,
        "Preprocessing": format_values(settings["preprocessing"] or {}) or "not recorded",
        "Training": format_values(settings["training"] or {}) or "not recorded",
    }
    return CARD_TEXT.format(
        height=height,
        width=width,
        kind=f"{len(names)} classes" if names else "no classes",
        where=where,
        label=repr(names[0]) if names else "num_images=1",
        rows="\n".join(f"| {name} | {words.replace('|', '/')} |" for name, words in facts.items()),
    )


def format_values(values: Mapping[str, Any]) -> str:
    """`steps 800, held_out/flow 0.748`."""
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in sorted(values.items()))  # fmt: skip
