"""`ldm-vae COMMAND ...`: finds the command, runs it, and turns a user's error into one line and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

from ldm_vae.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ldm_vae.runtime import reuse_freed_memory
from ldm_vae.version import __version__

COMMANDS = {
    "demo": "demo",
    "train-vae": "train_vae",
    "encode": "encode",
    "latents": "latents",
    "train-diffusion": "train_diffusion",
    "ema": "ema",
    "generate": "generate",
    "reconstruct": "reconstruct",
    "evaluate": "evaluate",
    "frontier": "frontier",
    "compare": "compare",
    "diagnose": "diagnose",
    "codec-fit": "codec_fit",
    "compress": "compress",
    "decompress": "decompress",
    "codec-bench": "codec_bench",
    "directions": "directions",
    "interpolate": "interpolate",
    "explore": "explore",
    "anomaly": "anomaly",
    "synth": "synth",
    "report": "report",
    "convert": "convert",
    "card": "card",
}


GROUPS = ("latents", "directions", "anomaly")
"""Commands that have tools."""

REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN,
)  # fmt: skip
"""Errors of disks, not of programs: a folder is full, may not be written, or has gone."""


def command_module(name: str) -> ModuleType:
    return importlib.import_module(f"ldm_vae.commands.{COMMANDS[name]}")


def overview() -> str:
    """The top-level help."""
    lines = [
        "usage: ldm-vae COMMAND [arguments]",
        "",
        "Train a KL VAE on your own images, encode datasets into latent shards, generate with latent diffusion.",
        "",
        "commands, in the order of the journey of an image:",
        *(f"  {name:<16} {command_module(name).SUMMARY}" for name in COMMANDS),
        "",
        "`ldm-vae COMMAND --help` explains one of them. On several GPUs: `torchrun --nproc_per_node N scripts/...`",
        "or `accelerate launch scripts/...` with the same arguments.",
    ]
    return "\n".join(lines)


def tool_overview(name: str) -> str:
    """The help of a command that has tools."""
    module = command_module(name)
    tools = (f"  {tool:<10} {tool_module(name, tool).SUMMARY}" for tool in module.TOOLS)
    return "\n".join([f"usage: ldm-vae {name} TOOL [arguments]", "", str(module.__doc__), "tools:", *tools])


def tool_module(name: str, tool: str) -> ModuleType:
    module = command_module(name)
    return importlib.import_module(f"{module.__name__}.{module.TOOLS[tool]}")


def find(words: Sequence[str]) -> tuple[ModuleType, str, list[str]]:
    """The module of a command or tool, its name, and the words that are left. Raises: UserError."""
    name, *rest = words
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; {suggestion(name, COMMANDS)}")
    module = command_module(name)
    if name not in GROUPS:
        return module, name, rest
    tool = rest[0] if rest else ""
    if tool not in module.TOOLS:
        raise UserError(f"{name} has no tool {tool!r}; {suggestion(tool, module.TOOLS)}")
    return tool_module(name, tool), f"{name} {tool}", rest[1:]


def suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
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
        module, name, rest = find(arguments)
    except UserError as error:
        print(f"ldm-vae: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    parser = argparse.ArgumentParser(
        prog=f"ldm-vae {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8
    try:
        # Settings may stand before and after an option; but intermixed, names after `--` would be read as options.
        parsed = parser.parse_args(rest) if "--" in rest else parser.parse_intermixed_args(rest)
        reuse_freed_memory()
        return module.run(parsed)
    except UserError as error:
        print(f"ldm-vae {name}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"ldm-vae {name}: {where}{error.strerror}; cure that and run the same command again", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"ldm-vae {name}: interrupted; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
