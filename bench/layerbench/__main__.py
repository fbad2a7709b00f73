"""python -m bench.layerbench evaluate | score ..., with --help for what each takes."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> None:
    """Hand the rest of the command line to the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.layerbench", description="rankings of layers, judged")
    parser.add_argument("command", choices=("evaluate", "score"), help="our contestants, or a ranking of yours")
    command = parser.parse_args(arguments[:1]).command
    if command == "evaluate":
        from bench.layerbench.evaluation import main as evaluate

        evaluate(arguments[1:])
    else:
        from bench.layerbench.scoring import main as score

        score(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
