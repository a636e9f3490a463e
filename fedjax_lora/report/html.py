"""The report: one HTML file that needs nothing beside it."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fedjax_lora.io.files import write_atomically
from fedjax_lora.report.plots import Plot, all_plots, run_colors
from fedjax_lora.report.runs import Run, load_runs
from fedjax_lora.report.tables import summary_rows

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1c2024; --soft: #60646c; --paper: #fcfcfd; --card: #fff; --grid: #d9dbe0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --paper: #111214; --card: #18191b; --grid: #3a3d42; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 72rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
tbody th { font-weight: normal; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 7rem; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.note { color: var(--soft); }
"""


def write_report(run_folders: Iterable[str | Path], out_path: str | Path) -> None:
    """Write the report of one run, or of several side by side, to `out_path`.

    Raises:
      ValueError: a folder is not a run's, or has no round in its log; or `out_path` cannot be written.
    """
    if Path(out_path).is_dir():
        raise ValueError(f"report {out_path} must be a path that can be written, got a folder")
    runs = load_runs(run_folders)
    text = _page(runs, all_plots(runs))
    try:
        write_atomically(Path(out_path), text)
    except OSError as error:
        raise ValueError(f"report {out_path} must be a path that can be written, got {error.strerror}") from error


def _page(runs: Sequence[Run], plots: Sequence[Plot]) -> str:
    title = escape(", ".join(run.name for run in runs))
    figures = "\n".join(map(_figure, plots))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - fedjax-lora</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<div class="card scroll">
{_table(runs)}
</div>
<h2>Rounds</h2>
<div class="plots">
{figures}
</div>
</body>
</html>
"""


def _table(runs: Sequence[Run]) -> str:
    heads = "".join(
        f'<th scope="col"><span class="swatch" style="background: {color}"></span>{escape(run.name)}</th>'
        for run, color in zip(runs, run_colors(len(runs)), strict=True)
    )
    rows = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for label, cells in summary_rows(runs)
    )
    return f"<table>\n<thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _figure(plot: Plot) -> str:
    body = plot.svg or f'<p class="note">{escape(plot.note)}</p>'
    return f'<figure class="card">\n<figcaption>{escape(plot.title)}</figcaption>\n{body}\n</figure>'
