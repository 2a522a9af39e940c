"""The frame of a self-contained HTML page, which loads nothing and runs nothing."""

from __future__ import annotations

from html import escape


def page(title: str, css: str, body: str) -> str:
    """The whole page.  title: text, which is escaped.  css, body: markup, as it stands.

    Its content security policy lets no script run and nothing be loaded, whatever `body` holds.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""
