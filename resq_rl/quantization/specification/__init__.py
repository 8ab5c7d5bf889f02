"""What callers specify: how a network is quantized, its inputs, the decisions of a frame, and what a frame costs."""
