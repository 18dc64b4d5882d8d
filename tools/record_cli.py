"""Write docs/reference/cli.md, the reference of the command line, from the same text as `--help`."""

from __future__ import annotations

from pathlib import Path

from ldm_vae import cli
from ldm_vae.files import write_text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"


def page() -> str:
    """Markdown: one section a command, with what `ldm-vae COMMAND --help` prints."""
    lines = ["# Command line", "", "Written by `python -m tools.record_cli` from the settings' own descriptions.", ""]
    lines += ["```text", cli.overview().rstrip(), "```", ""]
    for name in cli.COMMANDS:
        lines += [f"## {name}", "", "```text", cli.help_of(name).rstrip(), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    write_text(PAGE, page())
