"""The exception tree. Every message says what was expected, what came, and what to do."""


class RobenchError(Exception):
    """Base of all errors that robench raises on purpose."""


class UsageError(RobenchError):
    """The user can fix it: the command line prints one line without a traceback and exits with 2."""


class StorageError(UsageError):
    """Nothing more can be written: no space, no permission, a store that does not answer."""


class PluginError(RobenchError):
    """A defense, attack or dataset broke a rule of the contract; the message names the plugin and the rule."""


class DataError(RobenchError):
    """A file (images, weights, a run folder, a CSV) does not fit its schema or is damaged."""


class Interrupted(RobenchError):  # noqa: N818 - a signal, not a fault
    """The user pressed Ctrl-C; the message names the command that resumes."""


class BudgetExhausted(RobenchError):  # noqa: N818 - it ends an attack in good order; it is a signal, not a fault
    """The query budget of an attack is used up; the engine takes the attack's best images so far."""
