"""Sine-cosine positions of a grid of tokens, for the flow transformer and the small judge."""
import torch


def grid_positions(h, w, width, device=None):
    """2-D sine-cosine positions of an h x w token grid: (h*w, width), the row's half first. Any h, w."""
    freq = torch.exp(-torch.arange(width // 4, device=device) / (width // 4) * 4.0)     # 1 .. e^-4 rad per token
    row = _axis(h, freq)[:, None].expand(h, w, -1)                              # (h, w, width/2)
    col = _axis(w, freq)[None].expand(h, w, -1)
    return torch.cat((row, col), -1).flatten(0, 1)


def _axis(n, freq):
    angle = torch.arange(n, device=freq.device)[:, None] * freq                 # (n, width/4)
    return torch.cat((angle.sin(), angle.cos()), 1)
