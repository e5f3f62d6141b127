"""The built-in defenses, one module or package each: the file stem is the name in the registry and in the CSV."""

if __name__ != "robench.defenses":
    raise ImportError(f"import this package as robench.defenses, not as {__name__}")
