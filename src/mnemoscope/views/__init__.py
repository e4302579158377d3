"""Results lowered to a small card of plain values, and from there to terminal, page and plot."""
