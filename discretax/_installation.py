"""Two distributions are imported as `discretax`: which of them has written into this folder?

This library is installed as discretax-zoo. The one that is installed as discretax writes files of the
same names, and replaces this library's or leaves its own beside them.
"""

import pathlib
import sys
import warnings

_REMEDY = (
    "Type `pip uninstall -y discretax discretax-zoo`, then install discretax-zoo again; only one of "
    "the two can be in an environment."
)

if not hasattr(sys.modules["discretax"], "__version__"):  # what __init__.py here begins with
    raise ImportError(f"another library, discretax, has replaced files of discretax-zoo. {_REMEDY}")
if (pathlib.Path(__file__).parent / "utils" / "from_config.py").exists():
    warnings.warn(
        f"another library, discretax, is installed in the same folder as discretax-zoo, and removing "
        f"or upgrading it will take files away from this one. {_REMEDY}",
        stacklevel=2,
    )
