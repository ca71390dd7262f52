"""A network that int8 calibration ruins, and what brings it back."""
