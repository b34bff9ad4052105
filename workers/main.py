"""The `mothball` command: the operators' commands of `mothball.cli`, plus those that start processes."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mothball.cli.app import build_app, run
from mothball.cli.output import JsonFlag

if TYPE_CHECKING:
    from collections.abc import Sequence

PANEL = "On this machine"


def up(
    root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder below which workspaces may lie; repeatable. Default: the setting, else the current folder."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run a whole fleet here: embedded Redis, worker, beat and Flower. Ctrl-C stops all of it."""
    from workers.local import run_up

    raise typer.Exit(run_up(root or [], as_json=json))


def demo(
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="Tree to show it on; only read.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's folder.", show_default=False)] = False,
    json: JsonFlag = False,
) -> None:
    """The main job on a real tree, start to finish: capture, change, read back, stop, expire, kill the worker, verify."""
    from workers.demo import run_demo

    raise typer.Exit(run_demo(path, keep=keep, as_json=json))


def build() -> typer.Typer:
    """The whole application."""
    app = build_app()
    app.command("demo", rich_help_panel=PANEL)(demo)
    app.command("up", rich_help_panel=PANEL)(up)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    # Loading modules and listing a tree makes many objects that live on and no cycles: looking for some costs a tenth of a command.
    gc.set_threshold(50_000, 20, 20)
    # Looking for plugins of pydantic reads the metadata of every installed package, and takes longer than many a command.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    sys.exit(run(build(), argv))


if __name__ == "__main__":
    main()
