"""Everything about the package is in pyproject.toml, but for this: cli/ and configs/ lie beside rpq_convert/, and belong to it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rpq_convert", "rpq_convert.*"]), "rpq_convert.cli", "rpq_convert.configs"],
    package_dir={"rpq_convert.cli": "cli", "rpq_convert.configs": "configs"},
)
