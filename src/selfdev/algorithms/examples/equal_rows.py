def merge_equal_rows(deltas):
    """Give each row the same norm in all experts, then add."""
    norms = deltas.norm(dim=-1, keepdim=True)
    target = norms.mean(dim=0)
    rows = deltas / (norms + 1e-8) * target
    return 0.5 * rows.sum(dim=0)
