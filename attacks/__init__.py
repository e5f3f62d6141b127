"""The built-in attacks, one module or package each: the file stem is the name in the registry and in the CSV."""

if __name__ != "robench.attacks":
    raise ImportError(f"import this package as robench.attacks, not as {__name__}")
