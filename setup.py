"""Metadata and dependencies of neuron_explainer; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "neuron_explainer" / "__init__.py").read_text("utf-8"), re.M
)
assert VERSION is not None

setup(
    name="neuron_explainer",
    version=VERSION.group(1),
    description="Dictionary-learning interpretability on GPT-2-family models: "
    "load, hook, encode, train, evaluate, look, intervene.",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["neuron_explainer", "neuron_explainer.*"]),
    package_data={
        "neuron_explainer": [
            "py.typed",
            "assets/**/*.json",
            "assets/**/*.safetensors",
            "assets/**/*.tiktoken",
            "assets/**/*.store",
            "assets/**/*.bin",
            "assets/**/*.npz",
            "assets/**/*.jsonl",
            "server/openapi.json",
            "viewer/dist/*",
        ]
    },
    install_requires=[
        # 2.10 is the first torch whose weights_only reader has no known hole (CVE-2026-24747).
        "torch>=2.10",
        "tiktoken",
        "blobfile",
        "numpy",
        "safetensors",
        "tqdm",
        "filelock",
        "requests",
        "urllib3>=2.2",
    ],
    extras_require={
        # Models and files of the Hugging Face hub, and any causal LM behind a context.
        "hf": ["transformers", "huggingface_hub"],
        # Texts in compressed files, in Parquet, and in datasets of Hugging Face.
        "data": ["zstandard", "pyarrow", "datasets"],
        # The pictures of a report.
        "plots": ["matplotlib"],
        # Maps of decoder directions by UMAP, and dictionaries matched one to one (scipy).
        "maps": ["umap-learn", "scipy"],
        # Latents matched with known features (scipy), and logistic probes.
        "probes": ["scipy", "scikit-learn"],
        # The probes and figures of the board experiments.
        "boards": ["matplotlib", "scikit-learn"],
        # Figures of units as a table.
        "pandas": ["pandas"],
        # Where training can log to, next to its own log.jsonl.
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        # Pages and an API in the browser: neuron-explainer serve.
        "serve": ["fastapi", "uvicorn", "orjson"],
        # What trains the embedded model's tokenizer; using it needs nothing beyond the core.
        "train": ["tokenizers"],
        # Tests of the pages in the system's Chromium; axe-core judges their accessibility.
        # The card of a unit as a widget that shows others on a click; without it notebooks show a still page.
        "notebook": ["anywidget"],
        "browser": ["playwright", "axe-playwright-python"],
        "test": [
            "anywidget",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "transformers",
            "tokenizers",
            "scikit-learn",
            "scipy",
            "matplotlib",
            "zstandard",
            "pyarrow",
            "datasets",
            "pandas",
            "fastapi",
            "uvicorn",
            "orjson",
            "httpx2",
            "mypy",
            "ruff",
            "pre_commit",
        ],
    },
    entry_points={"console_scripts": ["neuron-explainer = neuron_explainer.cli:main"]},
)
