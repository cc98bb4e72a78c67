"""Build the package from settings.ini, the one place where its metadata is kept."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def lines(key: str) -> list[str]:
    """Return the non-empty lines of the setting `key` (configparser drops comments)."""
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


class BuildPy(build_py):
    """Leave out nbdev's index for documentation links, which only exists in a working copy."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[1] != "_modidx"]


readme = HERE / "README.md"

setup(
    name=settings["repo"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    packages=find_packages(include=[settings["lib_name"], settings["lib_name"] + ".*"]),
    package_data={settings["lib_name"]: ["explore/*.jpg", "photos/*", "py.typed", "vectors/*"]},
    include_package_data=False,
    python_requires=">=" + settings["min_python"],
    install_requires=lines("requirements"),
    extras_require={
        "worker": lines("worker_requirements"),
        "backfill": lines("backfill_requirements"),
        "ray": lines("backfill_requirements") + lines("ray_requirements"),
        "explore": lines("worker_requirements")
        + lines("backfill_requirements")
        + lines("explore_requirements"),
        "dev": lines("worker_requirements")
        + lines("backfill_requirements")
        + lines("explore_requirements")
        + lines("ray_requirements")
        + lines("check_requirements")
        + lines("dev_requirements"),
    },
    entry_points={"console_scripts": lines("console_scripts")},
    cmdclass={"build_py": BuildPy},
    zip_safe=False,
)
