"""What an endpoint may reply, and what is done then: one table, for live requests and batch files.

The code acts on the rows of FORMS alone, and `table` prints them for docs/labelling-endpoints.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["label", "repair", "plain", "retry", "drop", "stop"]
LostBy = Literal["endpoint", "judge", "item"]

ACTIONS: dict[Action, str] = {
    "label": "item labelled",
    "repair": "tried again: sent back once with the reason, then item dropped",
    "plain": "tried again with a simpler schema, then without, and from now on where that helps, "
    "else item dropped",
    "retry": "tried again",
    "drop": "item dropped",
    "stop": "run stops, what was paid is kept",
}
BY: dict[LostBy, str] = {
    "endpoint": "the endpoint: counted, asked again by the next run",
    "judge": "the judge: counted",
    "item": "its content: not counted",
}


@dataclass(frozen=True)
class Form:
    """A row of the table: a form of reply, and what happens to the item or to the run."""

    name: str
    seen: str
    """What the reply looks like, for the documentation."""
    first: Action
    """What is done while the endpoint has answered nothing yet."""
    later: Action
    """What is done after it has answered an item."""
    by: LostBy | None = None
    """Who loses the item where it is dropped."""
    spent: Action = "drop"
    """What is done after the last further try."""
    statuses: frozenset[int] = frozenset()
    codes: frozenset[str] = frozenset()
    """Codes and types of errors that mean this form whatever the status is."""
    advice: str = ""
    """What the message says beside the status; with slots for the configuration."""

    def action(self, answered: bool) -> Action:
        """What is done, by whether the endpoint has answered something already."""
        return self.later if answered else self.first


def _codes(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FLAG = "--label.endpoint."

FORMS = (
    Form(
        "verdict",
        "a judgement of exactly the words of the answer: bare, in a fence, in prose, after a "
        "thought, in text parts, also when it was cut at the limit of tokens behind it",
        "label", "label",
    ),
    Form(
        "unsound",
        "text that holds no judgement of exactly these words",
        "repair", "repair", "judge",
    ),
    Form(
        "cut",
        "`finish_reason` is `length` and no whole judgement came",
        "drop", "drop", "judge",
        advice="the answer was cut at the limit of tokens: raise " + _FLAG + "max-tokens",
    ),
    Form(
        "blank",
        "an answer without text",
        "drop", "drop", "judge",
        advice="the server's reply holds no text",
    ),
    Form(
        "moderated",
        "`refusal`, `finish_reason` is `content_filter`, or an error that says so",
        "drop", "drop", "item",
        codes=_codes(
            "content_filter content_policy_violation responsibleaipolicyviolation invalid_prompt "
            "moderation_blocked data_inspection_failed"
        ),
        advice="the model or a filter refused this content",
    ),
    Form(
        "too long",
        "413, or an error that says so",
        "drop", "drop", "judge",
        statuses=frozenset({413}),
        codes=_codes("context_length_exceeded string_above_max_length request_too_large"),
        advice="the request is too long for the model",
    ),
    Form(
        "quota",
        "402, or an error with a code of used-up credit, such as `insufficient_quota`",
        "stop", "stop",
        statuses=frozenset({402}),
        codes=_codes(
            "insufficient_quota billing_hard_limit_reached billing_not_active billing_error "
            "insufficient_balance insufficient_credits credit_balance_too_low"
        ),
        advice="the account has no credit left: top it up or raise its limit, then call again",
    ),
    Form(
        "redirect",
        "a redirection, 3xx",
        "stop", "stop",
        statuses=frozenset(range(300, 400)),
        advice="a redirection from {here} to {there} is not followed, because the users' histories "
        "would go there: where that is right, set " + _FLAG + "base-url to it",
    ),
    Form(
        "key",
        "401",
        "stop", "retry", "endpoint",
        statuses=frozenset({401}),
        codes=_codes("invalid_api_key authentication_error account_deactivated api_key_invalid"),
        advice="the key, from {variable}, is refused",
    ),
    Form(
        "forbidden",
        "403, 451",
        "drop", "drop", "endpoint",
        statuses=frozenset({403, 451}),
        codes=_codes("permission_error permission_denied unsupported_country_region_territory"),
        advice="this content, or the key, from {variable}, is refused",
    ),
    Form(
        "nowhere",
        "404, 405, 410",
        "stop", "drop", "endpoint",
        statuses=frozenset({404, 405, 410}),
        codes=_codes("model_not_found not_found_error unknown_url deploymentnotfound"),
        advice="no such path{v1}, or no model {model!r}",
    ),
    Form(
        "schema",
        "400, 422, where no other parameter is named, of a request with a JSON schema",
        "plain", "plain", "endpoint",
    ),
    Form(
        "request",
        "400, 422 otherwise",
        "drop", "drop", "endpoint",
        statuses=frozenset({400, 422}),
        codes=_codes("invalid_request_error invalid_argument unsupported_parameter "
                     "unsupported_value badrequesterror"),
        advice="{parameter}",
    ),
    Form(
        "busy",
        "408, 409, 425, 429, 5xx, or an error with a code that means one of them",
        "retry", "retry", "endpoint",
        statuses=frozenset({408, 409, 425, 429, *range(500, 600)}),
        codes=_codes("rate_limit_exceeded rate_limit_error overloaded_error server_error api_error "
                     "internal_error internal_server_error timeout timeout_error unavailable "
                     "resource_exhausted slow_down"),
    ),
    Form(
        "wait",
        "one of those with a `Retry-After` above `" + _FLAG + "max-wait-s`",
        "stop", "stop",
        advice="the server asks to wait {wait:.0f} s, the limit is {limit:g} s (" + _FLAG
        + "max-wait-s): call again later, or raise it",
    ),
    Form(
        "slow",
        "no whole reply within `" + _FLAG + "timeout-s`",
        "retry", "retry", "endpoint",
        advice="no answer within {timeout:g} s",
    ),
    Form(
        "broken",
        "a connection that breaks off",
        "retry", "retry", "endpoint",
        advice="the connection broke off",
    ),
    Form(
        "unreachable",
        "no connection",
        "retry", "retry", "endpoint", "stop",
        advice="{base_url} cannot be reached{proxy}",
    ),
    Form(
        "garbled",
        "200 with no chat completion and no error that says why: a web page, broken JSON, "
        "`choices` null or empty",
        "drop", "retry", "endpoint",
        advice="the server's reply is not a chat completion{v1}",
    ),
    Form(
        "too large",
        "a reply of more than 8 MB, of which no more is read, or one compressed otherwise than by "
        "gzip",
        "drop", "drop", "endpoint",
        advice="the reply has more than 8 MB, or is compressed otherwise than by gzip although it "
        "was asked for as it is (Accept-Encoding: identity): is {base_url} such an endpoint?",
    ),
    Form(
        "other",
        "any other status",
        "drop", "drop", "endpoint",
    ),
    Form(
        "no words",
        "(nothing is asked: the answer to be judged has no words)",
        "drop", "drop", "item",
        advice="the response has no words",
    ),
    Form(
        "unanswered",
        "a line of a batch file without a response; with labels of batch files alone "
        "(no `" + _FLAG + "base-url`), an item that they lack",
        "drop", "drop", "endpoint",
        advice="no answer of a batch file",
    ),
)  # fmt: skip
FORM = {form.name: form for form in FORMS}
BY_STATUS = {status: form for form in FORMS for status in form.statuses}
BY_CODE = {code: form for form in FORMS for code in form.codes}
# Codes that are more precise than the status they come with; the others only repeat it.
SPECIFIC = {"moderated", "too long", "quota"}

PARAMETERS = {
    "model": "",
    "messages": "",
    "response_format": f"{_FLAG}no-schema leaves it out",
    "temperature": f"{_FLAG}temperature None leaves it out",
    "max_tokens": f"{_FLAG}max-completion-tokens N sends its newer name instead, "
    f"{_FLAG}max-tokens None leaves it out",
    "max_completion_tokens": f"{_FLAG}max-completion-tokens None sends max_tokens instead",
}
"""The parameters that a request may hold, and what to do where one is refused."""


def table() -> str:
    """The forms of reply as a Markdown table; print it where a test finds the documentation old."""
    lines = ["| the endpoint replies | nothing answered yet | later | an item dropped is lost by |",
             "|---|---|---|---|"]  # fmt: skip
    for form in FORMS:
        shown = []
        for action in (form.first, form.later):
            then = f"; after the last try {ACTIONS[form.spent]}" if action == "retry" else ""
            shown.append(ACTIONS[action] + then)
        later = "the same" if form.first == form.later else shown[1]
        by = BY[form.by] if form.by else ""
        lines.append(f"| {form.seen} | {shown[0]} | {later} | {by} |")
    return "\n".join(lines) + "\n"
