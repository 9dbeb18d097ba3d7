"""Facts that the checks of a page's commands share: the refusal, and the files and runs that earlier commands write."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jitscale.config import Config, load_config
from jitscale.errors import UserError
from tests.support import ROOT


class WrongCommandError(Exception):
    """A command that its reader could not run, with the reason."""


@dataclass(frozen=True)
class Run:
    """A run whose configuration is in the checkout."""

    config: Path  # from the root of the checkout
    overrides: tuple[str, ...] = ()

    def configured(self, more: Sequence[str] = ()) -> Config:
        """The run's configuration with `more` overrides. Raises a WrongCommandError."""
        try:
            return load_config(ROOT / self.config, [*self.overrides, *more])
        except UserError as error:
            raise WrongCommandError(str(error)) from error


@dataclass(frozen=True)
class Context:
    """The state of the page at a command."""

    written: set[str] = field(default_factory=set)  # files that earlier commands of the page write
    runs: dict[str, Run | None] = field(default_factory=dict)  # folders that they write; None: its network is unknown
    inline: bool = False  # in prose, where a command may be named in part
    ranks: int = 1  # processes that run the command
