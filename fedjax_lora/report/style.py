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
.cells { overflow: auto; max-height: 34rem; padding-top: 0; font-size: .9rem; }
.cells th, .cells td { min-width: 0; overflow-wrap: normal; white-space: nowrap; }
.cells thead th { position: sticky; top: 0; z-index: 1; background: var(--card); padding-top: .8rem;
  white-space: normal; }
.cells thead th:first-child { left: 0; z-index: 2; }
.cells td.key { color: var(--soft); }
details.warning summary { color: var(--alert); }
details.warning h3 { font-size: .95rem; margin: .75rem 0 .25rem; }
.heat { border-collapse: separate; border-spacing: 2px; font-size: .85rem; }
.heat th, .heat td { border: 0; padding: .3rem .4rem; min-width: 0; text-align: center; white-space: nowrap; }
.heat td { border-radius: 3px; min-width: 2.8rem; }
.heat.bare td { min-width: .9rem; height: 1.1rem; padding: 0; }
.heat tbody th { text-align: right; }
.heat thead th { font-weight: normal; color: var(--soft); }
.heat .axis { font-weight: 600; color: var(--ink); }
.heat td.none { color: var(--soft);
  background: repeating-linear-gradient(45deg, transparent 0 4px, var(--grid) 4px 5px); }
.heat td.best { outline: 2px solid var(--ink); box-shadow: inset 0 0 0 2px var(--card); font-weight: 700; }
.maps { display: flex; flex-wrap: wrap; gap: 1rem; margin-bottom: 1rem; }
.maps figure { max-width: 100%; }
.scale { margin: .5rem 0 0; font-size: .85rem; color: var(--soft); }
.scale i { display: inline-block; width: 6rem; height: .7rem; margin: 0 .5em; border-radius: 2px; }
.note { color: var(--soft); }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
details table { margin-top: .75rem; font-size: .9rem; }
@media (max-width: 480px) { body { padding: 1rem .5rem 2rem; } .card { padding: .6rem; } }
"""
