"""Lets older tools that know only `setup.py` install the package; see pyproject.toml."""

from setuptools import setup

setup()
