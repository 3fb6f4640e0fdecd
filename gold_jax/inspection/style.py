"""The style sheet of the page, for light and for dark surroundings. Every rule stays inside `.gold-jax-pair`."""

STYLE = """
.gold-jax-pair {
  color-scheme: light dark;
  --ground: #ffffff; --panel: #f5f6f8; --line: #dfe2e6; --ink: #1b1f24; --quiet: #5d6570; --faint: #9aa2ad;
  --student: #0b7285; --teacher: #9c2a7a;
  --m0: #ffe08a; --m1: #a9d8f5; --m2: #bfe6ac; --m3: #f8c1d0;
  --matched: #2f9e6e; --routed: #7fb3e8; --numerals: #f0a04b; --whitespace: #c3a6e8; --lost: #c9ced6;
  background: var(--ground); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; box-sizing: border-box;
}
@media (prefers-color-scheme: dark) {
  .gold-jax-pair {
    --ground: #15181c; --panel: #1e2227; --line: #343a42; --ink: #e6e9ed; --quiet: #a0a8b3; --faint: #6b7480;
    --student: #5cc8dc; --teacher: #e58ac6;
    --m0: #6b5310; --m1: #1d4f70; --m2: #2f5a22; --m3: #6e2a41;
    --matched: #3aa878; --routed: #4a86c2; --numerals: #c77f2e; --whitespace: #8a6bb8; --lost: #4a515b;
  }
}
.gold-jax-pair h1 { font-size: 1.35rem; margin: 0 0 .75rem; }
.gold-jax-pair h2 { font-size: 1.05rem; margin: 2.25rem 0 .25rem; padding-top: .75rem; border-top: 1px solid var(--line); }
.gold-jax-pair h3 { font-size: .9rem; margin: 1.25rem 0 .35rem; color: var(--quiet); font-weight: 600; }
.gold-jax-pair p { margin: .25rem 0 .75rem; color: var(--quiet); max-width: 50rem; }
.gold-jax-pair ul { margin: 1rem 0; padding-left: 1.2rem; max-width: 50rem; }
.gold-jax-pair .who { display: grid; grid-template-columns: auto 1fr; gap: .1rem .8rem; margin: 0; }
.gold-jax-pair .who dt, .gold-jax-pair th.s, .gold-jax-pair b.s { color: var(--student); font-weight: 600; }
.gold-jax-pair .who dt.t, .gold-jax-pair th.t, .gold-jax-pair b.t { color: var(--teacher); font-weight: 600; }
.gold-jax-pair .who dd { margin: 0; overflow-wrap: anywhere; }
.gold-jax-pair .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.gold-jax-pair .tile { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.gold-jax-pair .tile b { display: block; font-size: 1.35rem; line-height: 1.3; white-space: nowrap; font-variant-numeric: tabular-nums; }
.gold-jax-pair .tile span { color: var(--quiet); font-size: .85rem; }
.gold-jax-pair .tokens {
  background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem .75rem .25rem;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Noto Sans Mono", monospace;
  font-size: 13.5px; line-height: 1.45; overflow-wrap: anywhere;
}
.gold-jax-pair .g { display: inline-grid; vertical-align: top; margin: 0 3px 9px 0; border-radius: 4px; max-width: 100%; }
.gold-jax-pair .g > span { padding: 0 3px; white-space: pre-wrap; min-width: 1ch; }
.gold-jax-pair .g > span + span { color: var(--quiet); }
.gold-jax-pair .m0 { background: var(--m0); } .gold-jax-pair .m1 { background: var(--m1); }
.gold-jax-pair .m2 { background: var(--m2); } .gold-jax-pair .m3 { background: var(--m3); }
.gold-jax-pair .g[class*=" m"] > span + span { color: inherit; }
.gold-jax-pair .g i { font-style: normal; }
.gold-jax-pair .g i + i { border-left: 1px solid color-mix(in srgb, var(--ink) 55%, transparent); margin-left: 2px; padding-left: 2px; }
.gold-jax-pair .g:hover { outline: 1px solid var(--quiet); }
.gold-jax-pair .x { color: var(--faint); }
.gold-jax-pair .g[class*=" m"] .x { color: inherit; opacity: .65; }
.gold-jax-pair .scroll { overflow-x: auto; }
.gold-jax-pair table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; background: none; }
.gold-jax-pair th, .gold-jax-pair td { padding: .25rem .9rem .25rem 0; text-align: right; border: 0; border-bottom: 1px solid var(--line); background: none; color: inherit; }
.gold-jax-pair.gold-jax-pair tbody tr:nth-child(n) { background: none; }
.gold-jax-pair th { color: var(--quiet); font-weight: 500; font-size: .85rem; vertical-align: bottom; }
.gold-jax-pair th:first-child, .gold-jax-pair td:first-child, .gold-jax-pair td.l, .gold-jax-pair th.l { text-align: left; }
.gold-jax-pair tr.all td { font-weight: 600; }
.gold-jax-pair td.in1 { padding-left: 1.2rem; } .gold-jax-pair td.in2 { padding-left: 2.4rem; }
.gold-jax-pair code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em; background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: 0 .25em; color: inherit; white-space: pre-wrap; }
.gold-jax-pair .pair { display: inline-block; margin: 0 .9rem .2rem 0; white-space: nowrap; }
.gold-jax-pair .bar { display: block; height: .7rem; border-radius: 3px; background: var(--routed); min-width: 2px; }
.gold-jax-pair td.bars { width: 11rem; }
.gold-jax-pair .stack { display: flex; height: 1.5rem; border-radius: 5px; overflow: hidden; background: var(--lost); margin: .15rem 0 .6rem; }
.gold-jax-pair .stack span { display: block; }
.gold-jax-pair .key { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .35rem; vertical-align: -1px; }
.gold-jax-pair .keys > span { margin-right: 1.1rem; white-space: nowrap; color: var(--quiet); font-size: .85rem; }
"""

#: What stands around the fragment on a page of its own.
GROUND = """
html { background: #ffffff; color-scheme: light dark; }
body { margin: 0; }
@media (prefers-color-scheme: dark) { html { background: #15181c; } }
"""
