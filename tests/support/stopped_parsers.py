"""Parses a command line with the parser that a command builds, and stops the command there."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn
from unittest import mock

from jitscale.command import Parser


class RefusedError(Exception):
    """A parser's refusal of a command line, with its message."""


class _ParsedError(BaseException):
    """Carries the options out of the command that has parsed them."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options


class _AskedError(BaseException):
    """Carries the parser out of a command that asks it to parse."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


def parsed_by(main: Callable[[], object], words: Sequence[str]) -> argparse.Namespace | None:
    """The options of `words` that `main` parses; None if it ends instead, as at --help. No option may be shortened.

    Raises a RefusedError with the parser's message, and every error that `main` raises before it parses.
    """
    with (
        mock.patch.object(Parser, "__init__", _without_abbreviations),
        mock.patch.object(Parser, "parse_args", _stopping(argparse.ArgumentParser.parse_args)),
        mock.patch.object(Parser, "parse_intermixed_args", _stopping(argparse.ArgumentParser.parse_intermixed_args)),
        mock.patch.object(Parser, "error", _refuse),
        mock.patch.object(sys, "argv", ["command", *words]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        try:
            main()
        except _ParsedError as parsed:
            return parsed.options
        except SystemExit as end:
            if not end.code:
                return None
            raise AssertionError(f"it ended with code {end.code}, and its parser refused nothing") from end
    raise AssertionError("it ended without a parser of the project")


def parser_of(main: Callable[[], object]) -> Parser:
    """The parser of the command `main`."""

    def ask(parser: Parser, *_: Any) -> NoReturn:
        raise _AskedError(parser)

    with (
        mock.patch.object(Parser, "parse_args", ask),
        mock.patch.object(Parser, "parse_intermixed_args", ask),
        mock.patch.object(sys, "argv", ["command"]),
    ):
        try:
            main()
        except _AskedError as asked:
            return asked.parser
    raise AssertionError("it ended without a parser of the project")


def torchrun_parser() -> argparse.ArgumentParser:
    """The parser of torchrun."""
    from torch.distributed.run import get_args_parser  # noqa: PLC0415 (seconds that only torchrun's commands need)

    return get_args_parser()


_CONSTRUCT = Parser.__init__


def _without_abbreviations(parser: Parser, *arguments: Any, **options: Any) -> None:
    _CONSTRUCT(parser, *arguments, **{"allow_abbrev": False, **options})


def _stopping(parse: Callable[..., argparse.Namespace]) -> Callable[..., NoReturn]:
    def parse_and_stop(parser: Parser, arguments: Sequence[str] | None = None, namespace: Any = None) -> NoReturn:
        raise _ParsedError(parse(parser, arguments, namespace))

    return parse_and_stop


def _refuse(_: Parser, message: str) -> NoReturn:
    raise RefusedError(message)
