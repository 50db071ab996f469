"""Side-by-side measurements that print ratios; what they share is in `benchmarks.harness`."""

import os

# Before torch is imported, which reads the first of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
