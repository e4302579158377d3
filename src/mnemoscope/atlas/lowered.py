"""What results show of themselves, put into a page that allows no style but its own files'.

A result's fragment brings its style along, in a block and in attributes. The pages here have all of these rules as one
file already, and what is in attributes is handed to a script of this server (`data-style`), which may set it. Text in a
fragment is escaped, quotation marks too, so that nothing in it is taken for an attribute.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from mnemoscope.display import Shown

_BLOCK = re.compile(r"<style>.*?</style>\s*", re.DOTALL)
_ATTRIBUTE = re.compile(r' style="')
_HEADING = re.compile(r"(</?h)([34])(?=[ >])")
_OPENING = re.compile(r"<h([34])(?=[ >])")
_ADDRESS = r"L\d+(?:E\d+)?N\d+"
_LINKED = re.compile(rf'<a href="#[^"]*">({_ADDRESS})</a>')
_CHANCES = re.compile(r'<div class="mn-chances">.*?</div>', re.DOTALL)
_CANDIDATE = re.compile(r'(?<=<span>)(<bdi class="mn-token"[^>]*>.*?</bdi>)([^<]*)</span>')
_TOKEN_PLACE = re.compile(r'((?:id="|href="#))mn[0-9a-f]{8}-token-')
_FOLLOWED = re.compile(r'(<ruby data-at="(\d+)"[^>]*>)([^<]*)<rt>')
_SOURCE = re.compile(r'<span class="source"( title="[^"]*), context (\d+)">(.*?)</span>')
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


def chosen(fragment: str, leads: Sequence[tuple[str, str] | None]) -> str:
    """A fragment of an explanation whose likely tokens, one after the other, lead to the first of two addresses, and
    "against" behind each to the second; where that is empty there is none."""
    fragment = str(fragment)  # to markup, no text could be added
    begin, end = next((match.span() for match in [_CHANCES.search(fragment)] if match), (0, 0))
    left = iter(leads)

    def lead(match: re.Match[str]) -> str:
        pair = next(left, None)
        if pair is None:
            return match[0]
        target, against = (escape(address) for address in pair)
        more = f'<a class="foil" href="{against}">against</a>' if against else ""
        return f'<a class="target" href="{target}">{match[1]}</a>{match[2]}{more}</span>'

    return fragment[:begin] + _CANDIDATE.sub(lead, fragment[begin:end]) + fragment[end:]


def tokens_lead(fragment: str, address: str) -> str:
    """A fragment of a trace whose tokens lead to what is said of each at an address; "" for the page itself."""
    fragment = _TOKEN_PLACE.sub(r"\1token-", str(fragment))
    where = escape(address)
    return _FOLLOWED.sub(
        lambda match: f'{match[1]}<a href="{where}#token-{match[2]}">{match[3]}</a><rt>', fragment
    )


def sourced(fragment: str, href: Callable[[str], str]) -> str:
    """A fragment whose examples lead from their source to `href` of the context that they are in."""
    return _SOURCE.sub(
        lambda match: (
            f'<a class="source" href="{escape(href(match[2]))}"{match[1]}, context {match[2]}">{match[3]}</a>'
        ),
        str(fragment),
    )


def linked(fragment: str, href: Callable[[str], str]) -> str:
    """A fragment in which an element that begins with a neuron's address has it as a link."""

    def link(address: str) -> str:
        return f'<a class="neuron" href="{href(address)}">{address}</a>'

    return _NAMED.sub(lambda match: f"{match[1]}{link(match[2])}", walked(fragment, href))
