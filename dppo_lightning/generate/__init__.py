"""Verb 1: engines that generate, and the stream that leads on to verbs 2 and 3, reward and advantage.

The names in ``__init__.pyi`` are loaded when they are used: a child process that imports one file loads that file only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
