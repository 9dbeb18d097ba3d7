"""Download published weights on a machine with a network, for compute nodes without one.

    python tools/fetch_weights.py --config RUN/config.yaml  # all that this run needs, into its evaluation.features_dir
    python tools/fetch_weights.py --output /shared/weights inception

The sha256 of every file is verified, also of files that exist already.
"""

from pathlib import Path

import installed

from jitscale.command import Parser
from jitscale.config import AUTO, EvaluationConfig, load_config
from jitscale.errors import ExitCode, exit_with_message
from jitscale.evaluation.choice import PREFERRED
from jitscale.evaluation.networks import PUBLISHED
from jitscale.evaluation.published import fetch, published_folder


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and download."""
    parser = Parser(__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--config", type=Path, metavar="FILE", help="a configuration; its evaluation.features_dir is the folder"
    )
    where.add_argument("--output", type=Path, metavar="DIR", help="the folder; default: torch hub's")
    known = f"one of {', '.join(PUBLISHED)}; default: those that --config needs, without --config all"
    parser.add_argument("names", nargs="*", metavar="NAME", help=known)
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(PUBLISHED)
    if unknown:
        parser.error(f"no weights called {', '.join(sorted(unknown))}; there are {', '.join(PUBLISHED)}")
    evaluation = load_config(options.config).evaluation if options.config else EvaluationConfig()
    folder = options.output or published_folder(evaluation)
    main_network = PREFERRED[0] if evaluation.features == AUTO else evaluation.features
    names = [*([main_network] if evaluation.features_file is None else []), *evaluation.more_features]
    needed = [name for name in dict.fromkeys(names) if name in PUBLISHED]
    if options.config and not options.names and not needed:
        print(f"{options.config}: needs no published weights")
    for name in options.names or (needed if options.config else PUBLISHED):
        print(fetch(PUBLISHED[name], folder))
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
