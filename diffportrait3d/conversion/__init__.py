"""From the authors' one checkpoint to one file per network. Command line: `python -m diffportrait3d.convert`."""

from ..weights.reader import Source, open_source
from .layout import Group, Inspection, inspect
from .split import Options, convert

__all__ = ["Group", "Inspection", "Options", "Source", "convert", "inspect", "open_source"]
