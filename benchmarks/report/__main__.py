"""Make a report of studies and of records of benchmarks: `python -m benchmarks.report RESULTS... -o DIR`.

Studies come first, then records, each in the order given. DIR holds index.html, one page that needs nothing else and
opens from disk; report.md; and its figures and tables, as figures/*.png and tables/*.md. An earlier report in that
place is replaced, anything else is refused.

Exit status: 0 done; 2 bad arguments or files, or a package is missing, in one line.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser
from benchmarks.report.folder import check_folder, new_folder
from benchmarks.report.sources import Record, read_sources

__all__ = ["main"]

_NEEDED = ("matplotlib", "jinja2")


def main(arguments: Sequence[str]) -> int:
    """Run the program. Returns its exit status."""
    try:
        options = _parse(arguments)
        # What was asked comes first: how soon an accuracy is reached.
        sources = sorted(read_sources(options.results), key=lambda source: isinstance(source.content, Record))
        check_folder(options.output)
        _check_packages()
        # Not before it is known that they are there.
        from benchmarks.report.compose import section_of
        from benchmarks.report.content import Report
        from benchmarks.report.markdown import write_markdown
        from benchmarks.report.page import write_page

        with new_folder(options.output) as folder:
            figures = folder / "figures"
            figures.mkdir()
            progress = tqdm(sources, unit="file", leave=False, disable=not sys.stderr.isatty())
            report = Report(options.title, tuple(section_of(source, figures) for source in progress))
            write_markdown(report, folder)
            write_page(report, folder)
    except (ConfigError, OSError) as problem:
        print(f"report: error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    print(options.output / "index.html")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("report", "Make one page, with figures and tables, of what studies and benchmarks found.")
    add = parser.add_argument
    add("results", type=Path, nargs="+", metavar="RESULTS", help="a study's folder or its results.jsonl, or a record")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    add("--title", default="Speed-up to accuracy", metavar="TEXT", help="heading of the page")
    return parser.parse_args(arguments)


def _check_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"needs {' and '.join(missing)}: pip install 'allreduce_sgd[report]'")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
