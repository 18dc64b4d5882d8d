"""The one place that repairs a mismatch between installed packages.

A CPU-only torch beside the package index's CUDA-built torchvision makes `import torchvision` (hence `lpips` and
diffusers' models) die with "operator torchvision::nms does not exist": torchvision registers fake kernels for two
operators whose compiled library did not load. Defining the two schemas first cures the import. Nothing of ours
calls non-maximum suppression; calling it still fails, as it should.
"""

from __future__ import annotations

_libraries: list[object] = []  # torch.library.Library objects undo their definitions when collected


def repair_torchvision() -> None:
    """Make `import torchvision` work beside a torch of another build. Does nothing where they match."""
    import importlib.util
    import sys

    if _libraries or "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        import torchvision  # noqa: F401
