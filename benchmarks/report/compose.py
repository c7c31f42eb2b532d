"""One section of the report: which figures, tables and sentences a file of results gets."""

from pathlib import Path

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import describe
from benchmarks.report.content import Section
from benchmarks.report.record_section import record_section
from benchmarks.report.sources import Record, Source
from benchmarks.report.study_section import study_section

__all__ = ["section_of"]


def section_of(source: Source, figures: Path) -> Section:
    """Draw the source's figures into the folder and return what is said of it.

    Raises ConfigError, which names the file, for rows that are not those of the benchmark.
    """
    if isinstance(source.content, Record):
        return record_section(source, source.content, figures)
    try:
        return study_section(source, source.content, figures)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        raise ConfigError(f"{source.path}: not results that can be reported: {describe(problem)}") from problem
