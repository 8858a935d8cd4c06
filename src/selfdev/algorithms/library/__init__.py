"""The human-designed merging methods: rivals of a run, known behaviours of screening, tools to merge with.

Each method is a pure function in a file of its own, beside the record that names its parameters, their
search ranges and its paper. `specification` says what such a record is; `trimming`, `sign_election`,
`spectrum` and `sphere` hold the steps that several methods share, and `blocks` how they get by with little memory.
"""

from selfdev.algorithms.library import (
    arcee_fusion,
    breadcrumbs,
    consensus_ta,
    dare,
    della,
    doge_ta,
    emr_unified,
    iso_c,
    karcher,
    knots,
    linear,
    magmax,
    model_stock,
    nearswap,
    pcb,
    ram,
    sce,
    slerp,
    svc,
    task_arithmetic,
    ties,
    tsv_m,
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
        task_arithmetic.WEIGHTED_METHOD,
        ties.METHOD,
        dare.LINEAR_METHOD,
        dare.TIES_METHOD,
        della.METHOD,
        breadcrumbs.METHOD,
        model_stock.METHOD,
        slerp.METHOD,
        slerp.NU_METHOD,
        karcher.METHOD,
        karcher.MULTISLERP_METHOD,
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
        iso_c.CTS_METHOD,
        wudi.METHOD,
        doge_ta.METHOD,
        knots.METHOD,
        svc.METHOD,
    )
}


def methods() -> dict[str, Method]:
    """Return every method under its name, simple ones first."""
    return dict(_METHODS)


def method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        UserError: there is none; the message gives the nearest known name.
    """
    if name not in _METHODS:
        raise UserError(unknown_name("method", name, list(_METHODS)))
    return _METHODS[name]
