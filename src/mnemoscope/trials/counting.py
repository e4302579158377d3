"""Compiled loops over coefficients and patterns together; the tests define each of them in plain numpy.

Coefficients come as the bins u8[row, unit] that `kernel.assign_bins` gives, a row being a counted position of a
batch, and patterns as columns of a sparse matrix: column `c` holds the rows `indices[indptr[c] : indptr[c + 1]]`.
A *claim* is a unit, a polarity and a column. The *score* of a row is its bin, counted from the other end where the
polarity is negative; a unit is active where the score reaches the claim's threshold, which may be out of reach.

As in `kernel`, loops release the GIL and are cut by what they write to, so that threads never meet.
"""

from __future__ import annotations

import numpy as np

from mnemoscope.mine.kernel import BINS, _compiled

_TOP = BINS - 1


@_compiled
def group_extremes(bins, groups, start, stop, highest, lowest):  # type: ignore[no-untyped-def]
    """Largest and smallest bin of each group of rows, for units ``start <= u < stop``.

    groups             i64[row]
    highest, lowest    u8[group unit]  in, out
    """
    for i in range(len(bins)):
        row = bins[i][start:stop]
        high, low = highest[groups[i]][start:stop], lowest[groups[i]][start:stop]
        for j in range(len(row)):
            high[j] = max(high[j], row[j])
            low[j] = min(low[j], row[j])


@_compiled
def active_by_column(bins, indptr, indices, strata, above, below, first, last, counts, by_stratum):  # type: ignore[no-untyped-def]
    """Active rows in each column and in each stratum, for units ``first <= u < last``; patterns lie by rows here.

    indptr, indices  the columns of row `i` are `indices[indptr[i] : indptr[i + 1]]`
    strata           i64[row]
    above, below     i64[unit]  active beyond zero: from bin `above` up; on the other side from `below` down
    counts           u16[2 unit column], by_stratum u16[2 unit stratum]  in, out
    """
    for i in range(len(bins)):
        row = bins[i]
        for u in range(first, last):
            if row[u] >= above[u]:
                side = 0
            elif row[u] <= below[u]:
                side = 1
            else:
                continue
            by_stratum[side, u, strata[i]] += np.uint16(1)
            in_columns = counts[side, u]
            for entry in range(indptr[i], indptr[i + 1]):
                in_columns[indices[entry]] += np.uint16(1)


@_compiled
def expected_by_group(bins, groups, strata, rates, unit, low, high, column, first, last, sums):  # type: ignore[no-untyped-def]
    """Rates of the stratum of each active row, summed by group, for claims ``first <= k < last``.

    rates      f32[stratum column]
    low, high  u8[claim]          active: bins from `low` to `high`
    sums       f32[claim group]   in, out
    """
    for i in range(len(bins)):
        row, rate = bins[i], rates[strata[i]]
        for k in range(first, last):
            if low[k] <= row[unit[k]] <= high[k]:
                sums[k, groups[i]] += rate[column[k]]


@_compiled
def score_histograms(bins, indptr, indices, unit, polarity, column, floor, first, last, counts):  # type: ignore[no-untyped-def]
    """Histograms of the score where the pattern is, for claims ``first <= k < last``.

    unit, polarity, column  i64[claim]
    floor                   scores up to this one share bin 0
    counts                  u32[claim bin]  in, out
    """
    for k in range(first, last):
        histogram, u, positive = counts[k], unit[k], polarity[k] > 0
        for entry in range(indptr[column[k]], indptr[column[k] + 1]):
            score = np.int64(bins[indices[entry], u])
            score = score if positive else _TOP - score
            histogram[max(score - floor, 0)] += np.uint32(1)


@_compiled
def present_histograms(  # type: ignore[no-untyped-def]
    bins, values, rows, quadrant, gated, groups, indptr, indices, unit, polarity, column, threshold, first, last,
    counts, among, both, quadrants,
):  # fmt: skip
    """What the coefficients are where the pattern of a claim is, for claims ``first <= k < last``.

    values      f32[position unit]  coefficients; row `i` is position `rows[i]`
    quadrant    u8[row unit]        0 to 3 for gate and up (+,+), (+,-), (-,+), (-,-); unread unless `gated`
    threshold   i64[claim]          score at which active begins
    counts      u32[claim bin]      in, out: histogram of the coefficient
    among       f64[claim]          in, out: sum of the coefficient
    both        u16[claim group]    in, out: active rows of each group
    quadrants   i64[claim 4]        in, out: active rows by quadrant
    """
    for k in range(first, last):
        u, positive, total = unit[k], polarity[k] > 0, 0.0
        for entry in range(indptr[column[k]], indptr[column[k] + 1]):
            i = indices[entry]
            code = np.int64(bins[i, u])
            counts[k, code] += np.uint32(1)
            total += np.float64(values[rows[i], u])
            if (code if positive else _TOP - code) >= threshold[k]:
                both[k, groups[i]] += np.uint16(1)
                if gated:
                    quadrants[k, quadrant[i, u]] += 1
        among[k] += total


