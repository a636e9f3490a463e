"""The report of a sweep: as text for a terminal, and as one HTML file that needs nothing beside it."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fedjax_lora.config.sweeps import Setting
from fedjax_lora.io.sweep import Sweep
from fedjax_lora.report import drawing, formats
from fedjax_lora.report.axes import Axis, axes_of, is_grid, key_axis, title_of
from fedjax_lora.report.cells import Results, check_target, results
from fedjax_lora.report.drawing import Plot
from fedjax_lora.report.heatmap import Measured, heat_maps, means
from fedjax_lora.report.html import about, figure, framed, write_page
from fedjax_lora.report.settings import heading
from fedjax_lora.report.sweep_plots import curves, has_bands, points
from fedjax_lora.report.sweep_tables import PLURALS, SweepTable, check_sort, counted, explained, table_of, troubled
from fedjax_lora.report.tables import text_table

_MOST_AXES = 3  # of heat maps


def sweep_table(found: Sweep, sort: str | None = None, target: float | None = None) -> str:
    """Plain text for a terminal: a row for each setting, and below it what did not end, a line each.

    Args:
      found: the sweep.
      sort: a column of `results.csv` to sort by, best first; the accuracy that is measured by default.
      target: accuracy to reach; 0.95 of the best accuracy of all trials by default.

    Raises:
      ValueError: `sort` or `target` is not allowed; or the log of a trial was changed.
    """
    told = results(found, target)
    table = table_of(told, sort)
    text = text_table([table.heads, *([shown.text for shown in row] for row in table.rows)])
    wrong = [f"{status}: {line}" for status, lines in troubled(told).items() for line in lines]
    return text + "".join(f"{line}\n" for line in [*explained(told), *wrong])


def write_sweep_report(found: Sweep, out_path: str | Path, target: float | None = None) -> None:
    """Write the report of a sweep to `out_path`, whatever is there.

    Args:
      found: the sweep.
      out_path: of the page.
      target: accuracy to reach; 0.95 of the best accuracy of all trials by default.

    Raises:
      ValueError: `target` is not allowed; the log of a trial was changed; or `out_path` cannot be written.
    """
    told = results(found, target)
    axes = axes_of(told)
    write_page(Path(out_path), framed(title_of(told, axes), _body(told, axes)))


def check_asked(sort: str | None, target: float | None, settings: Iterable[Setting]) -> None:
    """Refuse, before a sweep over these settings, what `sweep_table` would refuse after it.

    Raises:
      ValueError: `sort` or `target` is not allowed.
    """
    check_sort(sort, settings)
    check_target(target)


def _body(found: Results, axes: Sequence[Axis]) -> str:
    parts = [
        about(heading(found.runs)) if found.runs else "",
        _troubles(found),
        _table(table_of(found), axes),
        f'<p class="note">{"<br/>".join(map(escape, explained(found)))}</p>',
        _comparison(found, axes),
        f"<h2>Rounds</h2>\n{_how_drawn(found, axes)}\n{_plots(curves(found, axes))}",
    ]
    return "\n".join(part for part in parts if part)


def _troubles(found: Results) -> str:
    """What did not end, and what the trials warn of, in one box that opens."""
    boxes = {PLURALS[status]: lines for status, lines in troubled(found).items()}
    warned = [
        f"{trial.name}: {warning}"
        for trial in found.trials
        if trial.run and trial.status != "diverged"
        for warning in trial.run.summary.get("warnings") or []
    ]
    count = counted(found)
    if warned:
        boxes["warnings"] = warned
        count = f"{count}; {len(warned)} warnings" if count else f"{len(warned)} warnings in {len(found.trials)} trials"
    if not boxes:
        return ""
    lists = "\n".join(
        f"<h3>{label.capitalize()}</h3>\n<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"
        for label, lines in boxes.items()
    )
    return f'<details class="card warning">\n<summary>{count}</summary>\n{lists}\n</details>'


def _table(table: SweepTable, axes: Sequence[Axis]) -> str:
    """The swatch of a row has the colour of its curves."""
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    lines = []
    for cell, row in zip(table.cells, table.rows, strict=True):
        swatch = ""
        if axes:
            color = axes[0].colors[axes[0].place(cell.setting)]
            swatch = f'<span class="swatch" style="background: {color}"></span>'
        first, *others = row
        tags = [f'<th scope="row">{swatch}{escape(first.text)}</th>']
        for place, shown in enumerate(others, 1):
            key = ' class="key"' if place < table.keys else ""
            exact = f' title="{escape(shown.exact)}"' if shown.exact else ""
            tags.append(f"<td{key}{exact}>{escape(shown.text)}</td>")
        lines.append(f"<tr>{''.join(tags)}</tr>")
    body = "\n".join(lines)
    head = f"<thead><tr>{heads}</tr></thead>"
    return f'<div class="card cells">\n<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'


def _comparison(found: Results, axes: Sequence[Axis]) -> str:
    """What came out against what was varied: points of one axis, heat maps of two or three, else points of each key."""
    measures = _measures(found)
    if not axes:
        return ""
    if 2 <= len(axes) <= _MOST_AXES and is_grid(axes, found):
        maps = [heat_maps(found, axes, measured) for measured in measures]
        groups = maps if len(axes) > 2 else ["\n".join(maps)]
        body = "\n".join(f'<div class="maps">\n{group}\n</div>' for group in groups)
        return f"<h2>{escape(' × '.join(axis.title for axis in axes))}</h2>\n{body}"
    if len(axes) == 1:
        plots = [points(of.title.partition(",")[0], of, found, axes[0], axes[0]) for of in measures]
        return f"<h2>By {escape(axes[0].title)}</h2>\n{_plots(plots)}"
    learned = measures[0]
    plots = [points(f"{learned.title} by {key}", learned, found, key_axis(key, found), axes[0]) for key in found.keys]
    return f"<h2>By each key</h2>\n{_plots(plots)}"


def _measures(found: Results) -> list[Measured]:
    """What is compared: what was learned, and what it cost."""
    accuracy = drawing.Axis("accuracy")
    learned = {
        "final_accuracy": Measured("Final accuracy", "final_accuracy", formats.accuracy, accuracy, high_is_good=True),
        "personal_accuracy": Measured(
            "Clients' own accuracy", "personal_accuracy", formats.accuracy, accuracy, high_is_good=True
        ),
        "final_loss": Measured("Final test loss", "final_loss", formats.number, drawing.Axis("loss")),
    }
    unit, form = formats.bits_alike(means(found, "total_uplink_bits") or [0.0])
    seconds, uplink = drawing.Axis("seconds"), drawing.Axis("uplink", "bit")
    return [
        learned[found.measure],
        Measured("Latency of a round, s", "mean_latency_s", lambda x: formats.number(float(f"{x:.3g}")), seconds),
        Measured(f"Uplink, {unit}", "total_uplink_bits", form, uplink),
    ]


def _how_drawn(found: Results, axes: Sequence[Axis]) -> str:
    """What a line, a colour and a band are."""
    parts = ["A line is the mean over the seeds of a setting" if found.seeds > 1 else "A line is a trial"]
    if found.seeds > 1:
        parts.append("in a band of ± one deviation" if has_bands(found) else "without bands, as there are many")
    if len(axes) > 1:
        parts.append(f"coloured by {axes[0].title}")
    if len(axes) > _MOST_AXES:
        parts.append(f"{len(axes)} axes vary: the table tells the others")
    return f'<p class="note">{escape(", ".join(parts))}.</p>'


def _plots(plots: Sequence[Plot]) -> str:
    figures = "\n".join(map(figure, plots))
    return f'<div class="plots">\n{figures}\n</div>'
