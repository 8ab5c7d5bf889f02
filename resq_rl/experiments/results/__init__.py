"""From measurements to fronts, intervals, tables and figures."""
