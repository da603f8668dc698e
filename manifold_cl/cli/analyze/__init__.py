"""``manifold-cl analyze``: a report on adapters, and commands that act on them; one file per command."""

from __future__ import annotations

from typing import Any

from manifold_cl.cli.analyze.many import many
from manifold_cl.cli.analyze.mend import mend
from manifold_cl.cli.analyze.merge import merge
from manifold_cl.cli.analyze.report import analyze
from manifold_cl.cli.analyze.suggest import suggest
from manifold_cl.cli.garbage import collecting_rarely
from manifold_cl.cli.options import Commands, GroupWithoutTypes

DEFAULT = "report"
"""The command that runs when the first argument names none."""


class _WithDefault(GroupWithoutTypes):
    """A group whose first argument may also be an argument of the default command."""

    default = DEFAULT

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command unless a command or the group's help is asked for."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


commands = Commands(
    cls=_WithDefault,
    help="Report on adapters, and act on them: `analyze A B` is short for `analyze report A B`. "
    "A folder that is called like a command is given as ./NAME.",
)
commands.command(DEFAULT)(collecting_rarely(analyze))
for command in (merge, suggest, mend, many):
    commands.command()(collecting_rarely(command))
