"""The style sheets of all pages: light and dark, phone to wall, nothing from elsewhere."""

COLOURS = """
:root {
  --page: #f6f6f8; --card: #ffffff; --ink: #1c1d22; --soft: #5a5d68; --line: #dfe0e6;
  --pos: #3b82d0; --neg: #e0812b; --link: #1f5fae; --most: 62%; --bad: #a4262c;
  --c0: #1f6fc0; --c1: #c8641a; --c2: #2f8f5b; --c3: #8a4fb5; --c4: #b5365a; --c5: #6b6f7a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14151a; --card: #1d1f26; --ink: #ecedf2; --soft: #a8acb9; --line: #343743;
    --pos: #3f86d8; --neg: #c96a16; --link: #86b7f2; --most: 70%; --bad: #ff9a9a;
    --c0: #6cb0f5; --c1: #f0a45f; --c2: #6fcf97; --c3: #c79bea; --c4: #f28aa5; --c5: #a2a6b4;
  }
}
"""

BASE = COLOURS + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 76rem;
  background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 1.25rem 0 .4rem; font-size: .8125rem; font-weight: 600; color: var(--soft); }
p { max-width: 52rem; margin: .4rem 0 .8rem; }
.soft, header p { color: var(--soft); }
a { color: var(--link); }
.scroll, article, figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.scroll { overflow-x: auto; margin-bottom: 1.25rem; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .4rem .8rem; text-align: right; font-variant-numeric: tabular-nums; }
th { font-weight: 400; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
tfoot th, tfoot td { font-weight: 600; border-top: 1px solid var(--line); }
.charts {
  display: grid; gap: 1rem; margin-bottom: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
}
figure { margin: 0; padding: .75rem; }
figcaption { font-size: .875rem; font-weight: 600; margin-bottom: .25rem; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; }
circle { stroke: none; }
.legend {
  list-style: none; margin: .5rem 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .25rem 1rem; font-size: .8125rem; color: var(--soft);
}
.legend svg { width: 28px; height: 8px; margin-right: .4rem; }
.legend line { stroke-width: 2; }
details { font-size: .875rem; }
summary { color: var(--soft); cursor: pointer; }
pre { margin: .5rem 0 0; white-space: pre-wrap; font-size: .8125rem; }
@media (max-width: 44rem) {
  body { padding: 1.5rem 1rem 3rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tfoot, tr, th[scope=row], td { display: block; }
  tr { padding: .5rem .9rem; border-top: 1px solid var(--line); }
  tr:has(td:nth-child(6)) { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5rem; }
  tr:has(td:nth-child(6)) :is(th, td:has(small)) { grid-column: 1 / -1; }
  tbody:first-of-type tr:first-child { border-top: 0; }
  th[scope=row] { padding: 0 0 .15rem; font-weight: 600; }
  td { padding: .05rem 0; display: flex; justify-content: space-between; gap: 1rem; }
  td::before { content: attr(data-label); color: var(--soft); text-align: left; }
  tfoot th, tfoot td { border-top: 0; }
  td > span { text-align: right; }
}
""" + "".join(
    f".c{k} {{ stroke: var(--c{k}); }} circle.c{k} {{ fill: var(--c{k}); }}\n" for k in range(6)
)

HEAT = """
input[name=show] { position: absolute; opacity: 0; }
label {
  display: inline-block; padding: .3rem .9rem; margin: 0 .4rem .4rem 0; cursor: pointer;
  border: 1px solid var(--line); border-radius: 999px; background: var(--card);
  color: var(--soft); font-size: .875rem;
}
input:checked + label { background: var(--ink); border-color: var(--ink); color: var(--page); }
input:focus-visible + label { outline: 2px solid var(--link); outline-offset: 2px; }
.key {
  display: flex; flex-wrap: wrap; gap: .5rem 2rem; align-items: center;
  margin: .75rem 0; color: var(--soft); font-size: .875rem; font-variant-numeric: tabular-nums;
}
.marks span { margin-right: 1rem; }
.key .mark { display: inline-block; width: 1em; color: var(--ink); text-align: center; }
.ramp {
  display: inline-block; width: 7rem; height: .75rem; margin: 0 .5rem; border-radius: 3px;
  vertical-align: -.06rem;
  background: linear-gradient(90deg in oklab,
    color-mix(in oklab, var(--neg) var(--most), var(--card)), var(--card),
    color-mix(in oklab, var(--pos) var(--most), var(--card)));
  box-shadow: inset 0 0 0 1px var(--line);
}
article { padding: 1rem 1.15rem; margin-bottom: 1rem; }
article:target { border-color: var(--link); }
article h3:first-child, article h4 { margin-top: 0; }
article > h3 { color: var(--ink); font-size: .9375rem; }
h4 { margin: 0 0 .4rem; font-size: .8125rem; font-weight: 400; color: var(--soft); }
h4 b { color: var(--ink); }
.sides { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 24rem), 1fr)); }
.tokens, .targets {
  list-style: none; margin: 0 0 .4rem; padding: 0; display: flex; flex-wrap: wrap; gap: 2px;
}
.t {
  display: flex; flex-direction: column; align-items: center; text-align: center;
  min-width: 2.7rem; padding: .25rem .35rem .15rem; border-radius: 5px; line-height: 1.25;
  box-shadow: inset 0 0 0 1px var(--line); max-width: 100%;
}
.t.word:not(:first-child) { margin-left: .45rem; }
.t bdi { white-space: pre-wrap; font-size: .9375rem; }
.figures { display: flex; gap: .25rem; font-size: .6875rem; font-variant-numeric: tabular-nums; }
.t:hover { box-shadow: inset 0 0 0 2px var(--ink); }
.t { --hue: var(--neg); --strength: var(--r); }
.t.r1 { --hue: var(--pos); }
#show-value:checked ~ .heat .t { --strength: var(--v, 0); --hue: var(--neg); }
#show-value:checked ~ .heat .t.v1 { --hue: var(--pos); }
#show-advantage:checked ~ .heat .t { --strength: var(--a, 0); --hue: var(--neg); }
#show-advantage:checked ~ .heat .t.a1 { --hue: var(--pos); }
.t { background: color-mix(in oklab, var(--hue) calc(var(--strength) * var(--most)), var(--card)); }
.targets li {
  padding: .1rem .6rem; border: 1px solid var(--line); border-radius: 999px; font-size: .875rem;
}
.targets { gap: .4rem; }
.value-only, .advantage-only { display: none; }
#show-value:checked ~ .heat .value-only { display: inline; }
#show-advantage:checked ~ .heat .advantage-only { display: inline; }
#show-value:checked ~ .heat .reward-only { display: none; }
#show-advantage:checked ~ .heat .reward-only { display: none; }
"""
