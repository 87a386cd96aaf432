"""The batch size for a model on a GPU, with no installation: the package beside this file is enough.

python find_optimal_batch_size.py --model dmis-lab/biobert-v1.1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hf_bsopt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
