"""Text of the site that is made from the code: the options, the flags of a strategy, the costs of algorithms."""

import re
from html import escape

from allreduce_sgd.config import Option, options
from allreduce_sgd.schedules import cost
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.strategies.options import BELONGS

__all__ = ["algorithm_table", "cost_formula", "option_list", "strategy_flags"]

_NAMES = {int: "N", float: "X", str: "TEXT"}
_OPTIONS_PAGE = "options.md"
_TEX = {
    "ceil(lg p)": r"\lceil\lg\,p\rceil\,",
    "·lg p": r"\,\lg\,p\,",
    "lg p·(": r"\lg\,p\,(",
    "(p-1)/p·n": r"\tfrac{p-1}{p} n",
    "(n/m)": r"\tfrac{n}{m}",
    "·": " ",
    "alpha": r"\alpha",
    "beta": r"\beta",
    "gamma": r"\gamma",
}


def option_list() -> str:
    """Return every option of the trainer, group by group, as Markdown with HTML lists; `--NAME` has the anchor NAME."""
    parts: list[str] = []
    title = ""
    for each in options():
        if each.title != title:
            title = each.title
            parts += ["</dl>"] * bool(parts) + [f"\n## {title[0].upper()}{title[1:]}\n", '<dl class="options">']
        parts.append(
            f'<dt id="{each.name}"><a href="#{each.name}"><code>{escape(_usage(each))}</code></a> '
            f"<small>{escape(_values(each))}</small></dt>\n<dd>{escape(each.help)}</dd>"
        )
    return "\n".join([*parts, "</dl>"])


def strategy_flags(strategy: str) -> str:
    """Return the flags that belong to this strategy, each a link to its entry in the list of options."""
    names = [name for name, owners in BELONGS.items() if strategy in owners]
    if not names:
        return "none of its own"
    return ", ".join(f"[`--{name}`]({_OPTIONS_PAGE}#{name.removeprefix('no-')})" for name in names)


def cost_formula(algorithm: str) -> str:
    """Return the time of an all-reduce of n bytes over p ranks, in TeX, as the docstring of `cost` has it."""
    docstring = getattr(cost, algorithm.replace("-", "_")).__doc__ or ""
    formula, *condition = re.split(r"(?=, and a | with m)", docstring.partition(", in seconds")[0])
    for text, tex in _TEX.items():
        formula = formula.replace(text, tex)
    return f"${formula}${''.join(condition)}"


def algorithm_table(size: int) -> str:
    """Return the most steps and elements sent that a rank has, by the closed forms, in segments of n/(4p) elements."""
    rows = ["| `--algorithm` | steps | sent |", "|---|---|---|"]
    segment = 1000
    length = 4 * size * segment
    for name, algorithm in ALL_REDUCE.items():
        steps = max(algorithm.step_count(rank, size, length, segment) for rank in range(size))
        sent = max(algorithm.elements_sent(rank, size, length) for rank in range(size)) / length
        rows.append(f"| `{name}` | {steps} | {sent:.2f} n |")
    return "\n".join(rows)


def _usage(each: Option) -> str:
    if each.kind is bool:
        return f"--{each.name}, --no-{each.name}"
    return f"--{each.name} {each.metavar or ('NAME' if each.choices else _NAMES[each.kind])}"


def _values(each: Option) -> str:
    """Return what is allowed and what is taken where the option is not given."""
    words = [", ".join(each.choices)] if each.choices else []
    if each.minimum is not None:
        words.append(f"at least {each.minimum:g}")
    if each.above is not None:
        words.append(f"more than {each.above:g}")
    if each.maximum is not None:
        words.append(f"at most {each.maximum:g}")
    if each.default is not None:
        default = f"{each.default:g}" if each.kind is float else str(each.default)
        words.append(f"default {({'True': 'yes', 'False': 'no'}).get(default, default)}")
    return "; ".join(words)
