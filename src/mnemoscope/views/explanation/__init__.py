"""An explanation lowered to a `Sheet` of plain values, and from there to terminal, notebook, page and charts."""
