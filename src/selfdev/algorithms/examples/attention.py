import torch


def merge_attention(deltas):
    """Let the experts attend to each other, and add what they read."""
    flat = deltas.flatten(1)
    scores = flat @ flat.T
    weights = torch.softmax(scores / (scores.diagonal().mean() + 1e-12), dim=1)
    return 0.6 * (weights @ flat).sum(dim=0).reshape(deltas[0].shape)
