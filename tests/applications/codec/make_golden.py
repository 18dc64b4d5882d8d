"""Make the files of `tests/golden/codec-1` anew: `python -m tests.applications.codec.make_golden`.

Only for a new format version: the files of the version before stay, and the test that they still open.
"""

from __future__ import annotations

import lzma
import tempfile
from pathlib import Path

from ldm_vae.applications.codec import compression
from ldm_vae.applications.codec.entropy_models import step_of
from tests.applications.codec.conftest import random_model, smooth_picture
from tests.applications.codec.test_golden import FOLDER, levels
from tests.test_golden import unpacked


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        autoencoder = str(unpacked("autoencoder", Path(temporary)))
        plain = compression.open_codec(autoencoder)
        model = Path(temporary) / "context.safetensors"
        random_model(plain.identity, plain.channels).save(model)
        (FOLDER / "context.safetensors.xz").write_bytes(lzma.compress(model.read_bytes(), preset=9))
        fitted = compression.open_codec(autoencoder, str(model))
        for name, codec in (("self-fitted", plain), ("context", fitted)):
            picture = codec.analyze(smooth_picture(61, 83), name)
            path = FOLDER / f"{name}.ldmz"
            path.write_bytes(codec.compress(picture, step_of(100.0), (1, 2)).data)
            print(name, path.stat().st_size, levels(codec, path))


if __name__ == "__main__":
    main()
