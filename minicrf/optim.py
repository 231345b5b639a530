"""Momentum SGD with weight decay, as in Sec. 4.1 of the paper.

    v <- momentum v - rate (g + decay p);   p <- p + v
"""
from .arrays import array_module, for_each


class SGD:
    """Updates the parameters it is given in place, and zeroes their gradients.

    params, grads: dicts of arrays with equal keys and shapes.
    rates: learning rate for each key; decays: weight decay for each key; momentum: one for all.
    `scale`, 1 at first, multiplies every rate: what a learning-rate drop sets.
    `velocity`: dict of arrays as params, to save and restore.
    """

    def __init__(self, params, grads, rates, decays, momentum=0.9):
        self.params, self.grads = params, grads
        self.rates, self.decays, self.momentum, self.scale = rates, decays, momentum, 1.0
        self.velocity = {key: array_module(p).zeros_like(p) for key, p in params.items()}

    def step(self):
        """One update from the gradients summed so far."""
        for_each(self.update, list(self.params), max(self.params.values(), key=lambda p: p.size))

    def update(self, key):
        p, v, g = self.params[key], self.velocity[key], self.grads[key]
        v *= self.momentum
        g += self.decays[key] * p
        g *= self.scale * self.rates[key]
        v -= g
        p += v
        g[...] = 0
