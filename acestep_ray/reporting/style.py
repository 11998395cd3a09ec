"""How a page looks: light or dark as the reader's system is, on paper, and on a narrow screen."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #59636e; --surface: #ffffff; --raised: #f5f6f8;
  --line: #d5d9df; --accent: #0b63ce; --marked: #e6f4ea; --warned: #fff4db; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --muted: #9aa4b0; --surface: #14171b; --raised: #1d2126; --line: #363c45;
    --accent: #6cb0ff; --marked: #17331f; --warned: #3a2f12; } }
@media print { :root { color-scheme: light; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--surface); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; line-height: 1.35; margin: 0 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 48rem; }
a { color: var(--accent); }
nav { margin: 0 0 1rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: 0; padding: 0; }
pre { margin: 0 0 1rem; padding: .75rem 1rem; background: var(--raised); border-radius: 6px; white-space: pre-wrap;
  font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Noto Sans Mono", monospace; }
.note { padding: .5rem .9rem; border-left: 4px solid #d99a00; background: var(--warned); border-radius: 0 6px 6px 0;
  white-space: pre-wrap; }
.wide { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding: 0 0 .4rem; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: normal; min-width: 3rem; max-width: 28rem; }
th { font-weight: 600; color: var(--muted); border-bottom-width: 2px; white-space: nowrap; }
td.right, th.right { text-align: right; white-space: nowrap; }
td.centre, th.centre { text-align: center; }
td { overflow-wrap: break-word; }
tr.marked td { background: var(--marked); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr); gap: .15rem 1.25rem;
  margin: 0 0 1.25rem; font-size: .9rem; }
dt { color: var(--muted); }
dd { margin: 0; white-space: pre-wrap; }
figure { margin: 0 0 1.25rem; }
figcaption { color: var(--muted); font-size: .875rem; }
svg { display: block; height: auto; fill: currentColor; stroke-linejoin: round; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: flex-start; }
.figures figure { max-width: 100%; min-width: 0; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.25rem;
  margin: 0 0 1.25rem; align-items: start; }
.clip { min-width: 0; padding: 1rem; background: var(--raised); border: 1px solid var(--line); border-radius: 10px; }
.clip audio { display: block; width: 100%; margin: 0 0 .75rem; }
.clip dl { grid-template-columns: minmax(4rem, max-content) minmax(0, 1fr); }
.clip pre { background: var(--surface); max-height: 18rem; overflow-y: auto; font-family: inherit; }
.clip > :last-child { margin-bottom: 0; }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .4rem; } }
@media print {
  main { max-width: none; padding: 0; } nav, audio { display: none; } h1, h2, h3 { break-after: avoid; }
  figure, .clip, tr { break-inside: avoid; } .wide { overflow: visible; }
  .clip pre { max-height: none; } body { font-size: 11pt; } }
"""
