"""What the scripts of both pages for labelling share: the server, the person, keys, progress.

A page of its own has `draw(found)`, which draws a question and what had been said of it,
`entered()`, which Enter calls, `letters`, by key what each does, and `pressed(event)` for all
other keys.
"""

from __future__ import annotations

from html import escape

from tppo.stages.live_page import SHARED

COMMON = SHARED + r"""
const key = new URLSearchParams(location.search).get("key");
const client = sessionStorage.getItem("client") || Array.from(
  crypto.getRandomValues(new Uint8Array(12)), b => b.toString(16).padStart(2, "0")).join("");
sessionStorage.setItem("client", client);
let item = null, busy = false;

async function call(path, body) {
  let found;
  try {
    const person = {client, annotator: $("annotator").value};
    const reply = await fetch(path, {method: "POST", body: JSON.stringify({...person, ...body}),
      headers: {"Content-Type": "application/json", "X-Tppo-Key": key}});
    found = await reply.json();
  } catch (error) {
    found = {error: {message: "The labelling cannot be reached. What was judged so far is kept; " +
      "start the command again and open the address that it prints."}};
  }
  $("error").textContent = found.error ? visible(found.error.message) : "";
  return found.error ? null : found;
}

async function send(path, body) {
  if (busy) return;
  busy = true;
  const found = await call(path, body);
  busy = false;
  if (found) show(found);
}

function show(found) {
  drawFigures(found.progress);
  item = found.item;
  $("work").hidden = !item;
  $("done").hidden = Boolean(item);
  const {labelled, wanted} = found.progress;
  const count = labelled + " of " + wanted + " are done";
  if (!item) {
    $("why").textContent = (labelled >= wanted ? "That is all that was asked for: "
      : "Nothing is left for you: ") + count + ".";
    $("said").textContent = $("why").textContent;
    $("finish").focus();
    return;
  }
  $("said").textContent = count + ".";
  listed("history", item.history);
  $("history").scrollTop = $("history").scrollHeight;  // the newest, which says most
  $("truth").hidden = !item.targets;
  listed("targets", item.targets || []);
  draw(found);
}

function listed(id, lines) {
  $(id).replaceChildren(...lines.map(line => {
    const made = element("li");
    made.append(element("bdi", "", visible(line)));
    return made;
  }));
}

function percent(share) { return (100 * share).toFixed(0) + " %"; }
function drawFigures(p) {
  $("fill").style.width = Math.min(100, 100 * p.labelled / p.wanted) + "%";
  const made = [p.labelled + " of " + p.wanted];
  const names = Object.keys(p.annotators);
  if (names.length > 1)
    made.push(names.map(name => visible(name) + " " + p.annotators[name]).join(", "));
  if (p.seconds !== null) made.push(p.seconds.toFixed(0) + " s each");
  if (p.agreement) {
    const a = p.agreement;
    made.push("a model of your labels agrees with you on " + percent(a.share) + " of " + a.words +
      " words that it did not learn from (" + percent(a.low) + " to " + percent(a.high) + ")" +
      (a.before === null ? "" : ", " + percent(a.before) + " before this round"));
  }
  if (p.foretold) made.push("it foretold " + percent(p.foretold.share) + " of the last " +
    p.foretold.answers + " answers");
  $("figures").replaceChildren(...made.map(text => element("span", "soft", text)));
  $("stop").hidden = !p.enough;
}

async function finish() {
  if (await call("/finish", {})) {
    document.body.replaceChildren(element("p", "", "What you said is kept, and the command goes " +
      "on. This page can be closed."));
  }
}
let sure = false;
function end() {  // with fewer than were asked for: a second press, so that no slip ends it
  if (sure) finish();
  sure = !sure;
  $("end").textContent = sure ? "End here: press again" : "End here";
}
function undo() { send("/undo", {}); }
function skip() { if (item) send("/skip", {id: item.id}); }
function help() {
  $("help").hidden = !$("help").hidden;
  $("ask").setAttribute("aria-expanded", String(!$("help").hidden));
  if (!$("help").hidden) $("help").scrollIntoView({block: "nearest"});
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (["INPUT", "TEXTAREA"].includes(event.target.tagName)) return;
  if (event.key === "Escape" && !$("help").hidden) { help(); event.preventDefault(); return; }
  if (event.target.id === "history" && event.key.startsWith("Arrow")) return;  // it scrolls
  const own = event.target.tagName === "BUTTON" && !event.target.classList.contains("word");
  if (own && (event.key === "Enter" || event.key === " ")) return;
  const act = event.key === "Enter" ? entered
    : {s: skip, u: undo, "?": help, ...letters}[event.key];
  if (act) {
    event.preventDefault();
    if (!event.repeat) act();  // a key that is held down says a thing once
  } else if (item) pressed(event);
});
for (const [id, act] of [["undo", undo], ["back", undo], ["skip", skip], ["ask", help],
                         ["finish", finish], ["end", end]])
  $(id).addEventListener("click", act);
$("settings").addEventListener("submit", event => event.preventDefault());
$("guidance").addEventListener("change", () => call("/guidance", {text: $("guidance").value}));
$("annotator").addEventListener("change", () => { item = null; send("/next", {fresh: true}); });
"""

BEGIN = '\nsend("/next", {});\n'


def frame(
    title: str,
    work: str,
    actions: str,
    keys: tuple[tuple[str, str], ...],
    note: str,
    *,
    annotator: str,
    guidance: str,
) -> str:
    """The body of a page.

    title, keys, note, annotator, guidance: text.  work: markup of the answers.  actions: markup of
    the buttons that answer, before those that both pages have.
    """
    shown = "".join(f"<dt><kbd>{escape(name)}</kbd></dt><dd>{escape(does)}</dd>"
                    for name, does in keys)  # fmt: skip
    return f"""<header>
<h1>{escape(title)}</h1>
<div class="bar"><div id="fill"></div></div>
<div id="figures"></div>
<p id="said" role="status"></p>
<p id="stop" class="soft" hidden>The last labels have changed next to nothing of what the model
knows: you may stop here.</p>
</header>
<main id="work" hidden>
<section aria-label="history"><h2>What the user did, the newest last</h2>
<ol id="history" tabindex="0" aria-label="history"></ol>
<div id="truth" hidden><h2>What he searched for next</h2><ul id="targets"></ul></div></section>
<div id="judged">
{work}
<div class="actions"><div>{actions}</div><div>
<button type="button" id="undo">Undo <kbd>u</kbd></button>
<button type="button" id="skip">Skip <kbd>s</kbd></button>
<button type="button" id="ask" aria-expanded="false" aria-controls="help">Keys <kbd>?</kbd></button>
</div></div>
<div id="help" hidden><dl>{shown}</dl><p class="soft">{escape(note)}</p></div>
</div>
</main>
<section id="done" hidden><p id="why"></p><div class="actions">
<button type="button" id="finish">Finish <kbd>Enter</kbd></button>
<button type="button" id="back">Undo the last <kbd>u</kbd></button></div></section>
<p id="error" role="alert"></p>
<form id="settings">
<label>By what you judge <textarea id="guidance" rows="1">{escape(guidance)}</textarea></label>
<label>You are <input id="annotator" value="{escape(annotator)}" size="10" autocomplete="off">
</label>
<button type="button" id="end">End here</button>
</form>"""
