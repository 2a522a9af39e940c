"""The page of `tppo serve`: a search box with a history, and answers with what each token is worth.

It loads nothing and speaks to its own server alone; what users and models write is set as text,
never as markup, and characters that have no sign, or act on others, are shown by their numbers.
"""

from __future__ import annotations

from html import escape

from tppo.stages.answering.page_style import CSS
from tppo.stages.answering.recipe import Recipe
from tppo.stages.live_page import SHARED, live_page, policy

SCRIPT = SHARED + r"""
const asGiven = document.body.dataset.prompt === "as given";
const events = [];
let asked = 0;

function signed(value) {
  const text = Math.abs(value).toFixed(2);
  return Number(text) === 0 ? text : (value > 0 ? "+" : "\u2212") + text;
}

function drawHistory() {
  $("history").replaceChildren(...events.map((event, i) => {
    const item = element("li", "event");
    item.append(element("small", "", visible(event.type)),
                element("bdi", "", visible(event.text)));
    const remove = element("button", "remove", "\u00d7");
    remove.type = "button";
    remove.setAttribute("aria-label", "remove " + event.text);
    remove.addEventListener("click", () => { events.splice(i, 1); drawHistory(); });
    item.append(remove);
    return item;
  }));
  $("empty").hidden = events.length > 0;
}

function token(found, largest) {
  const paid = found.reward !== null && found.reward !== undefined;
  const value = paid ? found.reward : found.logprob;
  const item = element("li", "t " + (value > 0 ? "pos" : value < 0 ? "neg" : "zero"));
  const share = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0;
  item.style.setProperty("--r", share.toFixed(2));
  const mark = ["", "\u2717", "\u2713"][found.category] || "";
  const text = found.token === "" ? "\u220e" : visible(found.token);
  item.append(element("bdi", "", text), element("small", "", mark + signed(value)));
  item.title = text + (paid ? ": reward " + signed(found.reward) : "") +
    ", probability " + (100 * Math.exp(found.logprob)).toFixed(1) + " %";
  return item;
}

function card(choice, number, largest) {
  const made = element("article");
  const reward = choice.tppo.reward;
  made.append(element("h2", "", "Answer " + number + (reward === null ? "" :
    ", reward " + signed(reward))));
  const queries = element("ul", "queries");
  for (const query of choice.tppo.queries) {
    const item = element("li");
    const use = element("button", "use");
    use.type = "button";
    use.append(element("bdi", "", visible(query.text)));
    if (asGiven) use.disabled = true;
    else use.title = "search for it: it becomes the newest event";
    use.addEventListener("click", () => add($("type").options[0].value, query.text));
    item.append(use, element("small", "", "confidence " +
      (100 * query.confidence).toFixed(0) + " %" +
      (query.reward === null ? "" : ", reward " + signed(query.reward))));
    queries.append(item);
  }
  const tokens = element("ol", "tokens");
  for (const found of choice.logprobs.content) {
    tokens.append(token(found, largest));
    if (found.token.includes("\n")) tokens.append(element("li", "break"));
  }
  const details = element("details");
  details.open = true;
  details.append(element("summary", "", "Token by token"), tokens);
  made.append(queries, details);
  return made;
}

async function ask() {
  const mine = ++asked;
  $("error").textContent = "";
  $("answers").setAttribute("aria-busy", "true");
  const messages = asGiven ? [{role: "user", content: $("prompt").value}]
    : events.map(event => ({role: "user", content: event.type + ": " + event.text}));
  const body = {messages, n: Number($("several").value), logprobs: true};
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("queries") && $("queries").value !== "") body.queries = Number($("queries").value);
  let found;
  try {
    const response = await fetch("/v1/chat/completions", {method: "POST",
      headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
    found = await response.json();
  } catch (error) {
    found = {error: {message: "The server cannot be reached; does tppo serve still run?"}};
  }
  if (mine !== asked) return;
  $("answers").removeAttribute("aria-busy");
  if (found.error) { $("error").textContent = visible(found.error.message); return; }
  const values = found.choices.flatMap(choice => choice.logprobs.content.map(
    one => Math.abs(one.reward === null ? one.logprob : one.reward)));
  const largest = Math.max(0, ...values);
  $("answers").replaceChildren(...found.choices.map((one, i) => card(one, i + 1, largest)));
}

function add(type, text) {
  events.push({type, text});
  drawHistory();
  ask();
}

$("ask").addEventListener("submit", submitted => {
  submitted.preventDefault();
  if (asGiven) { ask(); return; }
  const text = $("text").value.trim();
  $("text").value = "";
  if (text) add($("type").value, text);
  else if (events.length) ask();
});
if (!asGiven) drawHistory();
"""


POLICY = policy(SCRIPT, CSS)


def answer_page(name: str, recipe: Recipe, paid: bool) -> str:
    """The page for a model of this name, asked as the recipe says.

    paid: whether a reward model says what each token is worth.
    """
    fields = _prompt_fields() if recipe.prompt == "as given" else _history_fields(recipe)
    body = f"""<header>
<h1>{escape(name)}</h1>
<p>{_explained(recipe, paid)}</p>
</header>
<main>
<form id="ask">
{fields}
</form>
<p id="error" role="alert"></p>
<section id="answers" aria-live="polite" aria-label="answers"></section>
</main>"""
    return live_page(name, CSS, body, SCRIPT, prompt=recipe.prompt)


def _explained(recipe: Recipe, paid: bool) -> str:
    colours = (
        "A blue token is one that the reward model pays for, an orange one costs."
        if paid
        else "The less likely a token was to the model, the stronger its orange."
    )
    if recipe.prompt == "as given":
        return f"Write a prompt, and the model answers it. {colours}"
    return f"Search, and the model says what you may search for next. {colours}"


def _options(kind: str) -> str:
    return f"""<div class="options">
<label>Answers <input id="several" type="number" min="1" max="16" value="1"></label>
{kind}<label>Temperature <input id="temperature" type="number" min="0" max="2" step="0.1"
placeholder="as trained"></label>
</div>"""


def _history_fields(recipe: Recipe) -> str:
    types = "".join(f"<option>{escape(name)}</option>" for name in recipe.events)
    queries = (
        '<label>Queries <input id="queries" type="number" min="1" max="50" '
        f'value="{recipe.queries}"></label>\n'
    )
    return f"""<h2>History</h2>
<ol id="history"></ol>
<p id="empty">Nothing yet. The oldest event stands first.</p>
<div class="line">
<select id="type" aria-label="type of the event">{types}</select>
<input id="text" type="text" aria-label="what the user did next" placeholder="red running shoes"
autocomplete="off" autofocus>
<button type="submit">Search</button>
</div>
{_options(queries)}"""


def _prompt_fields() -> str:
    return f"""<h2>Prompt</h2>
<textarea id="prompt" rows="6" aria-label="prompt"></textarea>
<div class="line"><button type="submit">Answer</button></div>
{_options("")}"""
