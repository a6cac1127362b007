"""Measurements: numbers with intervals for what the networks do, on subjects they have not seen."""

from diffportrait3d.command import begin_package

begin_package(__name__)
