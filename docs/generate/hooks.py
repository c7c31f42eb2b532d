"""What mkdocs calls while it builds the site: pages get what is made from the code, and formulas become MathML.

A line `{{ diagram ring 4 }}` in a page, or `{{ cost ring }}` in a sentence, is replaced by what the code says. Formulas
are written in TeX between dollars; browsers show MathML by themselves, so that the site needs no script for them.
"""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

from docs.generate.diagrams import DIAGRAMS, draw
from docs.generate.reference import algorithm_table, cost_formula, option_list, strategy_flags

__all__ = ["expand", "on_page_content", "on_page_markdown"]

_DIRECTIVE = re.compile(r"\{\{ ([a-z0-9 -]+) \}\}")
# As pymdownx.arithmatex (generic) leaves them.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is made from the code into the page."""
    return _DIRECTIVE.sub(lambda found: expand(found[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Put MathML in the place of formulas."""
    return _FORMULA.sub(lambda found: _formula(found[2], found[1] == "div"), html)


def expand(directive: str) -> str:
    """Return what stands for a directive. Raises PluginError for one that does not exist."""
    match directive.split():
        case ["diagram", name, size] if name in DIAGRAMS:
            image = draw(name, int(size))
            return f'<figure class="schedule">\n<div class="scroll" tabindex="0">\n{image}\n</div>\n</figure>'
        case ["cost", name]:
            return cost_formula(name)
        case ["algorithms", size]:
            return algorithm_table(int(size))
        case ["options"]:
            return option_list()
        case ["flags", strategy]:
            return strategy_flags(strategy)
        case _:
            raise PluginError(f"a page has {{{{ {directive} }}}}, which docs/generate/hooks.py does not know")


def _formula(tex: str, block: bool) -> str:
    mathml: str = convert(unescape(tex).strip(), display="block" if block else "inline")
    return f'<div class="formula">{mathml}</div>' if block else mathml
