"""How fast the simulation is."""