@_compiled
def active_by_group(bins, quadrant, gated, groups, unit, low, high, first, last, counts, quadrants):  # type: ignore[no-untyped-def]
    """Active rows by group and by quadrant, for claims ``first <= k < last``.

    low, high  u8[claim]          active: bins from `low` to `high`
    counts     u16[claim group]   in, out
    quadrants  i64[claim 4]       in, out
    """
    size = last - first
    in_group = np.zeros(size, np.uint16)  # in the group that is being read; its rows are neighbours
    for i in range(len(bins)):
        row = bins[i]
        for j in range(size):
            code = row[unit[first + j]]
            if low[first + j] <= code <= high[first + j]:
                in_group[j] += np.uint16(1)
                if gated:
                    quadrants[first + j, quadrant[i, unit[first + j]]] += 1
        if i + 1 == len(bins) or groups[i + 1] != groups[i]:
            for j in range(size):
                counts[first + j, groups[i]] += in_group[j]
                in_group[j] = np.uint16(0)


@_compiled
def sign_quadrants(gate, up, rows, first, last, quadrant):  # type: ignore[no-untyped-def]
    """The sign quadrant u8[row unit] of the pre-activations f32[position unit], for rows ``first <= i < last``."""
    for i in range(first, last):
        a, b, out = gate[rows[i]], up[rows[i]], quadrant[i]
        for j in range(len(out)):
            out[j] = np.uint8(2) * np.uint8(not a[j] > 0) + np.uint8(not b[j] > 0)


@_compiled
def rows_in_columns(  # type: ignore[no-untyped-def]
    bins, indptr, indices, unit, polarity, threshold, starts, columns, first, last, shown, both
):
    """Rows in any of several disjoint columns, for claims ``first <= k < last``.

    starts   i64[claim + 1], columns i64[...]  which columns a claim is compared with
    shown    i64[claim]  in, out: rows in them
    both     i64[claim]  in, out: and active
    """
    for k in range(first, last):
        u, positive = unit[k], polarity[k] > 0
        for c in range(starts[k], starts[k + 1]):
            begin, end = indptr[columns[c]], indptr[columns[c] + 1]
            shown[k] += end - begin
            for entry in range(begin, end):
                score = np.int64(bins[indices[entry], u])
                both[k] += (score if positive else _TOP - score) >= threshold[k]


@_compiled
def sums_where_present(values, rows, indptr, indices, columns, first, last, sums):  # type: ignore[no-untyped-def]
    """Add up the coefficients of all units where a pattern is, for patterns ``first <= p < last``.

    columns  i64[pattern]
    sums     f32[pattern unit]  in, out; a batch is added up by itself before it is added
    """
    batch_sum = np.empty(values.shape[1], np.float32)
    for p in range(first, last):
        batch_sum[:] = 0
        for entry in range(indptr[columns[p]], indptr[columns[p] + 1]):
            row = values[rows[indices[entry]]]
            for j in range(len(batch_sum)):
                batch_sum[j] += row[j]
        pattern_sum = sums[p]
        for j in range(len(batch_sum)):
            pattern_sum[j] += batch_sum[j]


@_compiled
def power_sums(values, rows, start, stop, total, squares):  # type: ignore[no-untyped-def]
    """Sums of the coefficients and of their squares over rows, f64[unit], for units ``start <= u < stop``."""
    first, second = total[start:stop], squares[start:stop]
    for i in range(len(rows)):
        row = values[rows[i]][start:stop]
        for j in range(len(row)):
            x = np.float64(row[j])
            first[j] += x
            second[j] += x * x


@_compiled
def compound_rows(indptr, indices, starts, parts, needed, ends, out):  # type: ignore[no-untyped-def]
    """For each compound the rows that at least so many of its parts have, ascending.

    indptr, indices          columns of parts, their rows ascending
    starts  i64[compound + 1], parts i64[...]  which columns a compound is made of
    needed  i64[compound]
    ends    i64[compound]    out: where its rows end in `out`
    out     i32[...]         out: rows of one compound after another; room for those of all parts
    """
    size, heads = 0, np.zeros(int(np.diff(starts).max()), np.int64)
    for c in range(len(needed)):
        count, members = starts[c + 1] - starts[c], parts[starts[c] : starts[c + 1]]
        for j in range(count):
            heads[j] = indptr[members[j]]
        while True:
            least, having = np.int64(1) << 62, 0
            for j in range(count):
                if heads[j] < indptr[members[j] + 1]:
                    least = min(least, np.int64(indices[heads[j]]))
            if least == np.int64(1) << 62:
                break
            for j in range(count):
                if heads[j] < indptr[members[j] + 1] and indices[heads[j]] == least:
                    heads[j] += 1
                    having += 1
            if having >= needed[c]:
                out[size] = least
                size += 1
        ends[c] = size


@_compiled
def count_same_code(indptr, indices, code, rows, column, sizes, counts):  # type: ignore[no-untyped-def]
    """For each claim and each of its rows, the rows of its column that have the same code.

    code    i64[row]          -1 is none
    rows    i64[claim slot]   -1 is none
    column  i64[claim]        ascending: each column is read once for all its claims
    sizes   i32[code]         zeros, in and out
    counts  i64[claim slot]   zeros; out
    """
    first = 0
    while first < len(column):
        last = first
        begin, end = indptr[column[first]], indptr[column[first] + 1]
        for entry in range(begin, end):
            if code[indices[entry]] >= 0:
                sizes[code[indices[entry]]] += 1
        while last < len(column) and column[last] == column[first]:
            for slot in range(rows.shape[1]):
                row = rows[last, slot]
                if row >= 0 and code[row] >= 0:
                    counts[last, slot] = sizes[code[row]]
            last += 1
        for entry in range(begin, end):
            if code[indices[entry]] >= 0:
                sizes[code[indices[entry]]] = 0
        first = last
