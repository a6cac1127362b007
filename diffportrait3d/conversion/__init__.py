"""From the authors' one checkpoint to one file per network. Command line: `python -m diffportrait3d.convert`."""

from .layout import Component, Inspection, inspect
from .split import Conversion, Options, convert
