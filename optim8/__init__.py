"""8-bit optimizers on blockwise dynamic quantization, and the functional API they stand on.

Example:
    >>> import torch, optim8
    >>> model = torch.nn.Linear(256, 256)
    >>> optimizer = optim8.AdamW8bit(model.parameters(), lr=1e-3)
    >>> model(torch.ones(1, 256)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.precision(model.weight), optimizer.precision(model.bias)
    ('8bit', '32bit')
"""

from optim8 import functional, optim
from optim8.optim import Adam8bit, AdamW8bit, Lion8bit

__all__ = ["Adam8bit", "AdamW8bit", "Lion8bit", "functional", "optim"]
