"""From image collections to tensors: sources, safe decoding, splits, crops, the synthetic set."""

from __future__ import annotations

from ldm_vae.data.sources import CachedSource, DataConfig, ImageSource
from ldm_vae.errors import UserError


def open_source(config: DataConfig) -> ImageSource:
    """Open a collection with random access.

    Raises:
        UserError: the collection does not exist, is empty or unreadable, or is a stream.
    """
    if config.streaming:
        raise UserError("data.datasets.streaming: a stream has no random access; set it to false for this command")
    source = _open(config)
    if config.cache_megabytes:
        return CachedSource(source, config.cache_megabytes * 10**6)
    return source


def _open(config: DataConfig) -> ImageSource:
    if config.source == "folder":
        from ldm_vae.data.folder import FolderSource

        assert config.path is not None
        return FolderSource(config.path, config.limits, config.include)
    if config.source == "datasets":
        from ldm_vae.data.hf_datasets import DatasetsSource

        return DatasetsSource(config.datasets, config.limits)
    from ldm_vae.data.synthetic.source import SyntheticSource

    return SyntheticSource(config.synthetic)
