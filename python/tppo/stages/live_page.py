"""Pages that a server of this machine draws with a script: their frame, and what scripts share.

Such a page loads nothing and speaks to its own server alone.  What users and models write is set
as text, never as markup, and characters that have no sign, or act on others, are shown by their
numbers.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

SHARED = r"""
"use strict";
const $ = id => document.getElementById(id);

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]/gu, c =>
    c === "\u200d" ? c : c === "\n" ? "\u23ce" : c === "\t" ? "\u21e5"
    : "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}
"""


def policy(script: str, css: str) -> str:
    """The Content-Security-Policy of a page with this script and style sheet and no others."""
    return (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(css)}; connect-src "
        "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def live_page(title: str, css: str, body: str, script: str, **data: str) -> str:
    """The whole page.  title: text.  body: markup.  data: what the script finds as data-* of the
    body.
    """
    given = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{css}</style>
</head>
<body{given}>
{body}
<script>{script}</script>
</body>
</html>
"""
