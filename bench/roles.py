"""The two systems of a bench, by the names they have everywhere: in measurements, on the command line, in reports."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["ROLES", "Role"]

Role = Literal["baseline", "candidate"]
#: In the order in which they are told.
ROLES: tuple[Role, ...] = get_args(Role)
