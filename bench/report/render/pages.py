"""Pages made of the templates beside this file."""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["page"]


def page(template: str, **values: Any) -> str:
    """Return a page of the template; what values hold is escaped, but for markup."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    """Return what keeps the templates that were compiled, for the next page."""
    return Environment(
        loader=PackageLoader("bench.report.render", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
