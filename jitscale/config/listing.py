"""Every setting on one page, for `--list-settings` and docs/settings.md alike."""

from dataclasses import fields
from textwrap import fill

from jitscale.config.limits import shown
from jitscale.config.schema import SETTINGS, Config
from jitscale.config.values import kind_of

WIDTH = 100  # columns of the page

HEAD = """\
# Settings

After this page you know every setting of a run: its default, its type, its unit and its limits.
`python -m jitscale.train --list-settings` prints this page, and `make docs` writes it.
[configuration.md](configuration.md) says how to write a value. `--print-config` shows the values of
one run. Limits of several settings together are in
[jitscale/config/rules.py](../jitscale/config/rules.py). A command that breaks a limit is refused in
one line with the remedy.

An entry is `group.key=default`: meaning (type; unit; limit). Limits of a list apply to its
elements.
"""


def settings_page() -> str:
    """Markdown that is readable as plain text: a section for each group, an entry for each setting."""
    sections = [HEAD]
    for group in fields(Config):
        summary = (group.default_factory.__doc__ or "").strip()
        names = [name for name in SETTINGS if name.startswith(f"{group.name}.")]
        entries = "\n".join(_entry(name) for name in names)
        sections.append(f"## {group.name}\n\n{fill(summary, WIDTH)}\n\n{entries}\n")
    return "\n".join(sections)


def _entry(name: str) -> str:
    known = SETTINGS[name]
    details = "; ".join(part for part in (kind_of(name), known.unit, known.limit) if part)
    default = shown(known.default).replace(", ", ",")  # one word for a shell
    text = f"- `{name}={default}`: {known.meaning} ({details})"
    # Names and addresses must not be broken at hyphens.
    return fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
