"""Dates that chat templates are told: a fixed one in place of the clock's."""

# Tested by tests/unit/data/test_template_variables.py.

from __future__ import annotations

import json
import re
from datetime import datetime

_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_PARTS = (*"aAbBcdDeFGHIjklmMnpPrRsStTuUVwWxXyYzZ", *(f"-{letter}" for letter in "dHIjmMSU"))
"""Letters that follow a percent sign in formats of dates."""


def with_date(template: str, date: datetime) -> str:
    """Return a template in which `strftime_now` formats a date instead of the present one."""
    if "strftime_now" not in template:
        return template
    # transformers lets callers pass plain data only, so the calls are replaced in the text.
    template = _CALL.sub(lambda call: json.dumps(date.strftime(call[2])), template)
    # A format that stands in a variable: a macro takes the place of the function.
    return _macro(date) + template if "strftime_now" in template else template


def _macro(date: datetime) -> str:
    """Return a Jinja macro that formats one date as `strftime_now` formats the present one."""
    # NUL stands for a percent sign that is meant, while the others are replaced.
    steps = [("%%", "\0"), *((f"%{part}", date.strftime(f"%{part}")) for part in _PARTS)]
    filters = "".join(
        f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in [*steps, ("\0", "%")]
    )
    # Jinja drops the line break, so that the template begins on a line of its own.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}\n"
