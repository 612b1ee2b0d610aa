"""The methods, one file per rule. Importing this package imports every file in it, which registers its methods."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
