"""Measurements: numbers with intervals for what the networks do, on subjects they have not seen."""
