"""What results show of themselves, put into a page that allows no style but its own files'.

A result's fragment brings its style along, in a block and in attributes. The pages here have all of these rules as one
file already, and what is in attributes is handed to a script of this server (`data-style`), which may set it. Text in a
fragment is escaped, quotation marks too, so that nothing in it is taken for an attribute.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from markupsafe import Markup

from mnemoscope.display import Shown

_BLOCK = re.compile(r"<style>.*?</style>\s*", re.DOTALL)
_ATTRIBUTE = re.compile(r' style="')
_HEADING = re.compile(r"(</?h)([34])(?=[ >])")
_OPENING = re.compile(r"<h([34])(?=[ >])")
_ADDRESS = r"L\d+(?:E\d+)?N\d+"
_LINKED = re.compile(rf'<a href="#[^"]*">({_ADDRESS})</a>')
_NAMED = re.compile(rf"(<(?:td|th|span|h3|b)(?: [^>]*)?>)({_ADDRESS})(?=[\s<])")


def inside(shown: Shown, href: Callable[[str], str]) -> Markup:
    """A result as a part of a page; every neuron that it names is a link to `href` of its address."""
    return Markup(levelled(linked(without_style(shown._repr_html_()), href)))


def without_style(fragment: str) -> str:
    """A fragment without blocks of style, its attributes of style under another name."""
    return _ATTRIBUTE.sub(' data-style="', _BLOCK.sub("", fragment))


def raised(fragment: str) -> str:
    """A fragment whose first headings are those of a page: h3 and h4 are h1 and h2."""
    return _HEADING.sub(lambda match: f"{match[1]}{int(match[2]) - 2}", fragment)


def levelled(fragment: str) -> str:
    """A fragment below the heading of a page: where its first headings are h3, they and h4 count as h2 and h3."""
    if "<h2" in fragment:
        return fragment
    return _OPENING.sub(lambda match: f'{match[0]} aria-level="{int(match[1]) - 1}"', fragment)


def walked(fragment: str, href: Callable[[str], str]) -> str:
    """A fragment in which links to other neurons of one page lead to the pages of these."""
    return _LINKED.sub(lambda match: f'<a class="neuron" href="{href(match[1])}">{match[1]}</a>', fragment)


def linked(fragment: str, href: Callable[[str], str]) -> str:
    """A fragment in which an element that begins with a neuron's address has it as a link."""

    def link(address: str) -> str:
        return f'<a class="neuron" href="{href(address)}">{address}</a>'

    return _NAMED.sub(lambda match: f"{match[1]}{link(match[2])}", walked(fragment, href))
