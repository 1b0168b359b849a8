"""A run's backbone in the formats of other programs, verified by loading it again.

This package owns the export formats and the model card. A format is a module with a `FORMAT`; every
module here other than those in NOT_FORMATS is one, so a new file is all that a new format takes. It
imports `runs` and the packages listed before it. Start with `export`.
"""

import pkgutil

NOT_FORMATS = ("export", "format", "model_card")


def format_names() -> list[str]:
    """List the export formats, without importing them."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in modules if name not in NOT_FORMATS]
