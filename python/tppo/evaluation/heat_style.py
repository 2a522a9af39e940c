"""The style sheet of the heat map page: light and dark, no script, nothing from elsewhere."""

CSS = """
:root {
  --page: #f6f6f8; --card: #ffffff; --ink: #1c1d22; --soft: #5d606b; --line: #dfe0e6;
  --pos: #3b82d0; --neg: #e0812b; --link: #1f5fae; --most: 62%;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14151a; --card: #1d1f26; --ink: #ecedf2; --soft: #a2a6b4; --line: #343743;
    --pos: #3f86d8; --neg: #c96a16; --link: #86b7f2; --most: 70%;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.75rem; letter-spacing: -.015em; }
header p { margin: .25rem 0 1.25rem; color: var(--soft); }
h2 { margin: 0 0 .75rem; font-size: 1rem; overflow-wrap: anywhere; }
h3 { margin: 1rem 0 .35rem; font-size: .75rem; font-weight: 600; color: var(--soft); }
a { color: var(--link); }
input[name=show] { position: absolute; opacity: 0; }
label {
  display: inline-block; padding: .3rem .9rem; margin-right: .4rem; cursor: pointer;
  border: 1px solid var(--line); border-radius: 999px; background: var(--card);
  color: var(--soft); font-size: .875rem;
}
input:checked + label { background: var(--ink); border-color: var(--ink); color: var(--page); }
input:focus-visible + label { outline: 2px solid var(--link); outline-offset: 2px; }
.legend {
  display: flex; flex-wrap: wrap; gap: .5rem 2rem; align-items: center;
  margin: 1rem 0; color: var(--soft); font-size: .875rem; font-variant-numeric: tabular-nums;
}
.marks span { margin-right: 1rem; }
.legend .mark { display: inline-block; width: 1em; color: var(--ink); text-align: center; }
.ramp {
  display: inline-block; width: 9rem; height: .75rem; margin: 0 .5rem; border-radius: 3px;
  vertical-align: -.06rem;
  background: linear-gradient(90deg in oklab,
    color-mix(in oklab, var(--neg) var(--most), var(--card)), var(--card),
    color-mix(in oklab, var(--pos) var(--most), var(--card)));
  box-shadow: inset 0 0 0 1px var(--line);
}
.scroll, article {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin-bottom: 1.25rem;
}
.scroll { overflow-x: auto; max-height: 24rem; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .4rem 1rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
thead th {
  position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600;
  box-shadow: inset 0 -1px var(--line);
}
tbody th { font-weight: 400; }
td { font-variant-numeric: tabular-nums; }
tfoot th, tfoot td {
  position: sticky; bottom: 0; background: var(--card); font-weight: 600;
  box-shadow: inset 0 1px var(--line);
}
article { padding: 1.1rem 1.25rem; scroll-margin-top: 1rem; }
article:target { border-color: var(--link); }
ol, ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 3px; }
.tokens { margin-bottom: 6px; }
.t {
  display: flex; flex-direction: column; align-items: center;
  min-width: 2.6rem; padding: .3rem .45rem .2rem; border-radius: 5px; line-height: 1.25;
  box-shadow: inset 0 0 0 1px var(--line);
}
.t bdi { white-space: pre; font-size: .9375rem; }
.figures { display: flex; gap: .3rem; font-size: .6875rem; font-variant-numeric: tabular-nums; }
.t:hover { box-shadow: inset 0 0 0 2px var(--ink); }
.t { --hue: var(--neg); --strength: var(--r); }
.t.r1, #show-advantage:checked ~ main .t.a1 { --hue: var(--pos); }
#show-advantage:checked ~ main .t { --strength: var(--a, 0); }
#show-advantage:checked ~ main .t.a-1 { --hue: var(--neg); }
.t { background: color-mix(in oklab, var(--hue) calc(var(--strength) * var(--most)), var(--card)); }
.targets li {
  padding: .15rem .6rem; border: 1px solid var(--line); border-radius: 999px; font-size: .875rem;
}
.targets { gap: .4rem; }
details { margin-top: 1rem; font-size: .875rem; }
summary { color: var(--soft); cursor: pointer; }
pre { margin: .5rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8125rem; }
.advantage-only { display: none; }
#show-advantage:checked ~ main .advantage-only { display: inline; }
#show-advantage:checked ~ main .reward-only { display: none; }
"""
