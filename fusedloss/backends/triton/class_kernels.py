"""Kernels of class_stats: rows sorted by class are cut into segments of equal length, and a program sums one segment.

A run is what a segment holds of one class. The program that sums a whole class in one run finishes it; of a class that
spans segments each run's sums are kept, and the program of the first boundary inside the class adds them in order. All
rows are taken for usable: a segment that holds another row, or whose new class starts with one, is marked as faulty,
nothing of its class is finished, and ``check_kernel`` and ``sum_kernel`` with REPAIR go through it again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedloss.backends.reference.class_stats import LARGEST_VALUE

LARGEST = tl.constexpr(LARGEST_VALUE)
PARTS_AT_ONCE = tl.constexpr(128)  # single numbers of segments that are added at a time


class Features(NamedTuple):
    """Features (row, column) at pointer + row * align * row_units + column * column_step; align * units columns.

    Triton sees that a product with `align` is a multiple of it, and reads several columns at once.
    """

    pointer: Any
    row_units: Any
    column_step: Any
    units: Any
    blocks: Any  # of columns
    align: Any


class Rows(NamedTuple):
    """Rows by class: `order` lists them, `keys` their classes; first_row[c]..first_row[c + 1] are class c's.

    Rows left out come last: first_row has one entry more than there are classes.
    """

    order: Any
    keys: Any
    first_row: Any
    number: Any  # of rows
    classes: Any
    segment: Any  # rows of one


class Faults(NamedTuple):
    """What was left out, as not finite or too large."""

    faulty: Any  # (segments,): not 0 where the segment has to be gone through again
    usable: Any  # (rows,) in the order by class, of faulty segments alone
    dropped: Any  # (K,): rows
    from_end: Any  # (K,): number of rows - place of the first usable one, of classes with dropped rows
    skipped: Any  # sum of `dropped`


class Parts(NamedTuple):
    """Sums of runs: row 2 s of the run that begins with segment s, 2 s + 1 of the one that ends with it."""

    sums: Any  # (2 * segments, width)
    squares: Any  # (2 * segments, width) or (2 * segments, blocks)
    group_sums: Any  # rows 2 s of `group` segments in a row, in float64
    group_squares: Any
    group: Any


class State(NamedTuple):
    """What is written: sums by class (`total`, `square`, `rows`), or the running statistics that they move.

    Those (`scatter`, `variance`, `momentum`) are None with sums, `total` is None with statistics, whose mean and count
    are `shift` and `seen`.
    """

    shift: Any
    seen: Any
    total: Any = None
    square: Any = None  # (K, width) or (K, blocks)
    rows: Any = None
    scatter: Any = None
    variance: Any = None
    momentum: Any = None  # see ``launch.float64_bits``


@triton.jit
def key_kernel(labels, label_step, keys, num_rows, num_classes, ignore_index, BLOCK: tl.constexpr):
    """Classes as narrow integers; the number of classes for rows that are left out."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + rows * label_step, mask=rows < num_rows, other=0)
    kept = (label >= 0) & (label < num_classes) & (label != ignore_index)
    tl.store(keys + rows, tl.where(kept, label, num_classes).to(keys.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def bounds_kernel(keys, first_row, num_rows, num_classes, steps, BLOCK: tl.constexpr):
    """Where each class begins among the sorted keys, by bisection."""
    classes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int64)
    high = low + num_rows
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(keys + middle, mask=low < high, other=0).to(tl.int32) < classes
        below = below & (low < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(first_row + classes, low, mask=classes <= num_classes)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def read_features(features, rows, columns, mask, T: tl.constexpr):
    place = (
        rows.to(tl.int64)[:, None] * (features.row_units * features.align)
        + (columns.to(tl.int64) * features.column_step)[None, :]
    )
    return tl.load(features.pointer + place, mask=mask, other=0.0).to(T)


@triton.jit
def largest_values(features, rows, live, T: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of each row over all columns; NaN where there is one."""
    largest = tl.zeros([LANES], T)
    for start in range(0, features.units * features.align, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (columns < features.units * features.align)[None, :]
        values = tl.abs(read_features(features, rows, columns, mask, T))
        largest = larger(largest, tl.reduce(values, 1, larger))
    return largest


@triton.jit
def is_usable(features, row, T: tl.constexpr, BLOCK: tl.constexpr):
    one = tl.arange(0, 1)
    largest = largest_values(features, row + one, one == 0, T, 1, BLOCK)
    return tl.sum((largest <= LARGEST).to(tl.int32), 0) != 0


@triton.jit
def first_place(rows, faults, index, first):
    """The place of the class's first usable row; some other where there is none."""
    if tl.load(faults.dropped + index) != 0:
        first = tl.minimum(rows.number - tl.load(faults.from_end + index), rows.number - 1)
    return first


@triton.jit
def center_of(features, state, index, new, row, columns, T: tl.constexpr):
    """The class's shift, or a new class's first row."""
    inside = columns < features.units * features.align
    known = tl.load(
        state.shift + index * (features.units * features.align) + columns, mask=inside & (new == 0), other=0.0
    )
    of_row = tl.load(
        features.pointer + row * (features.row_units * features.align) + columns.to(tl.int64) * features.column_step,
        mask=inside & (new != 0),
        other=0.0,
    ).to(T)
    return tl.where(new, of_row, known)


@triton.jit
def add_rows(sums, features, rows, faults, center, places, live, columns, REPAIR: tl.constexpr, MASKED: tl.constexpr,
             T: tl.constexpr):  # fmt: skip
    """Adds f - center and its square, and looks at |f|; columns beyond the last hold 0 in f and center."""
    total, square, largest = sums
    mask = (columns < features.units * features.align)[None, :]
    order = rows.order + places
    if MASKED:
        if REPAIR:
            live = live & (tl.load(faults.usable + places, mask=live, other=0) != 0)
        mask = live[:, None] & mask
        values = read_features(features, tl.load(order, mask=live, other=0), columns, mask, T)
        deviation = tl.where(live[:, None], values - center[None, :], 0.0)
    else:
        values = read_features(features, tl.load(order), columns, mask, T)
        deviation = values - center[None, :]
    return total + deviation, square + deviation * deviation, larger(largest, tl.abs(values))


@triton.jit
def sum_run(features, rows, faults, center, place, stop, columns, REPAIR: tl.constexpr, T: tl.constexpr,
            LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums and squares of f - center over a run, and the largest |f|."""
    total = tl.zeros([LANES, BLOCK], T)
    square = tl.zeros([LANES, BLOCK], T)
    largest = tl.zeros([LANES, BLOCK], T)
    whole = place
    if not REPAIR:
        whole = place + (stop - place) // (LANES * UNROLL) * (LANES * UNROLL)
        for start in range(place, whole, LANES * UNROLL):
            some = tl.zeros([LANES, BLOCK], T)
            for step in tl.static_range(UNROLL):
                places = start + step * LANES + tl.arange(0, LANES)
                some, square, largest = add_rows(
                    (some, square, largest), features, rows, faults, center, places, places < stop, columns, REPAIR,
                    False, T,
                )  # fmt: skip
            total += some
    # The last rows in half steps: a class of few has many idle ones.
    HALF: tl.constexpr = (UNROLL + 1) // 2
    for start in range(whole, stop, LANES * HALF):
        for step in tl.static_range(HALF):
            places = start + step * LANES + tl.arange(0, LANES)
            total, square, largest = add_rows(
                (total, square, largest), features, rows, faults, center, places, places < stop, columns, REPAIR,
                True, T,
            )  # fmt: skip
    return tl.sum(total, 0), square, largest


@triton.jit
def move_columns(state, index, inverse, share, total, square, center, columns, width, PER_FEATURE: tl.constexpr):
    """Chan's step for some columns of one class; returns sums of squares over them: of the rows, of their mean."""
    inside = columns < width
    place = index * width + columns
    deviation = total * inverse
    distances = tl.where(inside, deviation * deviation, 0.0)
    squares = square
    if PER_FEATURE:
        variance = tl.load(state.variance + place, mask=inside, other=0.0)
        moved = variance + (square * inverse - distances * share - variance) * share
        tl.store(state.variance + place, tl.where(moved < 0, 0.0, moved), mask=inside)
        squares = tl.sum(tl.where(inside, square, 0.0), 0)
    tl.store(state.shift + place, center + deviation * share, mask=inside)
    return squares.to(tl.float64), tl.sum(distances, 0).to(tl.float64)


@triton.jit
def weight_of(state, before, number):
    """The share of a batch of `number` rows in a class that had `before`."""
    if state.momentum is None:
        return number.to(tl.float64) / (before + number).to(tl.float64)
    else:
        return tl.where(before == 0, 1.0, state.momentum.to(tl.float64, bitcast=True))


@triton.jit
def move_class(state, index, before, number, weight, squares, distance):
    scatter = tl.load(state.scatter + index)
    moved = scatter + (squares / number.to(tl.float64) - weight * distance - scatter) * weight
    tl.store(state.scatter + index, tl.where(moved < 0, 0.0, moved))
    tl.store(state.seen + index, before + number)


@triton.jit
def finish(features, state, index, new, number, total, square, center, columns, PER_FEATURE: tl.constexpr,
           T: tl.constexpr):  # fmt: skip
    """Writes the sums of one class, or moves its statistics by them."""
    width = features.units * features.align
    total = total.to(T)
    square = square.to(T)
    if state.total is None:
        before = tl.load(state.seen + index)
        weight = weight_of(state, before, number)
        inverse = (1.0 / number.to(tl.float64)).to(T)
        # All warps have read what is about to be written.
        tl.debug_barrier()
        squares, distance = move_columns(
            state, index, inverse, weight.to(T), total, square, center, columns, width, PER_FEATURE
        )
        move_class(state, index, before, number, weight, squares, distance)
    else:
        inside = columns < width
        block = tl.program_id(1)
        place = index * width + columns
        tl.store(state.total + place, total, mask=inside)
        tl.store(state.shift + place, center, mask=inside & (new != 0) & (number > 0))
        if PER_FEATURE:
            tl.store(state.square + place, square, mask=inside)
        else:
            tl.store(state.square + index * features.blocks + block, square)
        if block == 0:
            tl.store(state.rows + index, number)


@triton.jit
def sum_kernel(features, rows, faults, parts, state, PER_FEATURE: tl.constexpr, REPAIR: tl.constexpr, T: tl.constexpr,
               LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The runs of one segment, for one block of columns; with REPAIR of faulty segments alone, without dropped rows."""
    segment = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    begin = segment * rows.segment
    end = tl.minimum(begin + rows.segment, tl.load(rows.first_row + rows.classes))
    place = begin
    if REPAIR:
        place = tl.where(tl.load(faults.faulty + segment) != 0, begin, end)
    while place < end:
        index = tl.load(rows.keys + place).to(tl.int64)
        first = tl.load(rows.first_row + index)
        last = tl.load(rows.first_row + index + 1)
        stop = tl.minimum(last, end)
        number = last - first
        start = first
        if REPAIR:
            start = first_place(rows, faults, index, first)
        new = tl.load(state.seen + index) == 0
        row = tl.load(rows.order + start)
        center = center_of(features, state, index, new, row, columns, T)
        total, squares, values = sum_run(
            features, rows, faults, center, place, stop, columns, REPAIR, T, LANES, UNROLL, BLOCK
        )
        if PER_FEATURE:
            square = tl.sum(squares, 0)
        else:
            square = tl.sum(tl.sum(squares, 0), 0)
        if REPAIR:
            # A class that is whole and dropped nothing was finished the first time; of one that dropped all rows,
            # a block of columns without a fault has written sums.
            dropped = tl.load(faults.dropped + index)
            number = number - dropped
            done = dropped > 0
            if state.total is None:
                done = done & (number > 0)
        else:
            done = tl.reduce(tl.reduce(values, 0, larger), 0, larger) <= LARGEST
            if new:
                done = done & is_usable(features, row, T, BLOCK)
            tl.store(faults.faulty + segment, 1, mask=done == 0)
        if (first >= begin) & (last <= end):
            if done:
                finish(features, state, index, new, number, total, square, center, columns, PER_FEATURE, T)
        else:
            slot = 2 * segment + (place != begin).to(tl.int64)
            tl.store(
                parts.sums + slot * (features.units * features.align) + columns,
                total,
                mask=columns < features.units * features.align,
            )
            if PER_FEATURE:
                tl.store(
                    parts.squares + slot * (features.units * features.align) + columns,
                    square,
                    mask=columns < features.units * features.align,
                )
            else:
                tl.store(parts.squares + slot * features.blocks + block, square)
        place = stop


@triton.jit
def check_kernel(features, rows, faults, T: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Looks at each row of a faulty segment. Integers alone are added atomically: their order does not matter."""
    segment = tl.program_id(0).to(tl.int64)
    begin = segment * rows.segment
    end = tl.minimum(begin + rows.segment, tl.load(rows.first_row + rows.classes))
    place = tl.where(tl.load(faults.faulty + segment) != 0, begin, end)
    while place < end:
        index = tl.load(rows.keys + place).to(tl.int64)
        first = tl.load(rows.first_row + index)
        stop = tl.minimum(tl.load(rows.first_row + index + 1), end)
        dropped = tl.zeros([LANES], tl.int64)
        from_end = tl.zeros([LANES], tl.int64)
        for start in range(place, stop, LANES):
            places = start + tl.arange(0, LANES)
            live = places < stop
            order = tl.load(rows.order + places, mask=live, other=0)
            usable = live & (largest_values(features, order, live, T, LANES, BLOCK) <= LARGEST)
            tl.store(faults.usable + places, usable.to(tl.int8), mask=live)
            dropped += (live & (usable == 0)).to(tl.int64)
            from_end = tl.maximum(from_end, tl.where(usable, rows.number - places, 0))
        missing = tl.sum(dropped, 0)
        if missing > 0:
            tl.atomic_add(faults.dropped + index, missing)
            tl.atomic_add(faults.skipped, missing)
        earliest = tl.max(from_end, 0)
        # Where that row is usable, segments without a fault don't say where they begin.
        if is_usable(features, tl.load(rows.order + first), T, BLOCK):
            earliest = rows.number - first
        tl.atomic_max(faults.from_end + index, earliest)
        place = stop


@triton.jit
def add_parts(parts, start, stop, step, width, columns, LANES: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of rows `start` to `stop` of a matrix, `step` apart."""
    # In float64: the error of a sum doesn't grow with the number of rows.
    total = tl.zeros([LANES, BLOCK], tl.float64)
    for first in range(start, stop, LANES * UNROLL):
        for each in tl.static_range(UNROLL):
            place = first + each * LANES + tl.arange(0, LANES).to(tl.int64)
            mask = (place < stop)[:, None] & (columns < width)[None, :]
            values = tl.load(parts + place[:, None] * step + columns[None, :], mask=mask, other=0.0)
            total += values.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def add_numbers(parts, start, stop, step):
    """The same for one number of each row."""
    return tl.sum(add_parts(parts, start, stop, step, 1, tl.arange(0, 1), PARTS_AT_ONCE, 1, 1), 0)


@triton.jit
def group_kernel(features, rows, parts, PER_FEATURE: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Adds the first runs of a group of segments where all are of one class, for one block of columns."""
    group = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    width = features.units * features.align
    columns = block * BLOCK + tl.arange(0, BLOCK)
    first = group * parts.group
    last = first + parts.group - 1
    if last * rows.segment < tl.load(rows.first_row + rows.classes):
        if tl.load(rows.keys + first * rows.segment) == tl.load(rows.keys + last * rows.segment):
            total = add_parts(parts.sums, first, last + 1, 2 * width, width, columns, LANES, UNROLL, BLOCK)
            tl.store(parts.group_sums + group * width + columns, total, mask=columns < width)
            if PER_FEATURE:
                square = add_parts(parts.squares, first, last + 1, 2 * width, width, columns, LANES, UNROLL, BLOCK)
                tl.store(parts.group_squares + group * width + columns, square, mask=columns < width)
            else:
                number = add_numbers(parts.squares + block, first, last + 1, 2 * features.blocks)
                tl.store(parts.group_squares + group * features.blocks + block, number)


@triton.jit
def class_kernel(features, rows, faults, parts, state, PER_FEATURE: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr,
                 UNROLL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Finishes the class whose first boundary between segments this program's is, for one block of columns."""
    segment = tl.program_id(0).to(tl.int64) + 1
    block = tl.program_id(1)
    width = features.units * features.align
    blocks = features.blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    boundary = segment * rows.segment
    if boundary < tl.load(rows.first_row + rows.classes):
        index = tl.load(rows.keys + boundary).to(tl.int64)
        first = tl.load(rows.first_row + index)
        last = tl.load(rows.first_row + index + 1)
        number = last - first - tl.load(faults.dropped + index)
        if (first < boundary) & (first >= boundary - rows.segment) & (number > 0):
            stop = (last - 1) // rows.segment + 1
            # Segments left of, in, and right of whole groups; without one all are left.
            left = (segment + parts.group - 1) // parts.group * parts.group
            right = stop // parts.group * parts.group
            if left >= right:
                left = stop
                right = stop
            tail = 2 * segment - 2 + (first > boundary - rows.segment).to(tl.int64)
            groups = left // parts.group
            last_group = right // parts.group
            total = add_parts(parts.sums, tail, tail + 1, width, width, columns, 1, 1, BLOCK)
            total += add_parts(parts.sums, segment, left, 2 * width, width, columns, LANES, UNROLL, BLOCK)
            total += add_parts(parts.group_sums, groups, last_group, width, width, columns, LANES, UNROLL, BLOCK)
            total += add_parts(parts.sums, right, stop, 2 * width, width, columns, LANES, UNROLL, BLOCK)
            if PER_FEATURE:
                square = add_parts(parts.squares, tail, tail + 1, width, width, columns, 1, 1, BLOCK)
                square += add_parts(parts.squares, segment, left, 2 * width, width, columns, LANES, UNROLL, BLOCK)
                square += add_parts(
                    parts.group_squares, groups, last_group, width, width, columns, LANES, UNROLL, BLOCK
                )
                square += add_parts(parts.squares, right, stop, 2 * width, width, columns, LANES, UNROLL, BLOCK)
            else:
                of_block = parts.squares + block
                square = tl.load(of_block + tail * blocks).to(tl.float64)
                square += add_numbers(of_block, segment, left, 2 * blocks)
                square += add_numbers(parts.group_squares + block, groups, last_group, blocks)
                square += add_numbers(of_block, right, stop, 2 * blocks)
            new = tl.load(state.seen + index) == 0
            row = tl.load(rows.order + first_place(rows, faults, index, first))
            center = center_of(features, state, index, new, row, columns, T)
            finish(features, state, index, new, number, total, square, center, columns, PER_FEATURE, T)


@triton.jit
def update_kernel(state, shift, width, PER_FEATURE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Moves the statistics of one class by its sums about `shift`."""
    index = tl.program_id(0).to(tl.int64)
    number = tl.load(state.rows + index)
    if number > 0:
        before = tl.load(state.seen + index)
        weight = weight_of(state, before, number)
        inverse = (1.0 / number.to(tl.float64)).to(T)
        tl.debug_barrier()
        squares = tl.zeros([], tl.float64)
        distance = tl.zeros([], tl.float64)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            place = index * width + columns
            total = tl.load(state.total + place, mask=columns < width, other=0.0)
            center = tl.load(shift + place, mask=columns < width, other=0.0)
            if PER_FEATURE:
                square = tl.load(state.square + place, mask=columns < width, other=0.0)
            else:
                square = tl.zeros([], T)
            some, far = move_columns(
                state, index, inverse, weight.to(T), total, square, center, columns, width, PER_FEATURE
            )
            squares += some
            distance += far
        if not PER_FEATURE:
            squares = tl.load(state.square + index).to(tl.float64)
        move_class(state, index, before, number, weight, squares, distance)
