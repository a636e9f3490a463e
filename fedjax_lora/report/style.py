"""How the page looks: on light and on dark, on a telephone and on a wide screen."""

CSS = """
:root { color-scheme: light dark;
  --ink: #1c2024; --soft: #60646c; --paper: #fcfcfd; --card: #fff; --grid: #d9dbe0; --alert: #b45309; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --paper: #111214; --card: #18191b; --grid: #3a3d42; --alert: #fbbf24; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 80rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.about { margin: .25rem 0 1rem; color: var(--soft); }
.about span { margin-right: .9em; }
.about b { font-weight: 600; color: var(--ink); }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 1rem; }
.warning { border-color: var(--alert); border-left-width: 5px; margin-bottom: 1rem; }
.warning h2 { margin: 0; color: var(--alert); }
.warning ul { margin: 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
tbody th { font-weight: normal; color: var(--soft); white-space: nowrap; }
thead th { max-width: 16rem; vertical-align: bottom; }
thead th, td { overflow-wrap: anywhere; min-width: 8rem; }
tbody th, thead td { position: sticky; left: 0; background: var(--card); }
td[title] { cursor: help; }
.differs th, .differs td { font-weight: 600; color: var(--ink); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.legend { list-style: none; margin: .5rem 0 0; padding: 0; font-size: .85rem;
  display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
.legend i { display: inline-block; width: 1.8em; margin-right: .5em; vertical-align: middle;
  border-top: 2.5px solid; }
.note { color: var(--soft); }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
details table { margin-top: .75rem; font-size: .9rem; }
@media (max-width: 480px) { body { padding: 1rem .5rem 2rem; } .card { padding: .6rem; } }
"""
