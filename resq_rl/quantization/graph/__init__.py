"""From a network to its residual operators: wrapping, the trial pass, and the checks of what cannot be wrapped."""
