"""The style sheet of the page of `tppo serve`: light and dark, nothing from elsewhere."""

from tppo.evaluation.style import COLOURS

CSS = COLOURS + """
* { box-sizing: border-box; }
[hidden] { display: none; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 58rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.75rem; letter-spacing: -.015em; overflow-wrap: anywhere; }
header p { margin: .25rem 0 1.25rem; color: var(--soft); }
h2 { margin: 0 0 .6rem; font-size: .9375rem; }
form, article {
  padding: 1.1rem 1.25rem; margin-bottom: 1.25rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
ol, ul { list-style: none; margin: 0; padding: 0; }
#history { display: flex; flex-wrap: wrap; gap: .4rem; }
.event {
  display: flex; align-items: center; gap: .45rem; max-width: 100%;
  padding: .15rem .25rem .15rem .7rem;
  border: 1px solid var(--line); border-radius: 999px; overflow-wrap: anywhere;
}
.event small { flex: none; }
@media (max-width: 30rem) { #text { flex-basis: 100%; order: -1; } }
small { color: var(--soft); font-size: .75rem; }
#empty { margin: 0; color: var(--soft); font-size: .9375rem; }
input, select, textarea, button {
  font: inherit; color: inherit; background: var(--page);
  border: 1px solid var(--line); border-radius: 8px; padding: .45rem .7rem;
}
:focus-visible { outline: 2px solid var(--link); outline-offset: 1px; }
textarea { width: 100%; resize: vertical; }
.line { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .9rem; }
#text { flex: 1 1 14rem; min-width: 0; }
button { cursor: pointer; }
button[type=submit] { background: var(--link); border-color: var(--link); color: var(--card); }
.remove {
  border: 0; background: none; padding: 0 .45rem; border-radius: 999px; color: var(--soft);
}
.options {
  display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; margin-top: .9rem;
  color: var(--soft); font-size: .875rem;
}
.options input { width: 7rem; padding: .2rem .45rem; }
#error { margin: 0 0 1rem; color: var(--bad); overflow-wrap: anywhere; }
#error:empty { display: none; }
#answers[aria-busy=true] { opacity: .55; }
.queries li { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .75rem; }
.use {
  padding: .1rem 0; border: 0; background: none; color: var(--link); text-align: left;
  font-size: 1.0625rem; overflow-wrap: anywhere;
}
.use:disabled { color: inherit; cursor: default; }
details { margin-top: .8rem; font-size: .875rem; }
summary { color: var(--soft); cursor: pointer; }
.tokens { display: flex; flex-wrap: wrap; gap: 3px; margin-top: .5rem; }
.break { flex-basis: 100%; height: 2px; }
.t {
  display: flex; flex-direction: column; align-items: center; min-width: 2.6rem; max-width: 100%;
  padding: .3rem .45rem .2rem; border-radius: 5px; line-height: 1.25; overflow-wrap: anywhere;
  box-shadow: inset 0 0 0 1px var(--line); --hue: var(--neg);
  background: color-mix(in oklab, var(--hue) calc(var(--r, 0) * var(--most)), var(--card));
}
.t.pos { --hue: var(--pos); }
.t bdi { white-space: pre-wrap; font-size: .9375rem; }
.t small { color: var(--ink); font-size: .6875rem; font-variant-numeric: tabular-nums; }
"""
