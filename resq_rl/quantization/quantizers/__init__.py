"""From samples to integers: quantizers, their ranges, the residual table of a layer, and integer weights."""
