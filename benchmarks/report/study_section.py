"""The section of a study."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.hyperbola import points_of
from benchmarks.report.batch_sizes import draw_hyperbola, fit_of, noise_scales
from benchmarks.report.content import Picture, Section, Table
from benchmarks.report.curves import QUANTITIES, draw_curves, has
from benchmarks.report.measures import Measured, measure, shown, tuning_of
from benchmarks.report.rows import draw_factors, draw_speed_up, draw_time_split, draw_to_target
from benchmarks.report.sources import Source, facts_of
from benchmarks.report.study_summary import summarise_study
from benchmarks.report.study_tables import cell_table, fit_table, method_table, run_table, speed_up_table
from benchmarks.report.styles import save
from benchmarks.report.words import count, listing, percent
from benchmarks.speedup import SERIAL
from benchmarks.study.results import Study
from benchmarks.table import format_number

__all__ = ["study_section"]

_MOST_CURVES = 8


def study_section(source: Source, study: Study, figures: Path) -> Section:
    """Draw the study's figures into the folder, and return its section."""
    name = source.name
    cells = measure(study)
    runs_table = run_table(name, study, {each.cell: each.name for each in cells})
    tables: list[Table] = []
    pictures: list[Picture] = []
    fit, noise = (fit_of(study), noise_scales(study)) if cells else (None, [])

    def add(what: str, figure: Figure, caption: str, alternative: str) -> None:
        save(figure, figures, f"{name}-{what}")
        pictures.append(Picture(f"{name}-{what}", caption, alternative, runs_table.name))

    if cells:
        tables.append(cell_table(name, cells, runs_table.name))
        if any(map(_compared, cells)):
            tables.append(speed_up_table(name, cells, runs_table.name))
        _draw_speed_ups(add, cells)
        _draw_quantities(add, study, cells)
        add(
            "time-split",
            draw_time_split(cells),
            "Training time of each method's run of the median seed: computing, and waiting for communication that "
            "was not hidden behind it. Runs end when they reach the target.",
            "Stacked bars of computing and exposed communication, one for each method.",
        )
        if fit is not None:
            tables.append(fit_table(name, fit, noise))
            add(
                "batch-sizes",
                draw_hyperbola(points_of(study), fit, noise),
                "Steps and samples to the target against the global batch size, of serial and synchronous runs, with "
                "the fitted hyperbola" + (" and the gradient noise scale measured while training." if noise else "."),
                f"Steps fall and samples rise with the batch; B_crit is {format_number(fit.b_crit)} samples.",
            )
        tables.append(method_table(name, study, cells))
    tables.append(runs_table)
    spec = study.head["spec"]
    title = f"Study {study.name}: {percent(study.target_accuracy)}"
    title += f" on {spec['dataset']}" if "dataset" in spec else ""
    facts = (*facts_of(source), *_study_facts(study, cells))
    summary = tuple(summarise_study(study, cells, fit, noise))
    return Section(name, title, facts, summary, tuple(pictures), tuple(tables), main=True)


def _draw_speed_ups(add, cells: Sequence[Measured]) -> None:  # type: ignore[no-untyped-def]
    rivals = [each for each in cells if each.cell.contender != SERIAL]
    told = [each for each in rivals if _compared(each)]
    if told:
        add(
            "speed-up",
            draw_speed_up(told),
            "Speed-up over serial SGD (one rank, one thread): 1 per sample with the same batch, 2 per epoch, 3 to the "
            "target, which is what counts. Hollow: over batch 1.",
            "Speed-ups of each method by three definitions: "
            + "; ".join(f"{each.name} {format_number(each.speed_up.accuracy_over_best)}" for each in told)
            + " (to the target, over the best serial batch).",
        )
    split = [each for each in rivals if each.speed_up.hardware_efficiency is not None]
    if split:
        add(
            "factors",
            draw_factors(split),
            "Speed-up to accuracy = hardware efficiency × statistical efficiency, against serial SGD at its best "
            "batch. Methods that missed the target have no factors.",
            "Hardware and statistical efficiency of each method, and their product.",
        )


def _compared(each: Measured) -> bool:
    """Say whether there is a baseline for any of the speed-ups."""
    return any(value is not None for value in vars(each.speed_up).values())


def _draw_quantities(add, study: Study, cells: Sequence[Measured]) -> None:  # type: ignore[no-untyped-def]
    target = study.target_accuracy
    common = shown(cells, _MOST_CURVES)
    for quantity in QUANTITIES:
        having = [each for each in cells if has(each, quantity)]
        if not having:
            continue
        drawn = [each for each in common if each in having] or shown(having, _MOST_CURVES)
        partly = ""
        if len(drawn) < len(having):
            partly = (
                f" {len(drawn)} of {len(having)} are drawn: the soonest batch of each method, and of these at most the "
                f"{_MOST_CURVES} soonest."
            )
        without = " Methods that send nothing, or do not tell, are left out." if len(having) < len(cells) else ""
        add(
            f"accuracy-{quantity.name}",
            draw_curves(common if drawn[0] in common else drawn, quantity, target),
            f"Test accuracy against {quantity.title}: the run of the median seed, and a band from the lowest to the "
            f"highest of all seeds.{partly}{without}",
            f"Test accuracy against {quantity.title}, a curve for each of {listing([each.name for each in drawn])}.",
        )
        add(
            f"to-target-{quantity.name}",
            draw_to_target(having, quantity),
            f"{quantity.title.capitalize()} until the target of {percent(target)}, every run.{without}",
            f"{quantity.title.capitalize()} until the target, a row for each method.",
        )


def _study_facts(study: Study, cells: Sequence[Measured]) -> list[tuple[str, str]]:
    measured = sum(each.n for each in cells)
    tuning = sum(run.phase == "tuning" for run in study.runs)
    facts = [("target", f"{percent(study.target_accuracy)} test accuracy")]
    if cells:
        budgets = sorted({tuning_of(study, each.cell).runs for each in cells})
        rates = sorted({len(tuning_of(study, each.cell).rates) for each in cells})
        each = "–".join(map(str, dict.fromkeys((budgets[0], budgets[-1]))))
        of_rates = "–".join(map(str, dict.fromkeys((rates[0], rates[-1]))))
        told = f"{each} runs for each method, of {of_rates} learning rates; {tuning} in all" if tuning else "none"
        facts.append(("tuning", told))
        seeds = sorted({run.seed for one in cells for run in one.runs})
        tuned = sorted({run.seed for run in study.runs if run.phase == "tuning"})
        others = f"; {', '.join(map(str, tuned))} for tuning" if tuned else ""
        facts.append(("seeds", f"{', '.join(map(str, seeds))}{others}"))
    facts.append(("runs", f"{measured} measured, of {count(len(cells), 'method')}"))
    spec = {key: value for key, value in study.head["spec"].items() if isinstance(value, (str, int, float))}
    facts.append(("spec", ", ".join(f"{key} {value}" for key, value in spec.items())))
    return facts
