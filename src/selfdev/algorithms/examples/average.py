def merge_average(deltas):
    """Average the task vectors."""
    return deltas.mean(dim=0)
