"""The style sheet of the pages for labelling by hand."""

from tppo.evaluation.style import COLOURS

CSS = (
    COLOURS
    + """
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 72rem;
  background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.35rem; letter-spacing: -.01em; }
h2 { margin: 0 0 .6rem; font-size: .8125rem; font-weight: 600; color: var(--soft); }
p { margin: .35rem 0; }
.soft { color: var(--soft); font-size: .875rem; }
.bar { height: .4rem; margin: .6rem 0 .5rem; border-radius: 999px; background: var(--line); }
.bar div { height: 100%; border-radius: 999px; background: var(--pos); }
#figures {
  display: flex; flex-wrap: wrap;
  gap: .1rem 1.5rem; margin: 0 0 1rem; min-height: 1.5rem;
}
main {
  display: grid; gap: 1rem;
  grid-template-columns: minmax(14rem, 1fr) 2fr; align-items: start;
}
section {
  padding: 1rem 1.15rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; min-width: 0;
}
ol, ul { list-style: none; margin: 0; padding: 0; }
#history li, #targets li { padding: .3rem 0; border-top: 1px solid var(--line); }
#history li:first-child, #targets li:first-child { border-top: 0; }
#history { max-height: 60vh; overflow-y: auto; }
#truth { margin-top: 1rem; }
#judged { min-width: 0; }
#said {
  position: absolute; width: 1px; height: 1px; margin: 0; overflow: hidden; clip-path: inset(50%);
}
#two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.line { font-size: 1.125rem; }
.query {
  display: flex; flex-wrap: wrap; align-items: center; gap: .4rem;
  padding: .5rem .35rem; margin: 0 -.35rem;  /* the ring of a word is seen whole */
  border-top: 1px solid var(--line); max-height: 14rem; overflow-y: auto;
}
.query:first-child { border-top: 0; }
button, input, textarea {
  font: inherit; color: inherit; background: var(--page); border-radius: 8px;
  border: 1px solid color-mix(in oklab, var(--soft) 70%, var(--line)); padding: .4rem .8rem;
}
button { cursor: pointer; white-space: nowrap; }
.word {
  position: relative; padding: .3rem .7rem .3rem 1.75rem; min-height: 2.5rem; max-width: 100%;
  font-size: 1.125rem; background: var(--card); white-space: normal;
}
.word[tabindex="0"] { box-shadow: 0 0 0 2px var(--link); }
.word::before { content: "?"; position: absolute; left: .6rem; color: var(--soft); }
[dir=rtl] .word { padding: .3rem 1.75rem .3rem .7rem; }
[dir=rtl] .word::before { left: auto; right: .6rem; }
.word[aria-checked=true] {
  background: color-mix(in oklab, var(--pos) 30%, var(--card)); border-color: var(--pos);
}
.word[aria-checked=true]::before { content: "\\2713"; color: var(--ink); }
.word[aria-checked=false] {
  background: color-mix(in oklab, var(--neg) 26%, var(--card)); border-color: var(--neg);
}
.word[aria-checked=false]::before { content: "\\2717"; color: var(--ink); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.between { color: var(--soft); }
#whole { margin-top: .75rem; display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
#whole button[aria-pressed=true] {
  border-color: var(--link);
  box-shadow: inset 0 0 0 1px var(--link);
}
.actions, .actions div { display: flex; flex-wrap: wrap; gap: .5rem; }
.actions { margin-top: 1rem; }
.actions button, .word { touch-action: manipulation; }
.actions .first { background: var(--link); border-color: var(--link); color: var(--card); }
.actions button[aria-pressed=true] { outline: 3px solid var(--link); outline-offset: 2px; }
kbd {
  padding: 0 .35rem; border: 1px solid var(--line); border-radius: 4px; font: inherit;
  font-size: .8125rem; background: var(--page);
}
.first kbd { background: none; border-color: currentColor; }
#error { color: var(--bad); min-height: 1.5rem; margin: .5rem 0 0; }
#done { text-align: center; padding: 2rem 1rem; }
#done .actions { justify-content: center; }
form { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: 1rem; align-items: center; }
form label {
  display: flex; gap: .5rem;
  align-items: center; color: var(--soft); font-size: .875rem;
}
form label:first-child { flex: 1 1 24rem; }
form textarea { flex: 1; min-width: 0; field-sizing: content; resize: vertical; color: inherit; }
#help dl { display: grid; grid-template-columns: auto 1fr; gap: .25rem 1rem; margin: 0; }
#help dd { margin: 0; }
#help { margin-top: 1rem; }
@media (pointer: coarse) { button, input, textarea, .word { min-height: 2.75rem; } }
@media (max-width: 52rem) {
  html { scroll-padding-bottom: 5rem; }
  body { padding: 1rem .75rem 2rem; }
  main, #two { grid-template-columns: 1fr; gap: .75rem; }
  section { padding: .75rem .9rem; }
  #history { max-height: 9rem; }
  button, input, textarea, .word { min-height: 2.75rem; }
  .actions {
    position: sticky; bottom: 0; padding: .5rem 0;
    background: var(--page); border-top: 1px solid var(--line);
  }
  .actions div { flex: 1 1 auto; flex-wrap: nowrap; }
  .actions button { flex: 1; padding: .4rem .5rem; }
  #whole > :first-child { flex-basis: 100%; }
  form, form label:first-child { display: grid; grid-template-columns: 1fr; }
  kbd { display: none; }
  #help kbd { display: inline; }
}
"""
)
