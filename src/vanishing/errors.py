"""The errors of this library: each is a `VanishingError` and also the built-in error that a caller would expect."""


class VanishingError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(VanishingError, ValueError):
    """A hyper-parameter of a compressor, a schedule or a recipe is out of its range or of the wrong type."""


class RecipeError(VanishingError, ValueError):
    """A recipe does not fit a model; the message lists every problem, and the model was not changed."""


class TransitionError(VanishingError, ValueError):
    """A transition was asked for something that its step, its state or the optimizer does not allow."""


class FileError(VanishingError, ValueError):
    """A saved model is damaged, too new, incomplete, or does not fit the model that it was loaded into."""
