"""An explanation lowered to a `Sheet` of plain values, and from there to terminal, notebook, page and charts."""

from __future__ import annotations

from mnemoscope.views.explanation.lower import sheet as sheet
