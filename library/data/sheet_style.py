"""How the contact sheet looks: light or dark as the reader's system is, narrow or wide as the window is."""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #fafafa; --card: #fff; --line: #ddd; --text: #1c1c1e; --quiet: #62626a; --strong: #2f6fb3; --mark: #e4edf7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #17181a; --card: #212226; --line: #3a3b40; --text: #ececee; --quiet: #a0a0a8;
    --strong: #6fa8e0; --mark: #2b3b4d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 100rem;
  background: var(--page); color: var(--text); font: 1rem/1.45 system-ui, sans-serif;
}
h1 { margin: 0 0 .6rem; font-size: 1.5rem; }
h2 { margin: 1.6rem 0 .3rem; font-size: 1.15rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; }
.facts { margin: 0; padding: .7rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.facts li { list-style: none; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 monospace; }
.buckets { display: block; width: 100%; max-width: 32rem; height: auto; }
.buckets text { fill: var(--text); font-size: 12px; dominant-baseline: central; }
.buckets .size { text-anchor: end; fill: var(--quiet); }
.buckets .shape { fill: none; stroke: var(--quiet); }
.buckets .bar { fill: var(--strong); }
.left-out { color: var(--quiet); }
.filter { color: var(--quiet); }
.samples > input { position: absolute; opacity: 0; }
.samples > label {
  display: inline-block; margin: .15rem; padding: .1rem .6rem; overflow-wrap: anywhere; cursor: pointer;
  border: 1px solid var(--line); border-radius: 1rem; background: var(--card);
}
.samples small { color: var(--quiet); }
input:checked + label { border-color: var(--strong); background: var(--mark); }
input:focus-visible + label { outline: 2px solid var(--strong); outline-offset: 1px; }
.cards { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .8rem; margin-top: .8rem; }
.card {
  width: min-content; min-width: min(18rem, 100%); max-width: 100%; padding: .7rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
}
.pictures {
  display: flex; flex-wrap: wrap; align-items: flex-start; gap: .5rem;
  width: max-content; max-width: min(100%, 90vw);
}
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; border-radius: .2rem; }
figcaption { color: var(--quiet); font-size: .8rem; }
.caption { max-height: 14em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.empty { color: var(--quiet); font-style: italic; }
.name { color: var(--quiet); font-size: .85rem; overflow-wrap: anywhere; }
.note {
  display: inline-block; margin-left: .4rem; padding: 0 .5rem;
  border-radius: 1rem; background: var(--mark); color: var(--text);
}
@media (max-width: 40rem) { figure:not(:only-child) { flex: 0 1 calc(50% - .25rem); } }
@media print { .caption { max-height: none; } .card { break-inside: avoid; } }
"""
