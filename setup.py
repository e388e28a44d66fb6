"""Packaging: `pip install .` brings the programs snitun-client, snitun-server and snitun-master."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "snitun_sync/__init__.py").read_text("utf-8"), re.MULTILINE
)
assert VERSION is not None

setup(
    name="snitun_sync",
    version=VERSION[1],
    description="An end-to-end encrypted tunnel for appliances behind NAT: SniTun without asyncio",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    packages=find_packages(include=["snitun_sync", "snitun_sync.*"]),
    package_data={"snitun_sync": ["py.typed"]},
    install_requires=["pycryptodome>=3.9"],
    extras_require={"cryptography": ["cryptography>=3.4"]},
    entry_points={
        "console_scripts": [
            "snitun-client = snitun_sync.client.cli:console",
            "snitun-server = snitun_sync.server.cli:console",
            "snitun-master = snitun_sync.master.cli:console",
        ]
    },
    classifiers=[
        "Environment :: No Input/Output (Daemon)",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: System :: Networking",
    ],
)
