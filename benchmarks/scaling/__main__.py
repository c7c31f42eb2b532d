"""What would more ranks give? `python -m benchmarks.scaling MODE ...`, each with a --help of its own.

- measure    (under mpirun) measure this machine: computing, network, stragglers; writes a profile
- predict    step time, efficiency and speed-up to accuracy for up to thousands of ranks, from a profile and a network
- validate   (under mpirun) predict held-out step times, measure them, and print the error
- advise     ranks, batch, strategy and bucket size for a target, and what every other choice would cost
- published  simulated beside published scaling efficiencies, and why they differ
- presets    prices of common networks, and their sources

Predicted are mean step times: the overlap of `stepping`, with all-reduces that the event simulator follows
(`allreduce_sgd/schedules/simulate.py`), stragglers, and the steps to a target of `accuracy`. Every number that was not
measured is called simulated.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_writable
from benchmarks.on_all_ranks import complain
from benchmarks.record import write_record

__all__ = ["MODES", "main"]


def main(arguments: Sequence[str]) -> int:
    """Run a mode, and return the exit status: 0, or 2 for bad arguments."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        if not arguments or arguments[0] not in MODES:
            given = f"unknown mode {arguments[0]!r}" if arguments else "a mode is missing"
            raise ConfigError(f"MODE: {given}; choose from {', '.join(MODES)}")
        return MODES[arguments[0]](arguments[1:])
    except ConfigError as problem:
        complain("scaling", problem)
        return 2


def _measure(arguments: Sequence[str]) -> int:
    from benchmarks.scaling import measure

    return measure.main(arguments)


def _predict(arguments: Sequence[str]) -> int:
    from benchmarks.scaling import predict

    return predict.main(arguments)


def _validate(arguments: Sequence[str]) -> int:
    from benchmarks.scaling import validate

    return validate.main(arguments)


def _advise(arguments: Sequence[str]) -> int:
    from benchmarks.scaling import advise

    return advise.main(arguments)


def _published(arguments: Sequence[str]) -> int:
    from benchmarks.scaling import published

    return published.main(arguments)


def _presets(arguments: Sequence[str]) -> int:
    from benchmarks.scaling.presets import preset_rows, preset_table

    parser = Parser("scaling presets", "Prices of common networks, and where they come from.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    check_writable("--json", options.json)
    print(preset_table())
    if options.json is not None:
        write_record(options.json, "scaling", ["presets", *arguments], preset_rows())
    return 0


MODES: Mapping[str, Callable[[Sequence[str]], int]] = MappingProxyType(
    {
        "measure": _measure,
        "predict": _predict,
        "validate": _validate,
        "advise": _advise,
        "published": _published,
        "presets": _presets,
    }
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
