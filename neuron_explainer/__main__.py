"""``python -m neuron_explainer`` is ``neuron-explainer``."""

import sys

from neuron_explainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
