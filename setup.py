"""Everything about the package is said once, in settings.ini; this reads it."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = config["DEFAULT"]
# `extra_timm = …` in settings.ini is what `pip install "finetune_nb[timm]"` brings.
extras = {name[6:]: cfg[name].split() for name in cfg if name.startswith("extra_")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), **extras},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    # An installed wheel finds the shipped checkpoint under <prefix>/share/finetune_nb.
    data_files=[
        ("share/finetune_nb", [str(p) for p in sorted(Path("data").glob("*.*")) if p.is_file()])
    ],
    zip_safe=False,
)
