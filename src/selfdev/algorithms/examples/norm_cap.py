def merge_norm_cap(deltas):
    """Limit every row to the typical norm of a row over all experts."""
    norms = deltas.norm(dim=-1, keepdim=True)
    cap = norms.mean()
    factor = (cap / (norms + 1e-8)).clamp(max=1)
    return 0.6 * (factor * deltas).sum(dim=0)
