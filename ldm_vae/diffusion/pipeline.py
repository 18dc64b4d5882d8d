"""`LatentDiffusionPipeline`: from labels and a seed to images; a diffusers pipeline that knows its autoencoder.

Owns sampling, guidance and what makes a saved model complete: autoencoder, U-Net, scheduler, normaliser, label names.
Files and captions are made in `generation.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_vae import compat
from ldm_vae.errors import UserError

compat.repair_torchvision()

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin

from ldm_vae import random
from ldm_vae.autoencoder import interface
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint as fingerprint_of_encoder
from ldm_vae.autoencoder.models import downsampling, latent_channels
from ldm_vae.data import pixels
from ldm_vae.diffusion.unet import LatentUNet
from ldm_vae.latents.manifest import Manifest, check_same
from ldm_vae.latents.normalizer import LatentNormalizer

DEFAULT_GUIDANCE = 3.0
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Label = str | int


def flow_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along times with the shift of the training times (`flow.resolution_shift`)."""
    return FlowMatchEulerDiscreteScheduler(shift=shift)


class LatentDiffusionPipeline(DiffusionPipeline):
    """Generates images, unconditionally or by class label.

    `save_pretrained` and `from_pretrained` are exact; a half-precision copy is no longer the same autoencoder, so
    save in float32 and choose the precision when loading (`torch_dtype`) or afterwards (`.to(torch.bfloat16)`).
    """

    model_cpu_offload_seq = "unet->autoencoder"

    autoencoder: Any
    unet: LatentUNet
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        autoencoder: ModelMixin,
        unet: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        normalizer: dict | None = None,
        latent_size: list | tuple = (64, 64),
        label_names: list | tuple = (),
        encoder_fingerprint: str | None = None,
        preprocessing: dict | None = None,
    ) -> None:
        """
        Args:
            autoencoder: Any diffusers autoencoder with a latent distribution.
            unet: A `LatentUNet`, or a module of the same interface.
            scheduler: Its `shift` belongs to latents of `latent_size`.
            normalizer: `LatentNormalizer.to_dict()`, required: the statistics the U-Net was trained with.
            latent_size: (h, w) of the latents in training; the size of generated images where none is asked for.
            label_names: One name per class; left out, the classes are called "0", "1", ...
            encoder_fingerprint: Of the encoder that made the latents; left out, the given autoencoder is trusted.
            preprocessing: What was done to the pictures behind the latents; None where it was not recorded.

        Raises:
            UserError: parts that do not belong together: channels, number of labels, another autoencoder.
        """
        super().__init__()
        if normalizer is None:
            raise UserError("pipeline: no normaliser; pass normalizer=LatentNormalizer(...).to_dict() of the latents")
        self.normalizer = LatentNormalizer.from_dict(normalizer)
        classes = int(unet.config["num_classes"])
        names = [str(name) for name in label_names] or [str(number) for number in range(classes)]
        self._check_parts(autoencoder, unet, len(self.normalizer.mean), names)
        self.register_modules(autoencoder=autoencoder, unet=unet, scheduler=scheduler)
        self.register_to_config(
            normalizer=self.normalizer.to_dict(),
            latent_size=[int(side) for side in latent_size],
            label_names=names,
            encoder_fingerprint=self._check_fingerprint(autoencoder, encoder_fingerprint),
            preprocessing=preprocessing,
        )

    @staticmethod
    def _check_parts(autoencoder: Any, unet: Any, channels: int, names: Sequence[str]) -> None:
        found = {"U-Net": int(unet.config["latent_channels"]), "autoencoder": latent_channels(autoencoder)}
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

    @staticmethod
    def _check_fingerprint(autoencoder: Any, expected: str | None) -> str:
        if expected is not None and autoencoder.dtype != torch.float32:
            return expected  # a cast copy has other weights; `from_pretrained` checks before it casts
        found = fingerprint_of_encoder(autoencoder)
        if expected not in (None, found):
            raise UserError(
                f"pipeline: encoder fingerprint is {found[:19]}..., the latents came from {expected[:19]}...; "
                "load it with the autoencoder that encoded the latents, or encode and train again"
            )
        return found

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Like diffusers', from a directory or hub id; refuses an autoencoder that the latents did not come from.

        `torch_dtype` (one for all parts, or a dict by part) is applied after the check, which needs float32 weights.
        Convolutions are laid out channels_last, as in training: faster, and the same rounding.
        """
        dtypes = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name in ("autoencoder", "unet"):
            dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
            # torch's own `to`: that of diffusers warns of modules that are to stay in float32, where there are none
            part: Any = getattr(pipeline, name)
            nn.Module.to(part, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return pipeline

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
        factor = downsampling(self.autoencoder)
        sides = []
        for name, asked, trained in zip(("height", "width"), (height, width), self.config["latent_size"]):
            if asked is not None and (asked < factor or asked % factor):
                near = max(1, round(asked / factor)) * factor
                raise UserError(f"{name}: {asked} is not a multiple of {factor}; {near} is the nearest")
            sides.append(trained * factor if asked is None else asked)
        return sides[0], sides[1]

    @torch.no_grad()
    def __call__(
        self,
        labels: Label | Sequence[Label] | None = None,
        num_images: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one batch.

        Args:
            labels: Names or class ids, repeated in turn until there are `num_images`; None: any class.
            num_images: Images in the batch; left out, one per label, or one.
            height, width: Pixels, multiples of the autoencoder's downsampling; left out, the training size.
            num_inference_steps: Euler steps; the U-Net runs once per step, on twice the batch under guidance.
            guidance_scale: 1 is the plain conditional model, larger follows the label more closely
                (classifier-free guidance, Ho and Salimans 2022); left out, 3 with labels.
            generator: One for all images, or one per image.
            seed: Image i starts from the noise of (seed, i), whatever the batch; not together with `generator`.
            output_type: "pil", "np" (n, h, w, 3) or "pt" (n, 3, h, w) in [0, 1], or "latent": the autoencoder's
                own, unnormalised latents (n, c, h/8, w/8).
            return_dict: False gives the tuple (images,).
            callback_on_step_end: Called as (pipeline, index, timestep, {"latents": normalised latents}); latents in
                the dict that it returns replace them.

        Raises:
            UserError: an unknown label (with the nearest known one), an impossible size, or settings without effect.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type: {output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}")
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps: {num_inference_steps} is below 1")
        factor = downsampling(self.autoencoder)
        shape = (latent_channels(self.autoencoder), *(side // factor for side in self.image_size(height, width)))
        ids, count = self._class_ids(labels, num_images)
        scale = self._guidance(ids, guidance_scale)
        latents = self._noise(shape, self._generators(generator, seed, count), count)
        self._set_times(num_inference_steps, shape)
        with self.progress_bar(total=num_inference_steps) as bar:
            for index, timestep in enumerate(self.scheduler.timesteps):
                time = timestep / self.scheduler.config["num_train_timesteps"]
                velocity = self._velocity(latents, time, ids, scale)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, index, timestep, {"latents": latents})
                    latents = (changed or {}).get("latents", latents)
                bar.update()
        images = self._output(self.normalizer.denormalize(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, latents: Tensor, time: Tensor, ids: Tensor | None, scale: float) -> Tensor:
        """v at one time for the whole batch, float32; with guidance v_null + scale (v_label - v_null)."""
        if ids is None or scale == 1:
            return self.unet(latents, time, ids)
        null = torch.full_like(ids, int(self.unet.config["num_classes"]))
        conditional, unconditional = self.unet(torch.cat([latents, latents]), time, torch.cat([ids, null])).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _output(self, latents: Tensor, output_type: str) -> Any:
        """One image at a time through the decoder: bounded memory, and no image depends on its neighbours."""
        if output_type == "latent":
            return latents
        images = torch.cat([interface.decode(self.autoencoder, latent[None]).cpu() for latent in latents])
        if output_type == "pil":
            return pixels.to_pil(images)
        images = (images + 1) / 2
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()

    def _class_ids(self, labels: Label | Sequence[Label] | None, num_images: int | None) -> tuple[Tensor | None, int]:
        """Class ids (n,), or None without labels, and n."""
        if num_images is not None and num_images < 1:
            raise UserError(f"num_images: {num_images} is below 1")
        if labels is None:
            return None, num_images or 1
        wanted = [labels] if isinstance(labels, str | int) else list(labels)
        count = num_images or len(wanted)
        if not wanted or count < len(wanted):
            raise UserError(f"labels: {len(wanted)} of them for {count} images; ask for at least one image per label")
        ids = [find_label(label, self.labels) for label in wanted]
        return torch.tensor([ids[i % len(ids)] for i in range(count)], device=self._execution_device), count

    @staticmethod
    def _guidance(ids: Tensor | None, scale: float | None) -> float:
        if scale is None:
            return DEFAULT_GUIDANCE
        if ids is None and scale != 1:
            raise UserError(f"guidance_scale: {scale} has no effect without a label; leave it out or give a label")
        return scale

    @staticmethod
    def _generators(
        generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | None, count: int
    ) -> list[torch.Generator | None]:
        """One generator per image (the same object for all when one was given)."""
        if seed is not None:
            if generator is not None:
                raise UserError("seed: given together with a generator; give one of them")
            return [image_generator(seed, index) for index in range(count)]
        if generator is None or isinstance(generator, torch.Generator):
            return [generator] * count
        if len(generator) != count:
            raise UserError(
                f"generator: {len(generator)} of them for {count} images; give one per image, or one for all"
            )
        return list(generator)

    def _noise(self, shape: Sequence[int], generators: Sequence[torch.Generator | None], count: int) -> Tensor:
        """Standard normal (n, c, h, w), float32, drawn image by image on each generator's own device."""
        device = self._execution_device
        noise = [torch.randn(*shape, generator=g, device=g.device if g else device).to(device) for g in generators]
        assert len(noise) == count
        return torch.stack(noise)

    def _set_times(self, steps: int, shape: Sequence[int]) -> None:
        """Times from 1 down to 0, evenly spaced before the shift; a larger latent gets a larger shift.

        Given explicitly: the scheduler's own choice shifts its last time twice.
        """
        trained_height, trained_width = self.config["latent_size"]
        growth = math.sqrt(shape[1] * shape[2] / (trained_height * trained_width))
        self.scheduler.set_shift(self.scheduler.config["shift"] * growth)
        sigmas = [1 - step / steps for step in range(steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator behind image `index` of `seed`: a CPU generator, so that every device starts from equal noise."""
    return random.generator(seed, "image", index)


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
    number = int(label) if isinstance(label, int) or label.isdecimal() else None
    if number is not None and 0 <= number < len(names):
        return number
    near = difflib.get_close_matches(str(label), names, n=1, cutoff=0.5)
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    hint = f"did you mean {near[0]!r}?" if near else f"known labels: {known}; or an id from 0 to {len(names) - 1}"
    raise UserError(f"label {label!r}: unknown; {hint}")
