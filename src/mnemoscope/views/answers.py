"""What short commands answer in the terminal: neurons found, a run, a model, the cache, a verification, annotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mnemoscope.invocation import command
from mnemoscope.tracing.relatives import RELATIONS
from mnemoscope.views import claims, words
from mnemoscope.views.card import card
from mnemoscope.views.terminal import table

if TYPE_CHECKING:
    from pathlib import Path

    from mnemoscope.model.table import Outcome
    from mnemoscope.neuron.find import Hits
    from mnemoscope.records import Kept
    from mnemoscope.results import Annotated, BuildPrice, Highlights, Verification
    from mnemoscope.run.reading import Run
    from mnemoscope.tracing.relatives import Relatives

_WORDS = ("neuron", "stack", "token", "sign", "about", "pattern", "verdict")


def found(result: Hits) -> RenderableType:
    """What a search found: the question, the null it is to be read against, and a table."""
    names = result.rows.columns
    rows = (
        [Text(_cell(name, value)) for name, value in row.items()] for row in result.rows.iter_rows(named=True)
    )
    left = [index for index, name in enumerate(names) if name in _WORDS]
    return _stacked(
        Text(result.question, style="bold"),
        Text(result.null, style="dim"),
        table(names, rows, left=left, wraps=range(len(names))),
    )


def relatives(result: Relatives) -> RenderableType:
    """Neurons that are near to one by their weights, a table for each relation, under what chance finds."""
    parts: list[RenderableType] = [
        Text(f"{result.neuron} of {result.model}: neurons that are near by their weights", style="bold"),
        Text(
            "Cosines of directions of the residual stream; a key is the gate's, through the norm's weight before it.",
            style="dim",
        ),
    ]
    for name, rows in result.lists.items():
        chance = result.chance[name]
        parts += [
            Text(),
            Text(f"Neurons {RELATIONS[name]}", style="bold"),
            Text(
                f"by chance the nearest has {words.number(chance.random)} (of {chance.others} random directions, in "
                f"the median); of other neurons of the layer {words.number(chance.peers)} in the median and "
                f"{words.number(chance.high)} in one of twenty",
                style="dim",
            ),
            table(
                ("neuron", "cosine", "promotes"),
                (
                    (
                        row["neuron"],
                        Text(words.number(row["cosine"], sign=True)),
                        Text(" ".join(row["promotes"])),
                    )
                    for row in rows.iter_rows(named=True)
                ),
                left=(0, 2),
                wraps=(2,),
            ),
        ]
    return _stacked(*parts)


def highlights(result: Highlights) -> RenderableType:
    """The run, and short cards of the neurons to look at first."""
    parts: list[RenderableType] = [heading(result.run)]
    for pick, chosen in zip(result.picks, result.cards, strict=True):
        parts += [Text(), card(chosen, triggers=4, pick=pick)]
    return Group(*parts)


def heading(run: Run) -> RenderableType:
    """Model and corpus of a run, in two lines."""
    lines = Text(words.model_line(run.manifest), style="bold")
    return lines.append("\n").append(words.corpus_line(run.manifest), style="not bold dim")


def families(rows: Sequence[Outcome]) -> RenderableType:
    """The model families whose parts add up, in columns, and the others under why they are refused."""
    closed = sorted({row.family for row in rows if row.error is not None})
    share = f"{sum(row.error is not None for row in rows)} of {len(rows)}"
    reasons: dict[str, set[str]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault(row.reason, set()).add(row.family)
    ranked = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return Group(
        Text(f"The parts of {share} entries of transformers add up to the logits of a tiny model:\n"),
        Columns([Text(name) for name in closed], padding=(0, 3), equal=True, column_first=True),
        Text("\nThe others are refused:\n"),
        *(Text(f"{', '.join(sorted(names))}: {reason}") for reason, names in ranked),
    )


def kept(entries: Sequence[Kept], folder: Path, *, freed: bool = False) -> RenderableType:
    """What lies in the cache folder, or was freed from it: a row each, and what to do."""
    whole = words.size(sum(entry.bytes for entry in entries))
    if not entries:
        return Text(f"Nothing is kept in {folder}.")
    rows = ((entry.kind, words.size(entry.bytes), Text(entry.what)) for entry in entries)
    note = (
        f"{whole} freed in {folder}."
        if freed
        else f"{whole} in {folder}. It can all be made again; to free it: {command('cache', '--clear')}"
    )
    return Group(table(("kind", "size", "what"), rows, left=(0, 2)), Text(note, style="dim"))


def anatomy(facts: Mapping[str, object]) -> RenderableType:
    """What is known of a model, a line each."""
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, value in facts.items():
        lines.add_row(name.replace("_", " "), _cell(name, value))
    return lines


def price(result: BuildPrice) -> RenderableType:
    """What a build would take: the text, time, memory and disk, and what does not fit."""
    at_least = "at least " if result.open_end else ""
    devices = f" x {result.devices}" if result.devices > 1 else ""
    text = f"{at_least}{result.tokens:,} tokens of {result.corpus} in {result.shards:,} shards"
    weights = f"{result.neurons:,} neurons, {words.size(result.weights)} of weights"
    among = {stage: f" on {count}" for stage, count in result.divided.items() if count > 1}
    rows = [(name + among.get(name, ""), words.duration(count)) for name, count in result.seconds.items()]
    rows += [("in all", words.duration(sum(result.seconds.values()))), ("", "")] if rows else []
    rows += [(f"memory, {name}", words.size(count)) for name, count in result.memory.items() if count]
    rows += [("memory, at most", words.size(result.peak))]
    rows += [(f"{result.device}, {name}", words.size(count)) for name, count in result.on_device.items()]
    largest = sorted(result.disk.items(), key=lambda entry: -entry[1])
    rows += [("", ""), *((f"disk, {name}", words.size(count)) for name, count in largest[:4])]
    rows += [
        ("disk, the run", words.size(sum(result.disk.values()))),
        ("disk, while it is built", words.size(result.work)),
    ]
    lacking = result.lacking or ("All of it fits.",)
    return _stacked(
        Text(f"{result.model} in {result.dtype} on {result.device}{devices}", style="bold"),
        Text(f"{weights}; {text}; from {words.duration(result.measured)} of trying", style="dim"),
        table(("", ""), rows),
        *map(Text, _told(result)),
        *(Text(sentence, style="bold" if result.lacking else "") for sentence in lacking),
    )


def _told(result: BuildPrice) -> Iterator[str]:
    """What the figures of a price stand for."""
    if result.random and result.seconds:
        yield (
            f"Its weights are not here: some of its layers were run with random ones, and speed is that of "
            f"{result.device} of this machine."
        )
    if result.longest is not None:
        share = result.seconds[result.longest] / max(1e-9, sum(result.seconds.values()))
        rest = words.duration(result.undivided)
        yield (
            f"Stages follow one another. {result.longest.capitalize()} takes longest ({share:.0%}); more devices "
            f"shorten {' and '.join(result.divided)} alone, and leave {rest}."
        )


def verification(result: Verification) -> RenderableType:
    """A verdict, and a row for each comparison."""
    names = ("", "compared", "differing", "largest difference", "")
    rows = (
        (
            check.name,
            f"{check.compared:,}",
            Text(f"{check.differing:,}", style="bold" if check.differing else ""),
            words.number(check.largest),
            Text(check.note),
        )
        for check in result.checks
    )
    verdict = "identical" if result.identical else "no difference" if result.passed else "differences found"
    return _stacked(
        Text(f"verification: {verdict}", style="bold"), table(names, rows, left=(0, 4), wraps=range(5))
    )


def _stacked(*lines: RenderableType) -> Table:
    """Lines one below the other, as narrow as they are."""
    grid = Table.grid()
    for line in lines:
        grid.add_row(line)
    return grid


def _cell(name: str, value: object) -> str:
    if name == "verdict":
        return claims.SHORT.get(str(value), str(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return words.share(value) if name.endswith("fraction") else words.number(value)
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else str(value)


# -- One annotated neuron ---------------------------------------------------------------------------------------


def annotated(result: Annotated) -> Group:
    """The annotated prefixes of one neuron (A28)."""
    rows = result.rows
    names = list(dict.fromkeys(name for patterns in rows["patterns"] for name in patterns))
    lines: list[RenderableType] = [Text(f"{result.neuron} as annotated by {result.annotator}", style="bold")]
    for number, name in enumerate(names, 1):
        count = sum(name in patterns for patterns in rows["patterns"])
        lines.append(Text(f"  {number}  {name} ({count} of {rows.height})"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(4):
        grid.add_column(overflow="fold")
    for row in rows.iter_rows(named=True):
        marks = ",".join(map(str, sorted(names.index(name) + 1 for name in row["patterns"])))
        grid.add_row(f"{row['coefficient']:+.3g}", marks or "–", row["kind"], Text(row["prefix"]))
    return Group(*lines, grid)
