"""The command line, from the commands themselves."""

from __future__ import annotations

import typer

from blockkit.cli.commands import app


def commands() -> str:
    """Every command with the page that `--help` prints."""
    group = typer.main.get_command(app)
    parts = []
    with group.make_context("blockkit", ["list"], resilient_parsing=True) as context:
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            own = type(context)(command, info_name=name, parent=context, terminal_width=100, max_content_width=100)
            parts.append(f"## {name}\n\n```text\n{command.get_help(own)}\n```")
    return "\n\n".join(parts)
