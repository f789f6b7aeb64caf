"""Policies for tests that are about something else."""

from __future__ import annotations

from kpmd.core.policy import Functions, Helpers, Policy, Programs, Rule
from kpmd.core.quotas import Limits

#: Everybody may do everything but what only administrators may.
EVERYTHING = Rule(
    name="everything",
    everyone=True,
    helpers=Helpers(None, read_kernel=True, read_user=True, kfuncs=None),
    map_types=None,
    functions=Functions(risky=True),
    programs=Programs(anything=True),
    limits=Limits.unlimited(),
)

OPEN = Policy(rules=(EVERYTHING,))
