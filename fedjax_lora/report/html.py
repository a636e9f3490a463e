"""The report: one HTML file that needs nothing beside it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from fedjax_lora.io.files import write_atomically
from fedjax_lora.report.drawing import Key, Plot, run_colors
from fedjax_lora.report.plots import all_plots
from fedjax_lora.report.runs import Run, differing_keys, load_runs
from fedjax_lora.report.settings import heading, other_than_default
from fedjax_lora.report.style import CSS
from fedjax_lora.report.tables import Row, setting_rows, summary_rows

_GENERATOR = '<meta name="generator" content="fedjax-lora report">'
_LONGEST_LEGEND = 8  # entries
_MOST_NAMES = 4  # in the title


def write_report(run_folders: Iterable[str | Path], out_path: str | Path) -> None:
    """Write the report of one run, or of several side by side, to `out_path`, whatever is there.

    Raises:
      ValueError: a folder is not a run's, or has no round in its log; or `out_path` cannot be written.
    """
    runs = load_runs(run_folders)
    write_page(Path(out_path), _page(runs, all_plots(runs)))


def write_page(path: Path, text: str) -> None:
    """Write a page, whatever is there.

    Raises:
      ValueError: `path` cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ValueError(f"report {path} must be a path that can be written, got {error.strerror}") from error


def check_replaceable(path: Path) -> None:
    """Refuse a place where a report would overwrite anything but a report.

    Raises:
      ValueError: `path` is something else or cannot be read, or there is no folder to hold it.
    """
    if not path.parent.is_dir():
        raise ValueError(f"report {path} must be a path that can be written, got no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"report {path} must be a path that can be written, got a folder")
    if path.exists() and not (path.is_file() and _is_report(path)):
        raise ValueError(f"report {path} must be a new file, or a report to replace, got a file that is none")


def _is_report(path: Path) -> bool:
    """Whether a file is one of ours: by its generator, or by its title where it is too old to name one."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 20).decode("utf-8", "replace").partition("</head>")[0]
    except OSError as error:
        raise ValueError(f"report {path} must be a file that can be read, got {error.strerror}") from error
    if not head.startswith("<!DOCTYPE html>"):
        return False
    if 'name="generator"' in head:
        return _GENERATOR in head
    return re.search(r"<title>[^<]* - fedjax-lora</title>", head) is not None


def _page(runs: Sequence[Run], plots: Sequence[Plot]) -> str:
    names = [run.name for run in runs]
    figures = "\n".join(map(figure, plots))
    body = f"""{about(heading(runs))}
{_warnings(runs)}
<div class="card scroll">
{_table(runs, summary_rows(runs))}
</div>
<h2>Rounds</h2>
<div class="plots">
{figures}
</div>
<h2>Configuration</h2>
{_configuration(runs)}"""
    return framed(", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} runs", body)


def framed(title: str, body: str) -> str:
    """A whole page: the HTML `body` under a title, which is text."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{_GENERATOR}
<title>{escape(title)} - fedjax-lora</title>
<style>{CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def about(parts: Mapping[str, str]) -> str:
    """What was run, in one line: label -> text."""
    spans = (f"<span><b>{escape(label)}</b> {escape(text)}</span>" for label, text in parts.items())
    return f'<p class="about">{" ".join(spans)}</p>'


def _warnings(runs: Sequence[Run]) -> str:
    """A box for each run that has any."""
    boxes = []
    for run in runs:
        if warnings := run.summary.get("warnings"):
            items = "\n".join(f"<li>{escape(str(warning))}</li>" for warning in warnings)
            name = f": {escape(run.name)}" if len(runs) > 1 else ""
            boxes.append(f'<section class="card warning">\n<h2>Warnings{name}</h2>\n<ul>\n{items}\n</ul>\n</section>')
    return "\n".join(boxes)


def _configuration(runs: Sequence[Run]) -> str:
    """All options, those that differ between the runs first; and those that are not the defaults."""
    differing = differing_keys(runs)
    every = dict.fromkeys([*differing, *(key for run in runs for key in run.config)])
    chosen = {key for run in runs for key in other_than_default(run.config)}
    tables = {
        "What differs from the defaults": [key for key in every if key in chosen],
        "All options": list(every),
    }
    return "\n".join(
        f'<details class="card">\n<summary>{label}</summary>\n<div class="scroll">\n'
        f"{_table(runs, setting_rows(runs, keys), set(differing))}\n</div>\n</details>"
        for label, keys in tables.items()
    )


def _table(runs: Sequence[Run], rows: Iterable[Row], marked: Iterable[str] = ()) -> str:
    heads = "".join(
        f'<th scope="col"><span class="swatch" style="background: {color}"></span>{escape(run.name)}</th>'
        for run, color in zip(runs, run_colors(len(runs)), strict=True)
    )
    lines = []
    for label, cells in rows:
        mark = ' class="differs"' if label in marked else ""
        titles = (f' title="{escape(cell.exact)}"' if cell.exact else "" for cell in cells)
        values = "".join(f"<td{title}>{escape(cell.text)}</td>" for title, cell in zip(titles, cells, strict=True))
        lines.append(f'<tr{mark}><th scope="row">{escape(label)}</th>{values}</tr>')
    body = "\n".join(lines)
    return f"<table>\n<thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def figure(plot: Plot) -> str:
    """A plot under its title and over its legend, or why there is none."""
    body = f"{plot.svg}\n{_legend(plot.legend)}" if plot.svg else f'<p class="note">{escape(plot.note)}</p>'
    return f'<figure class="card">\n<figcaption>{escape(plot.title)}</figcaption>\n{body}\n</figure>'


def _legend(keys: Sequence[Key]) -> str:
    """Beside the lines and not over them; of many runs the first, since the table has the colours of all."""
    items = [
        f'<li><i style="border-top-style: {key.stroke}; border-top-color: {key.color}"></i>{escape(key.label)}</li>'
        for key in keys[:_LONGEST_LEGEND]
    ]
    if more := len(keys) - len(items):
        items.append(f'<li class="note">and {more} more, coloured as in the table</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'
