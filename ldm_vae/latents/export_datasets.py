"""A parquet file that `datasets` loads with the right features: tensors with their shapes, labels with their names."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_vae.latents.format import Layout

if TYPE_CHECKING:
    from ldm_vae.latents.export import Block


def file_names(count: int) -> list[str]:
    """As `datasets` names the files of a split."""
    return [f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def write(blocks: Iterable[Block], layout: Layout, label_names: Sequence[str]) -> bytes:
    """A file with a row group for each block. Not compressed: latents are noise to a compressor."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = features(layout, label_names).arrow_schema
    file = io.BytesIO()
    columns = ["id", "index", "label"]
    with parquet.ParquetWriter(
        file, schema, compression="none", use_dictionary=False, write_statistics=columns
    ) as writer:
        for block in blocks:
            plain = [pa.array(block.ids, pa.string()), pa.array(block.indices), pa.array(block.labels)]
            tensors = [
                pa.ExtensionArray.from_storage(schema.field(name).type, nested(block.tensors[name]))
                for name in layout.names
            ]
            writer.write_table(pa.Table.from_arrays([*plain, *tensors], schema=schema), row_group_size=len(block))
    return file.getvalue()


def features(layout: Layout, label_names: Sequence[str]) -> Any:
    """The columns, as `datasets.Features`."""
    from datasets import Array2D, Array3D, ClassLabel, Features, Value

    shape = layout.sample_shape
    tensor = (Array2D if len(shape) == 2 else Array3D)(shape, layout.dtype)
    label = ClassLabel(names=list(label_names)) if label_names else Value("int64")
    columns = {"id": Value("string"), "index": Value("int64"), "label": label}
    return Features(columns | dict.fromkeys(layout.names, tensor))


def nested(array: np.ndarray) -> Any:
    """An array (n, ...) as the lists of lists in which `datasets` stores it; the numbers are not copied."""
    import pyarrow as pa

    values = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        values = pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32)), values)
    return values
