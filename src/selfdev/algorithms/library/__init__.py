"""The human-designed merging methods: rivals of a run, known behaviours of screening, tools to merge with.

Each method is a pure function in a file of its own, beside the record that names its parameters, their
search ranges and its paper. `specification` says what such a record is; `trimming`, `thinning`, `sign_election`,
`spectrum` and `sphere` hold the steps that several methods share, and `blocks` how they get by with little memory.
"""

from selfdev.algorithms.library import (
    arcee_fusion,
    breadcrumbs,
    consensus_ta,
    dare_linear,
    dare_ties,
    della,
    doge_ta,
    emr_unified,
    iso_c,
    iso_cts,
    karcher,
    knots,
    linear,
    magmax,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    pcb,
    ram,
    sce,
    slerp,
    svc,
    task_arithmetic,
    ties,
    tsv_m,
    weighted_task_arithmetic,
    wudi,
)
from selfdev.algorithms.library.specification import Method, Paper, Parameter, unknown_name
from selfdev.errors import UserError

__all__ = ["Method", "Paper", "Parameter", "method", "methods"]

_METHODS = {
    entry.name: entry
    for entry in (
        linear.METHOD,
        task_arithmetic.METHOD,
        weighted_task_arithmetic.METHOD,
        ties.METHOD,
        dare_linear.METHOD,
        dare_ties.METHOD,
        della.METHOD,
        breadcrumbs.METHOD,
        model_stock.METHOD,
        slerp.METHOD,
        nuslerp.METHOD,
        karcher.METHOD,
        multislerp.METHOD,
        sce.METHOD,
        magmax.METHOD,
        nearswap.METHOD,
        arcee_fusion.METHOD,
        ram.METHOD,
        pcb.METHOD,
        emr_unified.METHOD,
        consensus_ta.METHOD,
        tsv_m.METHOD,
        iso_c.METHOD,
        iso_cts.METHOD,
        wudi.METHOD,
        doge_ta.METHOD,
        knots.METHOD,
        svc.METHOD,
    )
}


def methods() -> dict[str, Method]:
    """Return every method under its name, simple ones first."""
    return dict(_METHODS)


_MERGEKITS = {
    "della_linear": "della with elect=false",
    "breadcrumbs_ties": "breadcrumbs with elect=true",
}
"""What mergekit has as methods of their own."""


def method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        UserError: there is none; the message gives the nearest known name.
    """
    if name in _MERGEKITS:
        raise UserError(f"unknown method: '{name}', as mergekit calls it; here it is {_MERGEKITS[name]}")
    if name not in _METHODS:
        raise UserError(unknown_name("method", name, list(_METHODS)))
    return _METHODS[name]
