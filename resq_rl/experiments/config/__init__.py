"""Settings: composed by Hydra, converted to frozen dataclasses, and the objects that they name."""
