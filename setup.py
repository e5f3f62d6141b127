"""Packs the top-level folders defenses/ and attacks/ as robench.defenses and robench.attacks."""

from setuptools import find_packages, setup

KINDS = ("defenses", "attacks")

packages = {"robench", *(f"robench.{p}" for p in find_packages("robench"))}
for kind in KINDS:
    packages |= {f"robench.{kind}", *(f"robench.{kind}.{p}" for p in find_packages(kind))}

setup(packages=sorted(packages), package_dir={f"robench.{kind}": kind for kind in KINDS})
